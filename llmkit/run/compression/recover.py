"""Training that repairs what a step lost: the run's own recipe on its own data, taught by the chain's first model."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.compression import Recover, Repair, Step
from llmkit.recipe.objectives import Distil, Teaching
from llmkit.recipe.schema import EvalDuring, Finetune, Model, Pretrain, Recipe, Train, Tuning
from llmkit.recipe.tasks import TAUGHT
from llmkit.recipe.training import Rounded
from llmkit.recipe.units import Amount
from llmkit.registry import OBJECTIVES, TASKS, goal_of
from llmkit.report.console import Reporter, make_reporter
from llmkit.run.compression.material import Material
from llmkit.run.finetune import finetune, plan_finetune
from llmkit.run.folders import CACHE, Options, anchored, home_of
from llmkit.run.planning import plan
from llmkit.run.pretrain import pretrain

_SELDOM: dict[str, Any] = {"every": Amount(50, "percent"), "rows": 64}
"""Recoveries are short: evaluations as often as those of a whole run would take longer than the training, and the
chain measures what comes out of it anyway."""


def recover(
    folder: Path,
    start: Path,
    step: Step,
    settings: Recover,
    material: Material,
    options: Options,
    reporter: Reporter,
    *,
    sparse: bool,
) -> Path:
    """Train a model of the chain further.

    Args:
        folder: Where training goes on, in the chain's folder; a killed one goes on from its checkpoint.
        start: The model to begin with.
        step: What was done to it: what must stay so.
        settings: How to train.
        material: What the chain's first model learned.
        options: As for every verb.
        reporter: Told what happens.
        sparse: Whether weights were taken out, by this step or one before: they stay zero.

    Returns:
        The trained model's folder.

    Raises:
        UsageError: Nothing says what the model learned from.
        RunError: Training failed; the same command goes on.
    """
    runs, name, verb = _place_of(folder, options.runs)
    given = replace(options, runs=runs, fresh=False, self_check=False)
    loaded, train = _training_of(name, start, step, settings, material, reporter, sparse=sparse)
    train(loaded, given, reporter, verb=verb)
    return folder / "model"


def check_recovery(step: Step, material: Material, options: Options) -> None:
    """Plan a step's training, as if it began with the chain's first model: what cannot be is told before hours go by.

    Args:
        step: With `recover`.
        material: What the chain's first model learned.
        options: As for every verb.

    Raises:
        UsageError: It cannot be trained so.
    """
    assert step.recover is not None
    reporter = make_reporter(quiet=True)  # all that is to be said is said when it is trained
    place = material.subject.place
    loaded, train = _training_of("recover", place, step, step.recover, material, reporter, sparse=False)
    if train is finetune:
        plan_finetune(loaded, options, reporter)
    else:
        plan(loaded, options)


def _training_of(
    name: str,
    start: Path,
    step: Step,
    settings: Recover,
    material: Material,
    reporter: Reporter,
    *,
    sparse: bool,
) -> tuple[Loaded, Callable[..., Any]]:
    """The recipe of a recovery, and the verb that trains it."""
    loaded = _loaded(material)
    recipe, kept = loaded.recipe, _kept(settings.train, step, sparse=sparse)
    # This machine, which need not be the one of the run's recipe; another batch may not be a multiple.
    free = material.asked.machine.model_copy(update={"micro_batch": "auto"})
    common = {"name": name, "machine": free}
    tuned = recipe.finetune
    if tuned is not None and tuned.task not in OBJECTIVES:
        taught = _taught(settings, material, tuned.task, reporter)
        section = tuned.model_copy(update=_tuning(tuned, start, kept, taught))
        made = recipe.model_copy(update={**common, "finetune": section, "pretrain": None})
        return replace(loaded, recipe=made), finetune
    learned = recipe.pretrain
    assert learned is not None
    taught = _taught(settings, material, learned.objective, reporter)
    again = learned.model_copy(update=_training(learned, start, kept, taught))
    made = recipe.model_copy(update={**common, "pretrain": again, "finetune": None})
    return replace(loaded, recipe=made), pretrain


def _place_of(folder: Path, runs: Path) -> tuple[Path, str, str]:
    """The folder of runs, the run, and the folder in it that training goes to; that of a model that lies elsewhere."""
    home = home_of(folder, runs)
    if home is None:
        above = folder.absolute().parents
        runs = next((place for place in above if (place / CACHE).is_dir()), above[1])
        home = home_of(folder, runs)
    assert home is not None
    return runs, str(home.relative_to(runs)), os.path.relpath(folder.resolve(), home.resolve())


def _loaded(material: Material) -> Loaded:
    """The recipe of the model's run; of another model, one that trains it on the text that the section names."""
    subject, section = material.subject, material.section
    if subject.trained is not None and section.learn is None:
        return subject.trained
    here = material.asked.base / "recipe.yaml"  # paths that `learn` names count from the section's recipe
    if subject.trained is not None:
        recipe = _with_data(subject.trained.recipe, material)
        return anchored(replace(subject.trained, recipe=recipe, path=here))
    if material.task is not None:
        raise UsageError(
            f"{subject.word}: no run trained it, and recovery goes on with a run's training",
            hint="fine-tune it first: llmkit finetune --model ... ; or leave `recover` out",
        )
    if section.learn is None:
        raise UsageError(
            f"{subject.word}: no run trained it, and nothing says what recovery learns from",
            hint="give text: --learn FILES (compress.learn)",
        )
    from llmkit.run.measure.text import learned_by

    learned = learned_by(subject)
    made = {
        "llmkit": 1,
        "name": "recovered",
        "seed": material.asked.seed,
        "language": material.asked.language,
        "pretrain": {
            "objective": learned.objective,
            "model": {"name": str(subject.place), "context": learned.model.context},
            "tokenizer": str(subject.place),
            "data": [source.model_dump(mode="json", exclude_unset=True) for source in section.learn],
            "train": {"length": "1 steps"},
        },
    }
    return anchored(replace(load_recipe(made), path=here))


def _with_data(recipe: Recipe, material: Material) -> Recipe:
    """The recipe with the data that the section names instead of its own."""
    learn = material.section.learn
    assert learn is not None
    if recipe.finetune is not None and recipe.finetune.task not in OBJECTIVES:
        data = material.labelled()
        return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"data": data})})
    assert recipe.pretrain is not None
    return recipe.model_copy(update={"pretrain": recipe.pretrain.model_copy(update={"data": learn})})


def _kept(train: Repair, step: Step, *, sparse: bool) -> dict[str, Any]:
    """Training's settings, with what the step did staying so."""
    given: dict[str, Any] = {name: getattr(train, name) for name in Repair.model_fields}
    given["keep_zeros"] = sparse
    if step.method == "quantize":
        given["quantized"] = rounded(step)
    return given


def rounded(step: Step) -> Rounded:
    """How weights are rounded while they learn, for what a step stores.

    Raises:
        UsageError: Nothing is trained so.
    """
    if step.format == "mixed":
        raise UsageError(
            "compress.steps: `recover` after `format: mixed`: one number of bits is trained at a time",
            hint="leave `recover` out, or choose int8, int4, w8a8 or fp8",
        )
    return Rounded(
        bits=4 if step.format == "int4" else 8,
        group=step.group or "auto",
        symmetric=step.symmetric is not False,
        float8=step.format == "fp8",
        activations=step.format in ("w8a8", "fp8"),
        keep=step.keep or None,
    )


def _training(section: Pretrain, start: Path, train: dict[str, Any], taught: Distil | None) -> dict[str, Any]:
    model = Model(
        preset=None,
        name=str(start),
        context=section.model.context,
        trust_remote_code=section.model.trust_remote_code,
    )
    return {
        "model": model,
        "tokenizer": str(start),
        "train": Train.model_construct(**train),
        "distil": taught,
        "eval": EvalDuring.model_construct(**_SELDOM),
        "prompts": [],
        "export_check": [],
    }


def _tuning(section: Finetune, start: Path, train: dict[str, Any], taught: Distil | None) -> dict[str, Any]:
    model = section.model.model_copy(update={"name": str(start)})
    none = dict.fromkeys(("adapter", "freeze", "unfreeze", "lr_decay", "stop_early"))
    return {
        "model": model,
        "train": Tuning.model_construct(**train),
        "distil": taught,
        "eval": section.eval.model_copy(update=_SELDOM),
        "prompts": [],
        "export_check": [],
        **none,
    }


def _taught(settings: Recover, material: Material, learned: str, reporter: Reporter) -> Distil | None:
    """Whom the smaller model learns from; nobody where two models' words on a row cannot be compared.

    Raises:
        UsageError: That is so, and how to learn from a teacher was said.
    """
    if settings.distil is None:
        return None
    able = learned in TAUGHT if learned in TASKS else goal_of(learned).model != "detector"
    if not able:
        if settings.distil != Teaching():
            raise UsageError(
                f"compress.steps: recover.distil: what two models say of a row of `{learned}` cannot be compared",
                hint="leave it out: `distil: null`",
            )
        reporter.note(
            f"recovery of `{learned}` learns from the data alone: it has no way to learn from a teacher"
        )
        return None
    return Distil(teacher=str(material.subject.place.absolute()), **settings.distil.model_dump())
