"""In what two runs differ: their recipes, their machines, what was measured of them. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit.recipe.positions import Text
from llmkit.recipe.reading import UnreadableError, read_yaml
from llmkit.registry import FIGURES, lower_is_better
from llmkit.report.page import inner
from llmkit.run.runs import LIFE, Run, Stage

Ends = tuple[float, float]
_KINDS = ("macro_", "micro_", "weighted_")
_MACHINE_ONLY = ("machine.",)
"""Settings that say how the work is done and not what comes of it."""
_NOT_ASKED = ("llmkit", "name")
_SURROUNDINGS = ("python", "platform", "processor", "cores", "memory_bytes", "git_commit")
_PLANNED = (
    *("device", "device_name", "world_size", "precision", "attention", "compile"),
    *("micro_batch_size", "gradient_accumulation_steps"),
)


@dataclass(frozen=True)
class Changed:
    """Something that two runs have differently; None where one does not have it.

    Attributes:
        key: Its dotted name.
        a: In the first run.
        b: In the second.
    """

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Figure:
    """A figure of two runs.

    Attributes:
        stage: Where it was measured: `eval`, `finetune`, ...
        name: The figure, without the `eval/` in front.
        a: Of the first run; None: it was not measured there.
        b: Of the second.
        verdict: How the second is: `better`, `worse`, `same`; empty where that cannot be said.
        a_interval: The 95% interval of the first, where it has one.
        b_interval: That of the second.
    """

    stage: str
    name: str
    a: float | None
    b: float | None
    verdict: str
    a_interval: Ends | None = None
    b_interval: Ends | None = None

    @property
    def overlaps(self) -> bool:
        """Whether the intervals do: then other rows might well have said the opposite."""
        if self.a_interval is None or self.b_interval is None:
            return False
        return self.a_interval[0] <= self.b_interval[1] and self.b_interval[0] <= self.a_interval[1]


@dataclass(frozen=True)
class RunsDiff:
    """In what two runs differ.

    Attributes:
        a: The first run's name.
        b: The second's.
        recipe: Settings that decide what comes of a run.
        machine: Settings that only say how the work is done.
        figures: What was measured, also where it is the same.
        environment: Versions, hardware, and what was planned for it.
        notes: What could not be compared, and why.
    """

    a: str
    b: str
    recipe: Sequence[Changed]
    machine: Sequence[Changed]
    figures: Sequence[Figure]
    environment: Sequence[Changed]
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def diff_runs(one: Run, other: Run) -> RunsDiff:
    """Compare two runs: what was asked for, what was measured, and where.

    Recipes are compared as they ran, with their defaults; of runs of several stages all their sections.
    """
    notes: list[str] = []
    recipes = [recipe_of(run, notes) for run in (one, other)]
    changed = list(_changes(*recipes))
    machine = [pair for pair in changed if pair.key.startswith(_MACHINE_ONLY)]
    alike = {stage.name for stage in one.stages} & {stage.name for stage in other.stages}
    if not alike:
        names = [", ".join(stage.name for stage in run.stages) or "nothing" for run in (one, other)]
        notes.append(f"no stage in common: {one.name} has {names[0]}, {other.name} has {names[1]}")
    figures = []
    for a, b in _pairs(one, other):
        figures += list(_figures(a, b))
        notes += [why] if (why := _alike(a, b)) else []
    return RunsDiff(
        one.name,
        other.name,
        [pair for pair in changed if pair not in machine],
        machine,
        figures,
        list(_changes(_environment(one), _environment(other))),
        [*notes, *one.problems, *other.problems],
    )


def settings_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings in which any of several runs differ from another: `key`, and `values`, one for each run."""
    recipes = [recipe_of(run, []) for run in runs]
    found = [
        {"key": key, "values": [recipe.get(key) for recipe in recipes]}
        for key in dict.fromkeys(key for recipe in recipes for key in recipe)
    ]
    return [one for one in found if any(value != one["values"][0] for value in one["values"])]


def recipe_of(run: Run, notes: list[str]) -> dict[str, Any]:
    """Every setting of a run by dotted key, as its `resolved.yaml` spells them; of a later stage where both have it.

    Args:
        run: The run.
        notes: Takes what cannot be read.
    """
    found: dict[str, Any] = {}
    for stage in run.stages:
        path = next((p for p in _recipes(stage.folder) if p.is_file()), None)
        if path is None:
            continue
        try:
            node, _ = read_yaml(Text(str(path), path.read_text(encoding="utf-8", errors="replace")))
        except UnreadableError as error:
            notes.append(f"{path}: {error}")
            continue
        found |= dict(_flat(node.plain() if node is not None else {}))
    return {key: value for key, value in found.items() if key not in _NOT_ASKED}


def _recipes(folder: Path) -> list[Path]:
    return [folder / "resolved.yaml", folder / "recipe.yaml"]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The settings below a value: down to scalars and lists of them; entries of lists by their name or number."""
    below: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        below = [(str(name), one) for name, one in value.items()]
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        below = [
            (str(one.get("name", number)) if isinstance(one, Mapping) else str(number), one)
            for number, one in enumerate(value)
        ]
    if not below:
        yield key, value
    for name, one in below:
        yield from _flat(one, f"{key}.{name}" if key else name)


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Changed]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield Changed(key, a.get(key), b.get(key))


def _pairs(one: Run, other: Run) -> Iterator[tuple[Stage, Stage]]:
    """The stages that both have; where there is none, those that stand for the runs."""
    theirs = {stage.name: stage for stage in other.stages}
    found = [(stage, theirs[stage.name]) for stage in one.stages if stage.name in theirs]
    if not any(a.figures or b.figures for a, b in found) and one.measured and other.measured:
        found = [(one.measured, other.measured)]
    yield from found


def _figures(a: Stage, b: Stage) -> Iterator[Figure]:
    stage = a.name if a.name == b.name else f"{a.name}, {b.name}"
    judged, tokens = not _alike(a, b), a.report.get("references") == b.report.get("references")
    for name in dict.fromkeys([*a.figures, *b.figures]):
        ours, theirs = a.figures.get(name), b.figures.get(name)
        if not name.startswith("num_"):
            intervals = a.intervals.get(name), b.intervals.get(name)
            # Losses per token compare where the tokens are the same, which the references tell.
            says = judged and (tokens or name not in ("loss", "perplexity"))
            yield Figure(stage, name, ours, theirs, _verdict(name, ours, theirs) if says else "", *intervals)


def _verdict(name: str, a: float | None, b: float | None) -> str:
    """How `b` is beside `a`; nothing is said of figures that nobody registered, for their direction is unknown."""
    if a is None or b is None or _plain(name) not in FIGURES:
        return ""
    if a == b:
        return "same"
    return "better" if (b < a) == lower_is_better(name) else "worse"


def _plain(name: str) -> str:
    """`macro_recall` is judged as `recall` is."""
    return next(
        (name.removeprefix(kind) for kind in _KINDS if name.startswith(kind) and name not in FIGURES), name
    )


def _alike(a: Stage, b: Stage) -> str:
    """Why figures of two stages do not compare; empty where they do."""
    ours, theirs = ((stage.task, stage.report.get("data_address")) for stage in (a, b))
    if ours[0] and theirs[0] and ours[0] != theirs[0]:
        return f"{a.name}: the tasks are {ours[0]} and {theirs[0]}, whose figures do not compare"
    if ours[1] and theirs[1] and ours[1] != theirs[1]:
        return f"{a.name}: measured on different data, so the figures do not compare"
    return ""


def _environment(run: Run) -> dict[str, Any]:
    """Where a run happened, by its last stage that made something."""
    stages = [stage for stage in run.stages if stage.name in LIFE] or list(run.stages)
    if not stages:
        return {}
    report = stages[-1].report
    around, plan = inner(report, "environment"), inner(report, "plan")
    found = {key: around[key] for key in _SURROUNDINGS if key in around}
    found |= {f"packages.{name}": version for name, version in inner(around, "packages").items()}
    return found | {key: plan[key] for key in _PLANNED if key in plan}
