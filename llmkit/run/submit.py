"""`llmkit submit`: a recipe's stages as jobs of Slurm, each after the one before it.

What is decided here stands in the scripts in the run's folder, `submit/`, beside the list of jobs that were sent
(`jobs.json`), by which `llmkit runs` asks Slurm for their state.
"""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llmkit
from llmkit.durable import make_folders, one_at_a_time, write_file, write_json
from llmkit.errors import RunError, UsageError
from llmkit.launch import slurm
from llmkit.launch.local import finding_our_code
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.space import Axis, parse_axes
from llmkit.run.submit_plan import ASSUMED, Wanted, lead_of, plans_of, refuse_short

FOLDER = "submit"
JOBS = "jobs.json"
STAGES = ("tokenize", "pretrain", "finetune", "eval", "compress")
"""The sections of a recipe that are jobs, in order."""
TIMED = ("pretrain", "finetune", "run")
"""The commands that train: they take nodes, processes and `--max-time`."""
CORES_PER_GPU = 4
MOST_TASKS = 1000


@dataclass(frozen=True)
class Submission:
    """What is to be sent.

    Attributes:
        folder: The run's folder.
        jobs: By stage, in order; each begins when the one before it has ended well.
        notes: Remarks that a person should see.
    """

    folder: Path
    jobs: Mapping[str, slurm.Job]
    notes: tuple[str, ...] = ()

    def scripts(self) -> dict[str, str]:
        """The scripts by stage."""
        return {stage: slurm.script_of(job) for stage, job in self.jobs.items()}


def prepare(wanted: Wanted) -> Submission:
    """Decide all jobs; nothing is written, and Slurm is not asked.

    Raises:
        RecipeError: The recipe is wrong.
        UsageError: What is asked for does not fit together, or the time limit is too short to save.
    """
    if wanted.recipe == "-":
        raise UsageError(
            "a job cannot read a recipe from stdin", hint="save it to a file: llmkit submit my.yaml"
        )
    axes, words = _axes(wanted.words)
    loaded = load_recipe(
        wanted.recipe, overrides=[*words, *(_first(axis) for axis in axes)], smoke=wanted.smoke
    )
    folder = wanted.runs.absolute() / loaded.recipe.name
    stages = _stages(loaded, wanted, is_array=bool(axes or loaded.variants))
    found = [plan for one in loaded.variants.values() or (loaded,) for plan in plans_of(one, wanted)]
    notes: list[str] = []
    if wanted.gpus and wanted.device is None and found:
        notes.append(f"planned as if the GPUs were {ASSUMED}; --on NAME says which they are")
    if any(_is_alone(place) for place in (folder, Path.cwd())):
        notes.append(f"{folder} seems to be on this machine alone; all nodes must see it at this path")
    lead_s = (
        wanted.lead_s
        if wanted.lead_s is not None
        else max((lead_of(plan) for plan in found), default=lead_of(None))
    )
    refuse_short(wanted, lead_s, found)
    tasks = _tasks(loaded, axes, folder)
    jobs = {stage: _job(stage, wanted, loaded, words, tasks, lead_s) for stage in stages}
    return Submission(folder, jobs, tuple(notes))


def _axes(words: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Words with several values, which make an array, and the others.

    Raises:
        UsageError: A range: what of it is tried depends on what was found.
    """
    if not any("|" in word or ".." in word.partition("=")[2] for word in words):
        return [], list(words)
    axes, others = parse_axes(words)
    ranges = [axis.key for axis in axes if not axis.values]
    if ranges:
        raise UsageError(
            f"{ranges[0]}: the jobs of an array cannot tell each other what they found in a range",
            hint=f"name the values: {ranges[0]}='1|2|3'; or let one job search: llmkit sweep in a script of yours",
        )
    return axes, others


def _first(axis: Axis) -> str:
    return f"{axis.key}={axis.values[0]}"


def _stages(loaded: Loaded, wanted: Wanted, *, is_array: bool) -> list[str]:
    """The commands to submit.

    Raises:
        UsageError: The recipe does not have the section, or nothing at all.
    """
    ones = list(loaded.variants.values()) or [loaded]
    held = [stage for stage in STAGES if any(getattr(one.recipe, stage) is not None for one in ones)]
    if not held:
        raise UsageError("the recipe has no section to run", hint="`llmkit init gpt` shows a whole one")
    if wanted.command in (None, "run"):
        return ["run"] if is_array or wanted.command == "run" else held
    if wanted.command not in held:
        raise UsageError(
            f"--command {wanted.command}: the recipe has no such section",
            hint=f"it has {', '.join(held)}; without --command each is a job",
        )
    return [str(wanted.command)]


def _is_alone(place: Path) -> bool:
    """Whether a folder lies where no other machine sees it, as far as the system's mounts tell."""
    import psutil

    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    kinds = [mounts[parent] for parent in (place, *place.parents) if parent in mounts]
    return bool(kinds) and kinds[0] in ("tmpfs", "ramfs", "overlay")


def _tasks(loaded: Loaded, axes: Sequence[Axis], folder: Path) -> tuple[slurm.Task, ...]:
    """One; or one for each variant or combination of values, each with a run of its own.

    Raises:
        UsageError: They are too many.
    """
    if axes and loaded.variants:
        raise UsageError(
            "the recipe has variants, and settings have several values", hint="say which: variant=NAME"
        )
    if loaded.variants:
        return tuple(
            slurm.Task((f"variant={name}",), folder.parent / one.recipe.name)
            for name, one in loaded.variants.items()
        )
    if not axes:
        return (slurm.Task((), folder),)
    combined = list(itertools.product(*(axis.values for axis in axes)))
    if len(combined) > MOST_TASKS:
        raise UsageError(f"{len(combined):,} combinations, and an array has at most {MOST_TASKS:,}")
    width = len(str(len(combined)))
    return tuple(
        slurm.Task(
            (*(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True)), f"name={name}"),
            folder.parent / name,
        )
        for number, values in enumerate(combined, start=1)
        for name in (f"{loaded.recipe.name}/grid-{number:0{width}d}",)
    )


def _job(
    stage: str,
    wanted: Wanted,
    loaded: Loaded,
    words: Sequence[str],
    tasks: tuple[slurm.Task, ...],
    lead_s: int,
) -> slurm.Job:
    trains = stage in TIMED
    gpus = 0 if stage == "tokenize" else wanted.gpus if trains else min(1, wanted.gpus)
    processes = wanted.per_node if trains else 1
    recipe = (
        str(loaded.path.absolute())
        if loaded.path is not None and Path(wanted.recipe).exists()
        else wanted.recipe
    )
    flags = ["--smoke"] if wanted.smoke else []
    flags += [f"--restarts={wanted.restarts}"] if wanted.restarts and trains else []
    settings = dict(loaded.recipe.machine.slurm.arguments) | dict(wanted.settings)
    partition = wanted.partition or loaded.recipe.machine.slurm.partition
    if partition:
        settings = {"partition": partition, **settings}
    number = "%A_%a" if len(tasks) > 1 else "%j"
    name = f"{loaded.recipe.name}-{stage}".replace("/", "-")
    return slurm.Job(
        name=name,
        program=(sys.executable, "-P", "-m", "llmkit"),
        command=(stage, recipe, *words, "--runs", str(wanted.runs.absolute()), *flags),
        tasks=tasks,
        folder=Path.cwd(),
        log=wanted.runs.absolute() / loaded.recipe.name / FOLDER / f"{stage}-{number}.log",
        nodes=wanted.nodes if trains else 1,
        processes=processes,
        gpus=gpus,
        cores=wanted.cores
        or (CORES_PER_GPU if wanted.gpus else 1) * (wanted.per_node if stage == "tokenize" else processes),
        limit_s=wanted.limit_s,
        lead_s=lead_s,
        is_timed=trains,
        start=wanted.start if trains else "node",
        lead_is_told=wanted.lead_s is not None,
        settings=tuple(settings.items()),
        setup=loaded.recipe.machine.slurm.setup,
        env=_environment(),
        comment=f"Made by llmkit {llmkit.__version__}: {wanted.typed}",
    )


def _environment() -> tuple[tuple[str, str], ...]:
    """What a job needs to find this very llmkit; nothing where it is installed."""
    path = finding_our_code({}).get("PYTHONPATH")
    if path is None:
        return ()
    return (("PYTHONPATH", os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))),)


# --- sending them ---------------------------------------------------------------------------------------------


def submit(submission: Submission) -> list[dict[str, Any]]:
    """Write the scripts and send them, each after the one before it; all or none.

    Returns:
        A record of each job: `id`, `stage`, `name`, `script`, `log`, `after`, `tasks`, `submitted`.

    Raises:
        MissingError: This machine has no Slurm.
        RunError: One of them is in the queue already, or Slurm refused; its own words.
    """
    slurm.refuse_without_slurm()
    scripts = submission.scripts()
    folder = submission.folder / FOLDER
    make_folders(folder)
    with one_at_a_time(folder / ".submitting"):
        earlier = recorded(submission.folder)
        _refuse_twice(earlier, submission)
        sent: list[dict[str, Any]] = []
        try:
            for stage, job in submission.jobs.items():
                script = folder / f"{stage}-{len(earlier) + len(sent) + 1:03d}.sbatch"
                write_file(script, scripts[stage])
                after = str(sent[-1]["id"]) if sent else None
                sent.append(_record(stage, job, script, slurm.send(script, after=after), after))
                write_json(folder / JOBS, {"jobs": [*earlier, *sent]})
        except BaseException:
            if sent:  # a chain of which a part is missing would end in nothing
                slurm.cancel([str(one["id"]) for one in sent])
                write_json(folder / JOBS, {"jobs": earlier})
            raise
    return sent


def _record(stage: str, job: slurm.Job, script: Path, number: str, after: str | None) -> dict[str, Any]:
    return {
        "id": number,
        "stage": stage,
        "name": job.name,
        "script": str(script),
        "log": str(job.log).replace("%j", number).replace("%A", number),
        "after": after,
        "tasks": len(job.tasks),
        "nodes": job.nodes,
        "processes": job.nodes * job.processes,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The jobs that were sent for a run, in order; none where there is no list.

    Raises:
        RunError: The list cannot be read.
    """
    path = folder / FOLDER / JOBS
    try:
        jobs = json.loads(path.read_bytes())["jobs"]
        return [dict(one, id=str(one["id"]), name=str(one["name"]), stage=str(one["stage"])) for one in jobs]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: not readable ({error})", hint="remove it; jobs that run are not touched"
        ) from error


def _refuse_twice(earlier: Sequence[Mapping[str, Any]], submission: Submission) -> None:
    """Two jobs for one run folder would stand in each other's way."""
    states = slurm.states_of({str(one["id"]): str(one["name"]) for one in earlier})
    queued = [one for one in earlier if one["id"] in states and states[one["id"]].is_queued]
    if queued:
        numbers = [str(one["id"]) for one in queued]
        first = queued[0]
        raise RunError(
            f"{submission.folder.name}: job {first['id']} ({first['stage']}) is in the queue already: "
            f"{states[first['id']].name}",
            hint=f"wait for it, or {shlex.join(['scancel', *numbers])}",
        )
