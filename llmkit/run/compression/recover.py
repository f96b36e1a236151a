"""Training that repairs what a step lost: the run's own recipe on its own data, taught by the chain's first model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.compression import Recover, Repair, Step
from llmkit.recipe.objectives import Distil
from llmkit.recipe.schema import EvalDuring, Finetune, Model, Pretrain, Recipe, Train, Tuning
from llmkit.recipe.training import Rounded
from llmkit.registry import OBJECTIVES
from llmkit.report.console import Reporter
from llmkit.run.compression.material import Material
from llmkit.run.finetune import finetune
from llmkit.run.folders import Options
from llmkit.run.pretrain import pretrain


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
    loaded = _loaded(material)
    recipe, home = loaded.recipe, folder.parent.parent
    free = recipe.machine.model_copy(update={"micro_batch": "auto"})  # another batch may not be a multiple
    name, verb = home.relative_to(options.runs), folder.relative_to(home)
    given = replace(options, fresh=False, self_check=False)
    tuned = recipe.finetune
    if tuned is not None and tuned.task not in OBJECTIVES:
        section: Pretrain | Finetune = tuned.model_copy(
            update=_tuning(tuned, start, _kept(settings.train, step, sparse=sparse), settings, material)
        )
        made = recipe.model_copy(
            update={"name": str(name), "finetune": section, "pretrain": None, "machine": free}
        )
        finetune(replace(loaded, recipe=made), given, reporter, verb=str(verb))
    else:
        assert recipe.pretrain is not None
        section = recipe.pretrain.model_copy(
            update=_training(
                recipe.pretrain, start, _kept(settings.train, step, sparse=sparse), settings, material
            )
        )
        made = recipe.model_copy(
            update={"name": str(name), "pretrain": section, "finetune": None, "machine": free}
        )
        pretrain(replace(loaded, recipe=made), given, reporter, verb=str(verb))
    return folder / "model"


def _loaded(material: Material) -> Loaded:
    """The recipe of the model's run; of another model, one that trains it on the text that the section names."""
    subject, section = material.subject, material.section
    if subject.trained is not None and section.learn is None:
        return subject.trained
    if subject.trained is not None:
        return replace(subject.trained, recipe=_with_data(subject.trained.recipe, material))
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
    return load_recipe(made)


def _with_data(recipe: Recipe, material: Material) -> Recipe:
    """The recipe with the data that the section names instead of its own."""
    learn = material.section.learn
    assert learn is not None
    if recipe.finetune is not None and recipe.finetune.task not in OBJECTIVES:
        tuned = recipe.finetune
        (source,) = learn
        data = tuned.data.model_copy(update={"files": source.files, "dataset": source.dataset})
        return recipe.model_copy(update={"finetune": tuned.model_copy(update={"data": data})})
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


def _training(
    section: Pretrain, start: Path, train: dict[str, Any], settings: Recover, material: Material
) -> dict[str, Any]:
    distil = _taught(settings, material)
    model = Model(
        preset=None,
        name=str(start),
        context=section.model.context,
        trust_remote_code=section.model.trust_remote_code,
    )
    return {
        "model": model,
        "train": Train.model_construct(**train),
        "distil": distil,
        "eval": EvalDuring(),
        "prompts": [],
    }


def _tuning(
    section: Finetune, start: Path, train: dict[str, Any], settings: Recover, material: Material
) -> dict[str, Any]:
    model = section.model.model_copy(update={"name": str(start)})
    none = dict.fromkeys(("adapter", "freeze", "unfreeze", "lr_decay", "stop_early"))
    return {
        "model": model,
        "train": Tuning.model_construct(**train),
        "distil": _taught(settings, material),
        "prompts": [],
        **none,
    }


def _taught(settings: Recover, material: Material) -> Distil | None:
    if settings.distil is None:
        return None
    return Distil(teacher=str(material.subject.place.absolute()), **settings.distil.model_dump())
