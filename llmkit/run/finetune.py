"""`llmkit finetune`: read the rows once, plan, then train here or in worker processes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import write_file, write_json
from llmkit.errors import LlmkitError, UsageError
from llmkit.hardware import Hardware, detect_elsewhere
from llmkit.launch.world import World, check_world, detect_world
from llmkit.plan import Plan
from llmkit.plan.communication import identity_of, with_communication
from llmkit.plan.tpu import refuse_tuning
from llmkit.recipe import Loaded, resolved_yaml
from llmkit.recipe.resolved import without_secrets
from llmkit.recipe.schema import Finetune, Pretrain, Recipe, Source, Train
from llmkit.recipe.tasks import other_task_sections
from llmkit.registry import OBJECTIVES, TASKS, kind_for
from llmkit.report.console import Reporter
from llmkit.report.trying import try_trained
from llmkit.run.export_check import check_exports, refuse_ahead
from llmkit.run.folders import Options, Result, anchored, leave_record, locked, placed, report_of, run_folder
from llmkit.run.planning import plan as plan_ahead
from llmkit.run.planning import teacher_shape
from llmkit.run.pretrain import pretrain
from llmkit.run.teacher_cache import cache_folder, check_cache
from llmkit.run.training import (
    KILL_AT,
    as_begun,
    clear,
    exported,
    flat,
    for_nodes,
    is_trained,
    refuse_another_run,
    report_end,
    train_job,
    warn_of_full_disk,
)
from llmkit.train.places import check_teacher, model_folder, teacher_weights

if TYPE_CHECKING:
    from llmkit.run.rows import Prepared
    from llmkit.train.job import Job

_NOT_THE_MODEL = (
    "data",
    "validation",
    "tokenizer",
    "checkpoint",
    "eval",
    "prompts",
    "sampling",
    "export_check",
)
_LATER: Mapping[str, Any] = {
    "finetune.distil": None,
    "finetune.distil.cache": None,
    "finetune.dpo.desirable_weight": None,
    "finetune.dpo.undesirable_weight": None,
    "finetune.loss.mixup": 0.0,
    "finetune.train.keep_zeros": False,
    "finetune.train.quantized": None,
}
"""Settings that came later, as they are unwritten."""


def finetune(loaded: Loaded, options: Options, reporter: Reporter, *, verb: str = "finetune") -> Result:
    """Train a model for a task, going on from the newest checkpoint; when it is trained already, say so.

    Raises:
        UsageError: The recipe has no `finetune` section, or its parts do not fit together.
        InterruptedRunError: A signal stopped it; the same command goes on.
        RunError: It failed; the newest checkpoint is whole.
    """
    section = _section_of(loaded)
    loaded = with_base(loaded, options)
    if section.task in OBJECTIVES:
        return pretrain(continued(loaded), options, reporter, verb=verb)
    if section.distil is not None:
        student = str(section.model.name)
        check_teacher(section.distil.teacher, section.task, "finetune", student)  # before any row is read
        check_cache(section.distil, "finetune")
    assert loaded.recipe.finetune is not None
    refuse_ahead(loaded.recipe.finetune, "finetune")
    folder = run_folder(loaded, options, verb)
    world = detect_world(os.environ)
    first = world is None or world.rank == 0
    with locked(folder, world):
        if options.fresh and first:
            clear(folder)
        job = prepare_job(loaded, options, reporter, folder, world)
        if is_trained(folder, job):
            reporter.note(f"{folder} is trained already; --fresh trains it anew")
        else:
            refuse_another_run(folder, job)
            if first:
                check_exports(job, reporter)
                _leave_plan(folder, replace(loaded, recipe=job.checked_recipe()), job, reporter)
            try:
                train_job(
                    job,
                    reporter,
                    world,
                    options,
                    lambda count: prepare_job(*for_nodes(loaded, options, count), reporter, folder, None),
                )
            except LlmkitError as error:
                if first:
                    report_end(folder, options, error)
                raise
    report = report_of(folder)
    reporter.note(f"report: {folder / 'report.html'}")
    summary = {
        "model": str(exported(folder, job)),
        "task": section.task,
        "metrics": report["final"],
        "headline": report["headline"],
        "report": str(folder / "report.html"),
    }
    return Result(folder, summary, try_trained(section.task, str(folder.parent), section.prompts))


def plan_finetune(
    loaded: Loaded, options: Options, reporter: Reporter, hardware: Hardware | None = None
) -> Plan:
    """The plan of fine-tuning: the rows are read and encoded, for their lengths decide it; nothing is written.

    Args:
        loaded: The recipe.
        options: What the command was told.
        reporter: Who is told what is done.
        hardware: What to plan for; by default this machine.

    Raises:
        UsageError: The recipe's parts do not fit together.
    """
    from llmkit.run.back_translate import translators
    from llmkit.run.rows import read_and_measure

    _section_of(loaded)
    loaded = with_base(loaded, options)
    assert loaded.recipe.finetune is not None
    if loaded.recipe.finetune.task in OBJECTIVES:
        return plan_ahead(continued(loaded), options, hardware)
    if hardware is not None:
        refuse_tuning(hardware)
    for step in loaded.recipe.finetune.augment:
        translators(step, options.runs)
    rows = read_and_measure(loaded, options, reporter.note)
    known = replace(loaded, recipe=with_context(loaded.recipe, rows.context))
    return _plan(known, options, rows, None, hardware)


def _section_of(loaded: Loaded) -> Finetune:
    """The recipe's `finetune` section.

    Raises:
        UsageError: There is none.
    """
    if loaded.recipe.finetune is None:
        raise UsageError(
            "the recipe has no `finetune` section",
            hint="llmkit finetune --task cls --model MODEL --data reviews.csv",
        )
    return loaded.recipe.finetune


def with_base(loaded: Loaded, options: Options) -> Loaded:
    """The recipe with the model to start from filled in: what `pretrain` made, where it names none.

    Raises:
        UsageError: It names none, and there is no `pretrain` section.
    """
    loaded = placed(loaded)
    section = loaded.recipe.finetune
    assert section is not None
    if section.model.name is not None:
        return loaded
    if loaded.recipe.pretrain is None:
        raise UsageError(
            "finetune.model: no model to start from",
            hint="finetune.model.name=FOLDER, RUN or a name on the Hub",
        )
    made = str(options.runs / loaded.recipe.name / "pretrain" / "model")
    model = section.model.model_copy(update={"name": made})
    recipe = loaded.recipe.model_copy(update={"finetune": section.model_copy(update={"model": model})})
    return replace(loaded, recipe=recipe)


def continued(loaded: Loaded) -> Loaded:
    """A recipe whose task is an objective on text, as pre-training that goes on from a model."""
    section = loaded.recipe.finetune
    assert section is not None
    given = section.data
    source = Source(
        name=given.name,
        files=given.files,
        dataset=given.dataset,
        split=given.split,
        encoding=given.encoding,
        on_error=given.on_error,
    )
    if "text" in given.columns:
        source = source.model_copy(
            update={"columns": source.columns.model_copy(update={"text": given.columns["text"]})}
        )
    train = Train.model_validate({name: getattr(section.train, name) for name in Train.model_fields})
    goes_on = Pretrain(
        objective=section.task,  # type: ignore[arg-type]
        model=section.model.model_copy(update={"name": model_folder(str(section.model.name))}),
        distil=section.distil,
        tokenizer=section.tokenizer,
        data=[source],
        held_out=section.held_out,
        train=train,
        checkpoint=section.checkpoint,
        eval=section.eval,
        prompts=section.prompts,
        sampling=section.sampling,
        export_check=section.export_check,
    )
    recipe = loaded.recipe.model_copy(update={"pretrain": goes_on, "tokenize": None, "finetune": None})
    return replace(loaded, recipe=recipe)


def prepare_job(
    loaded: Loaded, options: Options, reporter: Reporter, folder: Path, world: World | None
) -> "Job":
    """Everything decided: rows, tokenizer, plan, identity. Nothing in the run folder is touched."""
    from llmkit.run.back_translate import paraphrase
    from llmkit.run.rows import prepare_rows
    from llmkit.train.job import Job

    rows = prepare_rows(loaded, options, reporter)
    loaded = replace(loaded, recipe=with_context(loaded.recipe, rows.context))
    plan = as_begun(_plan(loaded, options, rows, world), folder, loaded)
    section = loaded.recipe.finetune
    assert section is not None
    if world is not None:
        check_world(world, plan.world_size)
    said = paraphrase(section, rows.folder, options, reporter)
    return Job(
        recipe=without_secrets(loaded),
        plan=plan.to_dict(),
        folder=str(folder),
        tokenizer=rows.tokenizer,
        tokenizer_figures={"vocab_size": rows.vocab_size, "taken_from": rows.tokenizer},
        shards=[],
        weights=None,
        identity=_identity(loaded, plan, rows, said),
        command=options.command,
        face={"json": options.json, "quiet": options.quiet},
        deadline=options.deadline,
        self_check=options.self_check,
        kill_at=int(os.environ[KILL_AT]) if KILL_AT in os.environ else None,
        verb="finetune",
        rows=str(rows.folder),
        labels=list(rows.labels),
        paraphrases=[str(place) for place in said],
        teacher_cache=cache_folder(
            section,
            plan,
            options,
            {
                "rows": rows.folder.name,
                "labels": list(rows.labels),
                "language": loaded.recipe.language,
                **_paraphrased(said),
            },
            loaded.recipe.seed,
        ),
    )


def _plan(
    loaded: Loaded,
    options: Options,
    rows: "Prepared",
    world: World | None,
    hardware: Hardware | None = None,
) -> Plan:
    from llmkit.models.count import shape_of_model
    from llmkit.models.growing import grow_vocabulary
    from llmkit.models.tasks import empty_task_model
    from llmkit.objectives.mixing import check_mixable
    from llmkit.plan.tuning import plan_tuning
    from llmkit.train.learning import check_device, count_ahead, told

    recipe = loaded.recipe
    assert recipe.finetune is not None
    section = recipe.finetune
    goal = TASKS[section.task]
    hardware = hardware or detect_elsewhere(recipe.machine, "finetune")
    check_device(section.adapter, hardware.device)
    folder = model_folder(str(section.model.name))
    model = empty_task_model(
        folder,
        kind_for(section.task, rows.facts),
        labels=rows.labels,
        number=section.task == "regression",
        trusted=section.model.trust_remote_code,
    )
    if section.loss.mixup:
        check_mixable(model, folder)
    if rows.new_tokens:
        grow_vocabulary(model, rows.vocab_size, rows.new_tokens)
    shape = shape_of_model(model)
    counts = count_ahead(model, section, folder)
    learning = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    plan = plan_tuning(
        recipe,
        hardware,
        rows.facts,
        vocab_size=rows.vocab_size,
        model=shape,
        packed=goal.packs and section.sft.pack,
        num_trained=counts.trained,
        world_size=world.world_size if world else options.processes,
        teacher=teacher_shape(section.distil),
        shapes=learning,
    )
    plan = with_communication(plan, recipe.machine.communication, section, shapes=learning)
    return replace(plan, notes=(*plan.notes, *told(model, section, plan, counts)))


def with_context(recipe: Recipe, context: int) -> Recipe:
    """The recipe with the tokens that its model reads at most."""
    section = recipe.finetune
    assert section is not None
    model = section.model.model_copy(update={"context": context})
    return recipe.model_copy(update={"finetune": section.model_copy(update={"model": model})})


def _paraphrased(said: Sequence[Path]) -> dict[str, Any]:
    return {"paraphrases": [place.name for place in said]} if said else {}


def _identity(loaded: Loaded, plan: Plan, rows: "Prepared", said: Sequence[Path]) -> dict[str, Any]:
    """What a resumed run must share with the saved one, by the recipe's own keys."""
    from llmkit.data.augment.thesaurus import fingerprint as thesauri

    section = loaded.recipe.finetune
    assert isinstance(section, Finetune)
    settings = section.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys((*_NOT_THE_MODEL, *other_task_sections(section.task)), True),
            "train": {"bad_numbers", "max_skipped"},
            "adapter": {
                "merge",
                "max_kl",
                "start",
            },  # how it is exported; what it begins with counts, not where
        },
    )
    named = flat(settings, "finetune") | _stopping(section)
    del named["finetune.model.name"]  # its weights count, wherever they lie
    named.pop("finetune.distil.teacher", None)
    for step in named["finetune.augment"]:
        del step["through"]  # what the runs write counts, wherever they lie
    for key, unwritten in _LATER.items():  # a run that was begun before there were such settings goes on
        if key in named and named[key] == unwritten:
            del named[key]
    expressions: Mapping[str, str] = loaded.expressions
    return {
        "seed": loaded.recipe.seed,
        **{key: expressions.get(key, value) for key, value in named.items()},
        **identity_of(loaded.recipe.machine.communication),
        "finetune.model.context": rows.context,
        "rows per step": plan.rows_per_step,
        "rows": rows.folder.name,
        "labels": list(rows.labels),
        "weights of the model": teacher_weights(str(section.model.name)),
        **({"weights of the teacher": teacher_weights(section.distil.teacher)} if section.distil else {}),
        **_files(section),
        **_paraphrased(said),
        **({"thesauri": thesauri(section.augment)} if section.augment else {}),
    }


def _stopping(section: Finetune) -> dict[str, Any]:
    """What decides when a run stops early and what it exports then."""
    from llmkit.train.early import best_metric

    if section.stop_early is None:
        return {}
    settings = {"eval": section.eval.model_dump(mode="json", include={"every", "rows"})}
    return {**flat(settings, "finetune"), "finetune.stop_early.metric": best_metric(section)}


def _files(section: Finetune) -> dict[str, str]:
    """Hashes of files that a run also follows from."""
    from llmkit.models.adapter_files import hash_adapter
    from llmkit.objectives.losses import hash_code

    found: dict[str, str] = {}
    if section.adapter is not None and section.adapter.start is not None:
        found["adapter to start from"] = hash_adapter(Path(section.adapter.start))
    if section.loss.custom is not None:
        found["code of the loss"] = hash_code(section.loss)
    return found


def _leave_plan(folder: Path, loaded: Loaded, job: "Job", reporter: Reporter) -> None:
    """Leave what was decided in the run folder: only now, when it is known to be this run's."""
    plan = job.checked_plan()
    leave_record(folder, loaded)
    write_json(folder / "data.json", {**plan.rows, "address": Path(job.rows).name})
    write_json(folder / "plan.json", plan.to_dict())
    write_file(folder / "resolved.yaml", resolved_yaml(anchored(loaded), plan.choices))
    for note in plan.notes:
        reporter.note(note)
    warn_of_full_disk(folder, job, plan, reporter)
