"""The runs of a folder: which there are, how far each got, what came of it. Nothing is written, no torch is needed."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from llmkit.durable import lock_holder
from llmkit.errors import MissingError, RunError
from llmkit.launch.slurm import states_of
from llmkit.registry import TASKS, nearest
from llmkit.report.page import inner
from llmkit.report.run_log import METRICS
from llmkit.run.submit import recorded

_MARKS = ("report.json", METRICS, "plan.json", "recipe.yaml", ".lock")
"""A folder that holds one of these was written by a verb."""
LIFE = ("tokenize", "pretrain", "finetune")
"""The verbs that a run's status and figures are told by, in order; evaluations come after them."""
_FIRST_FIGURES = ("bits_per_byte", "perplexity", "loss")
_WORST_FIRST = ("damaged", "failed", "interrupted", "unknown", "done")
_TAIL_BYTES = 2**16


@dataclass(frozen=True)
class Stage:
    """What one verb left in a run's folder.

    Attributes:
        folder: Where.
        name: The folder's own: `pretrain`, `eval`, `eval-1f3c…`.
        status: `done`, `running`, `interrupted`, `failed`, `damaged`, `unknown`.
        report: What `report.json` holds; empty without one.
        last: The newest record of `metrics.jsonl`; empty without one.
        num_steps: How many steps the plan has; None where there is no plan.
        when: When it was last written, in UTC.
        problems: What of it cannot be read, in words.
        said: Who writes there now, or why it has no result.
    """

    folder: Path
    name: str
    status: str
    report: Mapping[str, Any]
    last: Mapping[str, Any]
    num_steps: int | None
    when: datetime
    problems: Sequence[str] = ()
    said: str = ""

    @property
    def step(self) -> int | None:
        """The step that was reached."""
        found = self.last.get("step", inner(self.report, "headline").get("num_steps"))
        return found if isinstance(found, int) else None

    @property
    def seconds(self) -> float | None:
        """How long it took, over all its sessions."""
        told = [self.last.get("elapsed_s"), inner(self.report, "headline").get("seconds")]
        return max((float(value) for value in told if _is_number(value)), default=None)

    @property
    def figures(self) -> dict[str, float]:
        """What was measured in the end, without the `eval/` in front; of a run that goes on, what it last measured."""
        if self.report.get("kind") == "sweep":
            return _found_by_sweep(self.report)
        final = inner(self.report, "final")
        held = final if self.status == "done" else {**final, **self.last}
        return {
            name.removeprefix("eval/"): float(value)
            for name, value in held.items()
            if name.startswith("eval/") and _is_number(value)
        }

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% intervals of the figures that have one."""
        metrics = inner(self.report, "figures")
        return {
            name: (float(one["low"]), float(one["high"]))
            for name, one in metrics.items()
            if isinstance(one, Mapping) and _is_number(one.get("low")) and _is_number(one.get("high"))
        }

    @property
    def task(self) -> str:
        """What the model was trained for or asked; empty where that is not known."""
        return str(self.report.get("task") or inner(self.report, "data").get("task") or "")

    @property
    def best(self) -> str:
        """The figure that tells a better model; empty where nothing was measured."""
        task, figures = self.task, self.figures
        wanted = [
            str(self.report.get("best")),
            *([TASKS[task].best] if task in TASKS else ()),
            *_FIRST_FIGURES,
        ]
        return next((name for name in wanted if name in figures), next(iter(figures), ""))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "status": self.status,
            "step": self.step,
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "when": self.when.isoformat(timespec="seconds"),
            "best": self.best or None,
            "figures": self.figures,
            "said": self.said,
        }


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: As it is typed after `llmkit eval`.
        folder: Where it is.
        stages: What the verbs left, in the order of a run's life.
        runs: Runs inside: variants of its recipe, trials of a sweep.
        jobs: What Slurm says of the jobs that `llmkit submit` sent for it.
        notes: What is wrong with the list of jobs.
    """

    name: str
    folder: Path
    stages: Sequence[Stage] = ()
    runs: Sequence["Run"] = field(default_factory=tuple)
    jobs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    notes: Sequence[str] = ()

    @property
    def told_by(self) -> Sequence[Stage]:
        """The stages that say how the run is: those that make something, where it has any."""
        return [stage for stage in self.stages if stage.name in LIFE] or self.stages

    @property
    def status(self) -> str:
        """`running` while anything is; else the worst of what it is told by; of an array that of its runs."""
        found = [stage.status for stage in self.stages] or [run.status for run in self.runs]
        if "running" in found:
            return "running"
        told = [stage.status for stage in self.told_by] or found
        return next((status for status in _WORST_FIRST if status in told), "unknown")

    @property
    def when(self) -> datetime:
        """When anything of it was last written."""
        found = [*(stage.when for stage in self.stages), *(run.when for run in self.runs)]
        found += [datetime.fromisoformat(one["submitted"]) for one in self.jobs]
        return max(found, default=datetime.fromtimestamp(0, UTC))

    @property
    def problems(self) -> list[str]:
        """What of it cannot be read."""
        own = [problem for stage in self.stages for problem in stage.problems]
        return [*own, *self.notes] + [problem for run in self.runs for problem in run.problems]

    @property
    def measured(self) -> Stage | None:
        """The stage whose figures stand for the run: what was measured last on what it held out."""
        able = [stage for stage in self.stages if stage.best]
        since = self.trained.when if self.trained else None
        own = [
            stage
            for stage in able
            if stage.name in LIFE or (stage.name == "eval" and (since is None or stage.when >= since))
        ]
        return next(reversed(own or able), None)

    @property
    def trained(self) -> Stage | None:
        """The last stage that made something."""
        return next((stage for stage in reversed(self.stages) if stage.name in LIFE), None)

    @property
    def has_model(self) -> bool:
        """Whether it made a model that is there."""
        return any((stage.folder / "model" / "config.json").is_file() for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """How long its training took, all stages together."""
        known = [stage.seconds for stage in self.told_by if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def loss(self) -> float | None:
        """The held-out loss."""
        found = [stage.figures["loss"] for stage in self.stages if "loss" in stage.figures]
        return found[-1] if found else None

    @property
    def num_parameters(self) -> int | None:
        """How large its model is."""
        for stage in reversed(self.stages):
            for key in ("model", "plan"):
                found = inner(stage.report, key).get("num_parameters")
                if isinstance(found, int):
                    return found
        return None

    @cached_property
    def model_bytes(self) -> int | None:
        """What its newest model takes on the disk."""
        for stage in reversed(self.stages):
            if (place := stage.folder / "model").is_dir():
                return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        measured = self.measured
        name = measured.best if measured else ""
        metric: dict[str, Any] | None = None
        if measured is not None:
            metric = {"name": name, "value": measured.figures[name], "stage": measured.name}
            metric |= dict(zip(("low", "high"), measured.intervals.get(name, ()), strict=False))
        return {
            "name": self.name,
            "folder": str(self.folder),
            "status": self.status,
            "stages": [stage.to_dict() for stage in self.stages],
            "metric": metric,
            "loss": self.loss,
            "num_parameters": self.num_parameters,
            "model_bytes": self.model_bytes,
            "when": self.when.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "damaged": self.problems,
            "jobs": list(self.jobs),
            "runs": [run.to_dict() for run in self.runs],
        }


def find_runs(root: Path) -> list[Run]:
    """The runs in a folder, the newest first; a run's variants and trials are inside it, by name.

    Args:
        root: The folder of run folders. A run's own folder is taken for that run alone.

    Raises:
        MissingError: There is no such folder.
    """
    if not root.is_dir():
        raise MissingError(f"there is no folder {str(root)!r} with runs", hint="train one: llmkit demo")
    if any(map(_is_stage, _folders(root))):
        own = read_run(root, root.name or str(root))
        return [own]
    found = [
        run for place in _folders(root) if (run := read_run(place, place.name)).stages or run.runs or run.jobs
    ]
    return sorted(found, key=lambda run: (run.when, run.name), reverse=True)


def read_run(folder: Path, name: str) -> Run:
    """What is in a run's folder; nothing of it need be there or whole."""
    places = list(_folders(folder))
    stages = [read_stage(place) for place in places if _is_stage(place)]
    inside = [
        read_run(place, f"{name}/{place.name}")
        for place in places
        if not _is_stage(place) and any(map(_is_stage, _folders(place)))
    ]
    jobs, notes = _jobs(folder)
    return Run(name, folder, sorted(stages, key=_by_life), inside, jobs, notes)


def _jobs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The jobs that were sent for a run, and why their list cannot be read."""
    try:
        return recorded(folder), []
    except RunError as error:
        return [], [error.message]


def with_states(runs: Sequence[Run]) -> list[Run]:
    """The runs, each job with what Slurm says of it (`state`, `reason`).

    Slurm is asked once, and only if there are jobs. One that nobody knows any more has no state.
    """
    names = {str(one["id"]): str(one["name"]) for run in runs for one in run.jobs}
    states = states_of(names)

    def told(job: Mapping[str, Any]) -> dict[str, Any]:
        found = states.get(str(job["id"]))
        return {**job, "state": found.name if found else None, "reason": found.reason if found else ""}

    return [replace(run, jobs=[told(one) for one in run.jobs]) for run in runs]


def find_run(word: str, runs: Path) -> Run:
    """The run that a person named: by its name, its folder, or the folder of one of its stages or their models.

    Raises:
        MissingError: There is none; the message holds the nearest names.
    """
    for place in (Path(word), runs / word):
        for folder in (place, place.parent) if place.name == "model" else (place,):
            if _is_stage(folder) and not any(map(_is_stage, _folders(folder))):
                return Run(word, folder.parent, [read_stage(folder)])
            found = read_run(folder, word)
            if found.stages or found.runs:
                return found
    known = [run.name for run in _all(find_runs(runs))] if runs.is_dir() else []
    guess = nearest(word, known)
    listed = f"runs in {runs}: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}"
    hint = f"did you mean {guess!r}?" if guess else listed if known else "train one: llmkit demo"
    raise MissingError(f"no run {word!r}", hint=hint)


def _all(runs: Sequence[Run]) -> Iterator[Run]:
    for run in runs:
        yield run
        yield from _all(run.runs)


def read_stage(folder: Path) -> Stage:
    """What a verb left in its folder; what cannot be read is named and otherwise left out."""
    problems: list[str] = []
    report = _read(folder / "report.json", problems)
    plan = inner(report, "plan") or _read(folder / "plan.json", problems)
    last = _last_record(folder / METRICS, problems)
    holder = lock_holder(folder)
    status, said = _status(report, problems, holder, is_begun=bool(last))
    num_steps = plan.get("num_steps")
    return Stage(
        folder,
        folder.name,
        status,
        report,
        last,
        num_steps if isinstance(num_steps, int) else None,
        _when(folder, report if holder is None else {}),
        problems,
        said,
    )


def _status(
    report: Mapping[str, Any], problems: Sequence[str], holder: str | None, *, is_begun: bool
) -> tuple[str, str]:
    """How a stage is, and what is to be said of it."""
    if holder is not None:
        return "running", holder
    if problems:
        return "damaged", problems[0]
    if not report:
        return "interrupted", "killed before it could say anything" if is_begun else "stopped before it began"
    status = str(
        report.get("status") or ("done" if report.get("kind") in ("sweep", "comparison") else "unknown")
    )
    return status, str(report.get("error") or "")


def _found_by_sweep(report: Mapping[str, Any]) -> dict[str, float]:
    """What the best trial came to."""
    trials = report.get("trials")
    first = trials[0] if isinstance(trials, list) and trials and isinstance(trials[0], Mapping) else {}
    value = first.get("value")
    return {str(report.get("metric")).removeprefix("eval/"): float(value)} if _is_number(value) else {}


def _by_life(stage: Stage) -> tuple[int, datetime, str]:
    """In the order of a run's life: what makes models, then evaluations and the rest by when they were made.

    What was measured on the run's held-out rows (`eval`) comes last of those, for it stands for the run.
    """
    if stage.name in LIFE:
        return LIFE.index(stage.name), stage.when, stage.name
    return len(LIFE) + (stage.name == "eval"), stage.when, stage.name


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def _is_stage(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _MARKS)


def _read(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """A JSON object in a file; empty where there is none, or where it cannot be read, which is noted."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        problems.append(f"{path}: not readable ({error})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path}: not a JSON object")
        return {}
    return found


def _last_record(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """What the newest records say, of each figure the newest; only the file's end is read.

    A last line that is still being written is left out.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path}: not readable ({error})")
        return {}
    whole = [line for line in (lines[1:] if start else lines)[:-1] if line]
    found: dict[str, Any] = {}
    for line in whole:
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}: a line is no JSON ({error})")
            break
        found |= record if isinstance(record, dict) else {}
    return found


def _when(folder: Path, report: Mapping[str, Any]) -> datetime:
    """When a stage was last written: by its report, else by its files' times."""
    try:
        return datetime.fromisoformat(str(report["made"])).astimezone(UTC)
    except (KeyError, ValueError):
        files = [folder / name for name in _MARKS if (folder / name).exists()]
        newest = max((file.stat().st_mtime for file in files), default=0.0)
        return datetime.fromtimestamp(int(newest), UTC)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
