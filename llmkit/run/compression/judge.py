"""What a chain costs and brings: quality before and after on the same data, sizes, times; and whether that will do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import GateError, UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.evaluate.verdict import Difference, differences
from llmkit.registry import EVALUATIONS, load
from llmkit.report.console import Reporter
from llmkit.report.formatting import format_value
from llmkit.run.compression.artefacts import Artefact
from llmkit.run.compression.material import Material
from llmkit.run.evaluate import way_of
from llmkit.run.measure.asked import Subject

_EXPORTED = ("onnx", "gguf", "torch")
"""Forms that only another runtime reads."""
_RESAMPLES = 1000


@dataclass
class Judged:
    """A model of the chain, measured.

    Attributes:
        artefact: The model.
        measured: Its figures; None where another runtime runs it.
        differences: From the model that the chain began with.
        paired: The two compared target by target: see `evaluate.paired`.
        file_bytes: Its files of weights.
        num_parameters: Its parameters.
        speed: How fast it is, by batch and length.
    """

    artefact: Artefact
    measured: Measurement | None
    differences: Sequence[Difference] = ()
    paired: Mapping[str, Any] = field(default_factory=dict)
    file_bytes: int = 0
    num_parameters: int = 0
    speed: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Limit:
    """What `max_drop` makes of a figure.

    Attributes:
        metric: The figure.
        before: Its value before.
        after: Its value after.
        limit: The worst value that is good enough.
        margin: By how much the value may be off, by chance: two standard errors of the difference.
        held: Whether it is good enough, chance allowed for.
    """

    metric: str
    before: float
    after: float
    limit: float
    margin: float
    held: bool

    def to_dict(self) -> dict[str, Any]:
        """As the report's gates have it."""
        said = f"at worst {format_value(self.metric, self.limit)}, chance allowed for"
        return {
            "metric": self.metric,
            "value": self.after,
            "limit": self.limit,
            "held": self.held,
            "said": said,
            "before": self.before,
            "margin": self.margin,
        }


def measure(subject: Subject, material: Material, reporter: Reporter) -> Measurement:
    """A model's figures, on what the chain's first model is measured on.

    Raises:
        UsageError: Nothing says what to measure on, or there is no such figure.
    """
    asked = material.asked
    way = way_of(subject, asked.section)
    reporter.phase("compress", f"measuring {subject.word}")
    found: Measurement = load(EVALUATIONS[way].code)(subject, asked)
    metric = material.section.metric
    if metric is not None and metric not in found.figures:
        known = [name for name in found.figures if not name.startswith("num_")]
        raise UsageError(
            f"compress.metric: {subject.word} has no figure `{metric}`", hint=f"it has {', '.join(known)}"
        )
    return found


def compared(measured: Measurement, baseline: Measurement, seed: int) -> list[Difference]:
    """How figures differ from those of the model that the chain began with."""
    return differences(measured, baseline, seed=seed, resamples=_RESAMPLES)[0]


def is_exported(artefact: Artefact) -> bool:
    """Whether only another runtime reads a model."""
    return artefact.step is not None and artefact.step.to in _EXPORTED


def weight_bytes(place: Path) -> int:
    """Bytes of a model's files of weights."""
    kinds = (".safetensors", ".onnx", ".data", ".gguf", ".pt2", ".bin")
    return sum(path.stat().st_size for path in place.rglob("*") if path.name.endswith(kinds))


def check_direction(metric: str, before: Measurement) -> None:
    """Refuse a figure of which nobody knows which way it gets better.

    Raises:
        UsageError: It is such a one.
    """
    if before.direction(metric) is None:
        raise UsageError(
            f"compress.max_drop: nothing says whether a model gets better as `{metric}` rises or falls",
            hint=f"choose another figure: compress.metric={before.best}",
        )


def limit_of(max_drop: float, metric: str, one: Judged, before: Measurement) -> Limit:
    """Whether a model lost more of a figure than may be lost.

    A loss counts only as far as it is beyond chance: by the near end of the difference's 95% interval.

    Raises:
        UsageError: Nothing says which way the figure gets better.
    """
    check_direction(metric, before)
    after = figures_of(one)
    if metric not in before.figures or metric not in after:
        raise UsageError(
            f"compress.metric: {one.artefact.word} has no figure `{metric}`",
            hint=f"it has {', '.join(sorted(set(after) & set(before.figures)))}",
        )
    value, other = after[metric], before.figures[metric]
    sign = 1.0 if before.direction(metric) == "lower" else -1.0
    limit = other + sign * abs(other) * max_drop
    found = next((pair for pair in one.differences if pair.metric == metric), None)
    near = (value - other) * sign
    margin = 0.0
    if found is not None and found.low is not None and found.high is not None:
        margin = (found.high - found.low) / 2
        near = min(near, found.low if sign > 0 else -found.high)
    held = near <= abs(other) * max_drop + 1e-12
    return Limit(metric, other, value, limit, margin, held)


def figures_of(one: Judged) -> Mapping[str, float]:
    """A model's figures; of one that another runtime runs, those that its export's check found."""
    if one.measured is not None:
        return one.measured.figures
    found: Mapping[str, float] = (one.artefact.facts or {}).get("figures", {})
    return found


def gate_error(limit: Limit, word: str) -> GateError:
    """What ends the command where too much was lost."""
    return GateError(
        f"{word}: {limit.metric} went from {format_value(limit.metric, limit.before)} to "
        f"{format_value(limit.metric, limit.after)}; {format_value(limit.metric, limit.limit)} would be good enough",
        hint="the model is kept, and its card says so; try a milder method, or `recover`",
    )
