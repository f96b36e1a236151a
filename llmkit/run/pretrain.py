"""`llmkit pretrain`: prepare the data once, plan, then train here or in worker processes."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import remove_file, remove_folder, verify_folder, write_file, write_json
from llmkit.errors import (
    CorruptError,
    CtrlCError,
    ExitCode,
    InterruptedRunError,
    LlmkitError,
    RecipeError,
    RunError,
    UsageError,
)
from llmkit.hardware import detect_hardware, usable_cores
from llmkit.launch.local import run_local_workers
from llmkit.launch.world import World, check_world, detect_world
from llmkit.plan import Plan, layout_of
from llmkit.plan.counted import is_counted
from llmkit.recipe import Loaded, resolved_yaml
from llmkit.recipe.objectives import RowLayout, other_sections
from llmkit.recipe.resolved import without_secrets
from llmkit.recipe.schema import Optim, Pretrain, Recipe, tokenize_of
from llmkit.registry import goal_of
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.report.trying import try_command
from llmkit.run.folders import Options, Result, anchored, leave_record, locked, report_of, run_folder
from llmkit.run.planning import plan as plan_ahead
from llmkit.run.planning import plan_run
from llmkit.run.tokenize import corpora, find_tokenizer
from llmkit.train.places import check_teacher, teacher_weights
from llmkit.train.steps import saved_steps

if TYPE_CHECKING:
    from llmkit.data.corpus import Corpus
    from llmkit.data.shards import TokenShards
    from llmkit.train.job import Job

KILL_AT = "LLMKIT_KILL_AT"
"""The environment's word for `Job.kill_at`: a crash on purpose, for `llmkit verify-resume`."""

_UNLIKE = object()
_MADE_BY_TRAINING = ("checkpoints", "model", "metrics.jsonl", "samples.jsonl", "plan.json", "report.json")


def pretrain(loaded: Loaded, options: Options, reporter: Reporter) -> Result:
    """Train the recipe's model, going on from the newest checkpoint; when it is trained already, say so.

    Raises:
        UsageError: The recipe has no `pretrain` section, or its numbers do not fit together.
        InterruptedRunError: A signal stopped it; the same command goes on.
        RunError: It failed; the newest checkpoint is whole.
    """
    recipe = loaded.recipe
    if recipe.pretrain is None:
        raise UsageError("the recipe has no `pretrain` section", hint="`llmkit init gpt` shows one")
    folder = run_folder(loaded, options, "pretrain")
    world = detect_world(os.environ)
    if recipe.pretrain.distil is not None:
        check_teacher(recipe.pretrain.distil.teacher, recipe.pretrain.objective)
    if world is None:
        plan_ahead(loaded, options)  # what cannot fit is told before anything is read
    first = world is None or world.rank == 0
    with locked(folder, world):
        if options.fresh and first:
            _clear(folder)
        job, shards = _prepare(loaded, options, reporter, folder, world)
        if _is_trained(folder, job):
            reporter.note(f"{folder} is trained already; --fresh trains it anew")
        else:
            _refuse_another_run(folder, job)
            if first:
                _leave_plan(folder, loaded, job, shards, reporter)
            try:
                _train(job, reporter, world, options.restarts)
            except LlmkitError as error:
                if first:
                    _report_end(folder, options, error)
                raise
    report = report_of(folder)
    summary = {
        "model": str(folder / "model"),
        "metrics": report["final"],
        "headline": report["headline"],
        "report": str(folder / "report.html"),
    }
    kind = goal_of(recipe.pretrain.objective).model
    return Result(folder, summary, try_command(kind, str(folder.parent), recipe.pretrain.prompts))


def _prepare(
    loaded: Loaded, options: Options, reporter: Reporter, folder: Path, world: World | None
) -> "tuple[Job, list[TokenShards]]":
    """Everything decided: tokenizer, shards, plan, identity. Nothing in the run folder is touched."""
    from llmkit.data.prepare import data_facts
    from llmkit.data.tokenizers import fingerprint, load_tokenizer
    from llmkit.train.job import Job

    # Starting training over does not mean reading the text again.
    text, text_for_tokenizer = corpora(loaded, replace(options, fresh=False), reporter)
    name, figures = find_tokenizer(loaded, text_for_tokenizer, reporter)
    tokenizer = load_tokenizer(name)
    shards = text.shards(tokenizer)
    hardware = detect_hardware(loaded.recipe.machine)
    facts = data_facts(shards)
    plan = plan_run(
        loaded,
        options,
        hardware,
        facts,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        world=world,
    )
    plan = _as_begun(plan, folder, loaded)
    if world is not None:
        check_world(world, plan.world_size)
    assert loaded.recipe.pretrain is not None
    weights = _weights(text, shards, plan, layout_of(loaded.recipe.pretrain), reporter)
    job = Job(
        recipe=without_secrets(loaded),
        plan=plan.to_dict(),
        folder=str(folder),
        tokenizer=name,
        tokenizer_figures=figures,
        shards=[str(shard.folder) for shard in shards],
        weights=weights,
        identity=_identity(loaded, plan, fingerprint(tokenizer), shards, weights, _begun(folder)),
        command=options.command,
        face={"json": options.json, "quiet": options.quiet},
        deadline=options.deadline,
        self_check=options.self_check,
        kill_at=int(os.environ[KILL_AT]) if KILL_AT in os.environ else None,
    )
    return job, shards


def _weights(
    text: "Corpus", shards: "Sequence[TokenShards]", plan: Plan, layout: RowLayout, reporter: Reporter
) -> list[float] | None:
    """The sources' weights, lowered where a source would be read more than `max_epochs` times over.

    What they come to is told: each source's share of the rows, and how often it is read.

    Raises:
        RecipeError: The sources have too little text for that, or the run's length cannot be counted.
    """
    from llmkit.data.order import capped_weights
    from llmkit.data.rows import Rows

    caps = [source.max_epochs for source in text.sources]
    weights = text.weights
    if weights is None:
        return None
    if plan.num_steps is None and any(caps):
        raise RecipeError(
            "`max_epochs` needs a run whose rows can be counted beforehand",
            hint="give `train.length` in tokens, steps or epochs",
        )
    if plan.num_steps is None:
        return weights
    sizes = Rows([shard.split("train") for shard in shards], layout.stride, overlap=layout.overlap).sizes
    rows = plan.num_steps * plan.rows_per_step
    if any(caps):
        weights = capped_weights(sizes, weights, caps, rows)
    for shard, size, weight in zip(shards, sizes, weights, strict=True):
        share = weight / sum(weights)
        reporter.note(f"{shard.name}: {share:.1%} of the rows, read {share * rows / size:.3g} times over")
    return weights


def _leave_plan(
    folder: Path, loaded: Loaded, job: "Job", shards: "Sequence[TokenShards]", reporter: Reporter
) -> None:
    """Leave what was decided in the run folder: only now, when it is known to be this run's."""
    from llmkit.data.prepare import data_card, publish_tokenizer

    plan = job.checked_plan()
    leave_record(folder, loaded)
    if "found" in job.tokenizer_figures:  # made by this recipe
        publish_tokenizer(Path(job.tokenizer), folder.parent / "tokenize" / "tokenizer")
    write_json(folder / "data.json", data_card(shards))
    write_json(folder / "plan.json", plan.to_dict())
    write_file(folder / "resolved.yaml", resolved_yaml(anchored(loaded), plan.choices))
    for note in plan.notes:
        reporter.note(note)
    _warn_of_full_disk(folder, job, plan, reporter)


def _warn_of_full_disk(folder: Path, job: "Job", plan: Plan, reporter: Reporter) -> None:
    """Say before the first step when the checkpoints to keep, the next one and the model will not fit."""
    more = max(0, job.section().checkpoint.keep + 1 - len(saved_steps(folder / "checkpoints")))
    needed = more * plan.checkpoint_bytes + 4 * plan.num_parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        reporter.warn(
            f"{folder}: {free / 1e6:,.0f} MB are free on this disk, and checkpoints and model will take about "
            f"{needed / 1e6:,.0f} MB: free some space, or choose another place with --runs"
        )


def _train(job: "Job", reporter: Reporter, world: World | None, restarts: int) -> None:
    """Train here when this process is a worker or the only one; else start the workers and watch them."""
    if is_counted(job.section().model):
        from llmkit.train.ngram import count

        count(job, reporter)
        return
    world_size = job.plan["world_size"]
    if world is not None and restarts:
        raise UsageError(
            f"--restarts is for processes that llmkit starts, and these were started by {world.source}",
            hint="let that start them again; the same command goes on from the newest checkpoint",
        )
    if world is not None or (world_size == 1 and not restarts):
        from llmkit.train.pretrain import pretrain as train_here

        if world is not None:
            os.environ.update(world.environment())
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // world.local_world_size)))
            if world.source != "llmkit" and world.rank == 0:
                place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                reporter.note(f"meeting {world.world_size - 1} other processes at {place}")
        train_here(job, reporter)
        return
    path = Path(job.folder) / "job.json"
    job.save(path)
    reporter.note(f"starting {world_size} process{'es' if world_size > 1 else ''}")
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        sys.stderr.write(line + "\n")

    code = run_local_workers(
        world_size,
        [str(path)],
        logs=Path(job.folder) / "logs",
        program=[sys.executable, "-P", "-m", "llmkit.train.worker"],
        on_line=tell,
        restarts=restarts,
        progress=lambda: _newest_step(Path(job.folder)),
    )
    _raise_for(code, job.folder, [line for line in said if line.startswith("worker ")])


def _newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max(saved_steps(folder / "checkpoints"), default=0)


def _report_end(folder: Path, options: Options, error: LlmkitError) -> None:
    """A report of a run that did not reach its end: what there is up to now, and why it stopped."""
    status = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
    facts = {"kind": "pretrain", "status": status, "command": options.command, "error": error.message}
    with suppress(RunError):  # such as a full disk: the error that ended the run is the one to tell
        write_report(folder, facts)


def _raise_for(code: int, folder: str, deaths: Sequence[str]) -> None:
    """Turn the workers' exit code, and what was seen of their deaths, into the error that ends this process so."""
    if code == ExitCode.DONE:
        return
    if code in (ExitCode.INTERRUPTED, ExitCode.CTRL_C):
        kind = CtrlCError if code == ExitCode.CTRL_C else InterruptedRunError
        raise kind(f"{folder}: stopped; everything is saved", hint="The same command goes on from there.")
    reason = deaths[-1] if deaths else f"a worker failed with exit code {code}"
    newest = _newest_step(Path(folder))
    goes_on = f"the same command goes on from step {newest}" if newest else "nothing was saved yet"
    error = RunError(f"{folder}: {reason}", hint=f"{goes_on}; what the others said is in {folder}/logs")
    error.exit_code = ExitCode(code) if code in list(ExitCode) else ExitCode.FAILED
    raise error


def _as_begun(plan: Plan, folder: Path, loaded: Loaded) -> Plan:
    """The plan with what a run in this folder was begun with, so that going on gives the same numbers.

    That stands in its checkpoints, which are verified; a run that has none yet begins anew with today's numbers.
    What the recipe pins wins. The number of processes may change.
    """
    from llmkit.train.checkpoint import saved_record

    saved = saved_record(folder).get("plan")
    if not saved:
        return plan
    try:
        begun = Plan.from_dict(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder}/checkpoints: not of this version of llmkit ({error})",
            hint="go on with the version that began the run, or start over with --fresh",
        ) from error
    machine = loaded.recipe.machine
    kept: dict[str, Any] = {
        key: getattr(begun, key)
        for key in ("precision", "compile", "attention")
        if getattr(machine, key) == "auto"
    }
    if (plan.num_steps is None or plan.deferred) and begun.length_seconds == plan.length_seconds:
        kept |= {
            key: getattr(begun, key)
            for key in (
                "num_steps",
                "num_epochs",
                "warmup_steps",
                "checkpoint_every",
                "keep_every",
                "eval_every",
                "deferred",
            )
        }
    share = plan.world_size * begun.micro_batch_size
    if machine.micro_batch == "auto" and plan.rows_per_step % share == 0:
        kept["micro_batch_size"] = begun.micro_batch_size
        kept["gradient_accumulation_steps"] = plan.rows_per_step // share
    elif plan.micro_batch_size != begun.micro_batch_size:
        kept["notes"] = (*plan.notes, _other_micro_batches(begun, plan))
    choices = {
        key: begun.choices.get(key, choice) if key.removeprefix("machine.") in kept else choice
        for key, choice in {**plan.choices, **begun.choices}.items()
    }
    return replace(plan, **kept, choices=choices)


def _other_micro_batches(begun: Plan, plan: Plan) -> str:
    return (
        f"micro-batches of {plan.micro_batch_size} rows, where this run began with {begun.micro_batch_size}: a model "
        "with dropout draws other masks from here on; without dropout nothing but rounding changes"
    )


def _identity(
    loaded: Loaded,
    plan: Plan,
    tokenizer: str,
    shards: "Sequence[TokenShards]",
    weights: Sequence[float] | None,
    begun: Mapping[str, Any],
) -> dict[str, Any]:
    """What a resumed run must share with the saved one, by the recipe's own keys.

    A setting that `begun`, the identity of a run in this folder, does not know is left out where it is as it would be
    unwritten: the run was begun before there was such a setting, and nothing has changed.
    """
    recipe = loaded.recipe
    assert recipe.pretrain is not None
    settings = recipe.pretrain.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(
                ("data", "tokenizer", "held_out", "checkpoint", "eval", "prompts", "sampling"), True
            ),
            **dict.fromkeys(other_sections(recipe.pretrain.objective), True),
            "train": {"bad_numbers", "max_skipped"},  # what may have to change to go on after a stop
        },
    )
    made_by = {}
    spec = tokenize_of(recipe)
    if spec is not None and recipe.pretrain.tokenizer is None:
        made_by = spec.model_dump(mode="json", exclude={"data", "held_out"})
    named = {**_flat(settings, "pretrain"), **_flat(made_by, "tokenize")}
    new = _as_unwritten(recipe, named).difference(begun) if begun else ()
    return {
        "seed": recipe.seed,
        **{key: loaded.expressions.get(key, value) for key, value in named.items() if key not in new},
        "rows per step": plan.rows_per_step,
        "text": [[shard.name, shard.folder.name] for shard in shards],
        "weights": weights,
        "tokenizer": tokenizer,
        **_files_of(recipe.pretrain),
    }


def _as_unwritten(recipe: Recipe, named: Mapping[str, Any]) -> set[str]:
    """The keys whose values are those that a setting has where the recipe says nothing."""
    assert recipe.pretrain is not None
    others = recipe.model_dump(mode="json", exclude_defaults=True)
    changed = {key for name in ("pretrain", "tokenize") for key in _flat(others.get(name) or {}, name)}
    optim = recipe.pretrain.train.optim
    own = Optim.model_validate({"name": optim.name, "schedule": optim.schedule}).model_dump(mode="json")
    return {
        key
        for key, value in named.items()
        if key not in changed or own.get(key.removeprefix("pretrain.train.optim."), _UNLIKE) == value
    }


def _begun(folder: Path) -> Mapping[str, Any]:
    """The identity of the run in this folder, by its checkpoints, else by its model; empty where there is none."""
    from llmkit.train.checkpoint import saved_record

    saved: Mapping[str, Any] = saved_record(folder).get("identity", {})
    if saved:
        return saved
    try:
        found: Mapping[str, Any] = verify_folder(folder / "model", only=()).get("identity", {})
    except CorruptError:
        return {}
    return found


def _files_of(section: Pretrain) -> dict[str, str]:
    """What lies in files that the section names beside the text: hashes by what they are."""
    from llmkit.data.vectors import hash_of

    found = {}
    if section.distil is not None:
        found["teacher"] = teacher_weights(section.distil.teacher)
    if section.model.embeddings is not None:
        found["word vectors"] = hash_of(Path(section.model.embeddings))
    return found


def _flat(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}.{key}")
        else:
            flat[f"{prefix}.{key}"] = value
    return flat


def _is_trained(folder: Path, job: "Job") -> bool:
    """Whether the model in the folder is what this job would make.

    Raises:
        RunError: It is another one: the recipe has changed.
    """
    try:
        manifest = verify_folder(folder / "model")
    except CorruptError:
        return False
    from llmkit.train.checkpoint import check_identity

    check_identity(folder, manifest.get("identity", {}), job.identity)
    return report_of(folder).get("status") == "done"


def _refuse_another_run(folder: Path, job: "Job") -> None:
    """Refuse to go on from checkpoints of another recipe, before anything is written over its record.

    Raises:
        RunError: Shows what has changed.
    """
    from llmkit.train.checkpoint import check_identity, saved_record

    saved = saved_record(folder)
    if saved:
        check_identity(folder, saved["identity"], job.identity)


def _clear(folder: Path) -> None:
    """Remove what training made; a kill midway leaves nothing that looks whole."""
    for name in _MADE_BY_TRAINING:
        path = folder / name
        if path.is_dir():
            remove_folder(path)
        else:
            remove_file(path)
