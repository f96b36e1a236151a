"""What the verbs that train share: go on or begin anew, here or in worker processes, and say how it ended."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import remove_file, remove_folder, verify_folder, write_json
from llmkit.errors import (
    CorruptError,
    CtrlCError,
    ExitCode,
    InterruptedRunError,
    LlmkitError,
    RunError,
    UsageError,
)
from llmkit.hardware import usable_cores
from llmkit.hardware.tpu import query_tpus
from llmkit.launch.hub import Hub, Work
from llmkit.launch.local import WORKER, run_local_workers
from llmkit.launch.tpu import launch_environment
from llmkit.launch.world import World, check_world
from llmkit.plan import Plan
from llmkit.plan.communication import told_change
from llmkit.plan.counted import is_counted
from llmkit.recipe import Loaded
from llmkit.recipe.schema import Finetune
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.run.folders import Options, report_of
from llmkit.train.steps import saved_steps

if TYPE_CHECKING:
    from llmkit.train.job import Job

KILL_AT = "LLMKIT_KILL_AT"
"""The environment's word for `Job.kill_at`: a crash on purpose, for `llmkit verify-resume`."""

_MADE_BY_TRAINING = (
    "checkpoints",
    "model",
    "adapter",
    "metrics.jsonl",
    "samples.jsonl",
    "plan.json",
    "report.json",
)


def train_job(
    job: "Job", reporter: Reporter, world: World | None, options: Options, planned_for: Callable[[int], "Job"]
) -> None:
    """Train here when this process is a worker or the only one; else start the workers and watch them.

    Args:
        job: What is done.
        reporter: Told what happens.
        world: The world that another launcher has set up.
        options: As for every verb.
        planned_for: The job again for another number of nodes, where one has gone for good.

    Raises:
        RunError: It failed; the newest checkpoint is whole.
    """
    restarts = options.restarts
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
    placed = _environment_of_chips(job, world, options)
    if options.hub is not None:
        _train_on_nodes(job, reporter, options, options.hub, planned_for)
        return
    if world is not None or (world_size == 1 and not restarts):
        os.environ.update(placed)
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
        program=WORKER,
        env={**os.environ, **placed},
        on_line=tell,
        restarts=restarts,
        progress=lambda: _newest_step(Path(job.folder)),
    )
    _raise_for(code, job.folder, [line for line in said if line.startswith("worker ")])


def _environment_of_chips(job: "Job", world: World | None, options: Options) -> dict[str, str]:
    """What processes on TPU chips must find; nothing on other devices, or where another launcher has said it.

    Raises:
        UsageError: There are several machines, whose chips are told by Google's own environment.
    """
    if job.plan["device"] != "tpu" or world is not None:
        return {}
    if options.hub is not None:
        raise UsageError(
            "--nodes: which chips a machine of a TPU slice has is not told to workers by llmkit",
            hint="on each machine put what `python -m torch.tpu.distributed` prints into the environment, and start "
            "this command under torchrun",
        )
    chips = query_tpus()
    return launch_environment(chips.kind if chips is not None else "", job.plan["world_size"], os.environ)


def _train_on_nodes(
    job: "Job", reporter: Reporter, options: Options, hub: Hub, planned_for: Callable[[int], "Job"]
) -> None:
    """Start workers on all nodes and watch them; after a restart with fewer or more nodes by a plan for these."""
    folder = Path(job.folder).absolute()
    path = folder / "job.json"

    def argv(count: int) -> Sequence[str]:
        size, now = count * hub.per_node, job
        if size != job.plan["world_size"]:
            now = planned_for(count)
            check_world(World(0, size, 0, hub.per_node, "llmkit"), now.plan["world_size"])
            write_json(folder / "plan.json", now.plan)
        now.save(path)
        reporter.note(
            f"starting {size} process{'es' if size > 1 else ''} on {count} of {hub.node.most} nodes"
        )
        return [str(path)]

    ending = hub.run(
        Work(
            argv,
            WORKER,
            folder / "logs",
            restarts=options.restarts,
            progress=lambda: _newest_step(folder),
            deadline=options.deadline,
        )
    )
    _raise_for(ending.code, job.folder, [ending.reason] if ending.reason else [])


def for_nodes(loaded: Loaded, options: Options, count: int) -> tuple[Loaded, Options]:
    """Recipe and options for so many of the nodes that were asked for."""
    assert options.hub is not None
    machine = loaded.recipe.machine.model_copy(update={"nodes": count})
    recipe = loaded.recipe.model_copy(update={"machine": machine})
    return replace(loaded, recipe=recipe), replace(options, processes=count * options.hub.per_node)


def _newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max(saved_steps(folder / "checkpoints"), default=0)


def report_end(folder: Path, options: Options, error: LlmkitError) -> None:
    """A report of a run that did not reach its end: what there is up to now, and why it stopped."""
    status = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
    facts = {"kind": folder.name, "status": status, "command": options.command, "error": error.message}
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


def as_begun(plan: Plan, folder: Path, loaded: Loaded) -> Plan:
    """The plan with what a run in this folder was begun with, so that going on gives the same numbers.

    That stands in its checkpoints, which are verified; a run that has none yet begins anew with today's numbers.
    What the recipe pins wins. The number of processes may change.
    """
    from llmkit.train.checkpoint import saved_record
    from llmkit.train.trial import rows_of, with_rows

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
    share = plan.layout.data_size * begun.micro_batch_size
    # Of rows of many lengths, how many are computed at a time follows from their tokens.
    divides = begun.micro_batch_tokens if plan.micro_batch_tokens else plan.rows_per_step % share == 0
    settings = set(kept)
    if machine.micro_batch == "auto" and divides:
        rows = rows_of(begun)
        choices = {**plan.choices, "machine.micro_batch": (rows, "as this run began")}
        plan = replace(with_rows(plan, rows), choices=choices)
        settings.add("micro_batch")
    elif not plan.micro_batch_tokens and plan.micro_batch_size != begun.micro_batch_size:
        kept["notes"] = (*plan.notes, _other_micro_batches(begun, plan))
    other_words = told_change(begun, plan)
    if other_words:
        kept["notes"] = (*kept.get("notes", plan.notes), other_words)
    begun_with = {
        key: choice for key, choice in begun.choices.items() if key.removeprefix("machine.") in settings
    }
    return replace(plan, **kept, choices={**plan.choices, **begun_with})


def _other_micro_batches(begun: Plan, plan: Plan) -> str:
    return (
        f"micro-batches of {plan.micro_batch_size} rows, where this run began with {begun.micro_batch_size}: a model "
        "with dropout draws other masks from here on; without dropout nothing but rounding changes"
    )


def begun_identity(folder: Path) -> Mapping[str, Any]:
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


def flat(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}.{key}")
        else:
            found[f"{prefix}.{key}"] = value
    return found


def exported(folder: Path, job: "Job") -> Path:
    """Where the model that a job makes goes; an adapter that is not merged stands alone."""
    section = job.section()
    alone = isinstance(section, Finetune) and section.adapter is not None and not section.adapter.merge
    return folder / ("adapter" if alone else "model")


def is_trained(folder: Path, job: "Job") -> bool:
    """Whether the folder has what this job would make.

    Raises:
        RunError: It is another one: the recipe has changed.
    """
    try:
        manifest = verify_folder(exported(folder, job))
    except CorruptError:
        return False
    from llmkit.train.checkpoint import check_identity

    check_identity(folder, manifest.get("identity", {}), job.identity)
    return report_of(folder).get("status") == "done"


def refuse_another_run(folder: Path, job: "Job") -> None:
    """Refuse to go on from checkpoints of another recipe, before anything is written over its record.

    Raises:
        RunError: Shows what has changed.
    """
    from llmkit.train.checkpoint import check_identity, saved_record

    saved = saved_record(folder)
    if saved:
        check_identity(folder, saved["identity"], job.identity)


def clear(folder: Path) -> None:
    """Remove what training made; a kill midway leaves nothing that looks whole."""
    for name in _MADE_BY_TRAINING:
        path = folder / name
        if path.is_dir():
            remove_folder(path)
        else:
            remove_file(path)


def warn_of_full_disk(folder: Path, job: "Job", plan: Plan, reporter: Reporter) -> None:
    """Say before the first step when the checkpoints to keep, the next one and the model will not fit."""
    there = len(saved_steps(folder / "checkpoints")) * plan.checkpoint_bytes
    needed = max(0, plan.disk_bytes.get("checkpoints", 0) - there) + plan.disk_bytes.get("model", 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        reporter.warn(
            f"{folder}: {free / 1e6:,.0f} MB are free on this disk, and checkpoints and model will take about "
            f"{needed / 1e6:,.0f} MB: free some space, or choose another place with --runs"
        )
