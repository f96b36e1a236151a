"""What came of measuring, as it is told: the table of a command, its summary, the gates that did not hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llmkit.errors import GateError
from llmkit.evaluate.measurement import Measurement
from llmkit.evaluate.verdict import Difference, Held
from llmkit.recipe.schema import Eval
from llmkit.report.evaluation_tables import change
from llmkit.report.formatting import format_number, format_value
from llmkit.run.measure.asked import Subject

_SURE = 0.001
"""Below this p its size says nothing more; the least that a thousand draws can give."""
_SEVERAL = 3
"""So many models, those of several seeds for one, have a mean and a deviation."""


@dataclass(frozen=True)
class Judged:
    """A measurement with all that follows from it.

    Attributes:
        subject: The model.
        way: What it was asked, one of `registry.EVALUATIONS`.
        measured: What came of it.
        intervals: Each figure's 95% interval, where it has one.
        differences: From the model that it is compared with.
        gates: What must hold of it.
        warnings: What a person should know.
        among_others: Whether the command measures several.
    """

    subject: Subject
    way: str
    measured: Measurement
    intervals: dict[str, tuple[float, float]]
    differences: Sequence[Difference] = ()
    gates: Sequence[Held] = ()
    warnings: list[str] = field(default_factory=list)
    among_others: bool = False


def over_models(found: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each figure over models, such as those of one recipe and several seeds."""
    if len(found) < _SEVERAL:
        return {}
    names = [name for name in found[0].measured.figures if all(name in one.measured.figures for one in found)]
    values = {name: [one.measured.figures[name] for one in found] for name in names}
    return {name: {"mean": mean(some), "deviation": stdev(some)} for name, some in values.items()}


def summary(one: Judged, folder: Path) -> dict[str, Any]:
    """The figures that a pipeline wants.

    Args:
        one: The measurement.
        folder: Where its report is.
    """
    measured = one.measured
    found: dict[str, Any] = {
        "subject": measured.subject,
        "model": measured.model,
        "task": measured.task,
        "metrics": dict(measured.figures),
        "intervals": {name: list(ends) for name, ends in one.intervals.items()},
        "settings": dict(measured.settings),
        "gates": [gate.to_dict() for gate in one.gates],
        "warnings": list(one.warnings),
        "report": str(folder / "report.html"),
    }
    if measured.predictions:
        found["predictions"] = str(folder / "predictions.jsonl")
    return found


def table(found: Sequence[Judged], section: Eval) -> list[tuple[str, ...]]:
    """Figures with their intervals, a column for each model; differences and gates below."""
    first = found[0].measured
    names = section.metrics or [
        name for name in first.shown if any(name in one.measured.figures for one in found)
    ]
    if len(found) == 1:
        rows = [("figure", "value", "95% interval")]
        rows += [(name, _number(name, first.figures.get(name)), _ends(found[0], name)) for name in names]
        return [*(rows if names else []), *_noise_rows(first, names), *_gate_rows(found)]
    spread = over_models(found)
    lines: list[tuple[str, ...]] = [
        ("figure", *(one.subject.word for one in found), *(["mean"] if spread else []))
    ]
    for name in names:
        over = spread.get(name)
        last = (
            [f"{_number(name, over['mean'])}, deviation {_number(name, over['deviation'])}"] if over else []
        )
        figures = [_number(name, one.measured.figures.get(name)) for one in found]
        lines.append((name, *figures, *(last if spread and last else [""] * bool(spread))))
    rows = [
        (f"{pair.metric} of {pair.subject}", change(pair.metric, pair.difference), _p(pair))
        for one in found
        for pair in one.differences
        if pair.metric in names
    ]
    width = len(lines[0])
    return [*lines, *(_padded(row, width) for row in [*rows, *_ratio_rows(found), *_gate_rows(found)])]


def _padded(row: Sequence[str], width: int) -> tuple[str, ...]:
    """A row of as many cells: what is over stands in the last."""
    cells = [*row[: width - 1], "  ".join(row[width - 1 :])] if len(row) > width else list(row)
    return (*cells, *[""] * (width - len(cells)))


def _noise_rows(measured: Measurement, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """What is left of each figure on damaged text, and how far the copies lie apart."""
    copies = [row for row in measured.tables.get("noise", ()) if isinstance(row["seed"], int)]
    if not copies:
        return []
    typos = f"{copies[0]['typos']:.0%} typos"
    found = []
    for name in names:
        values = [row["metrics"][name] for row in copies if name in row["metrics"]]
        if values:
            apart = f"copies differ by {format_value(name, stdev(values))}" if len(values) > 1 else "one copy"
            found.append((f"{name}, {typos}", _number(name, mean(values)), apart))
    return found


def _ratio_rows(found: Sequence[Judged]) -> list[tuple[str, str, str]]:
    """How much faster models are than others, where they were timed in turn."""
    return [
        (
            f"{row['model']} against {row['against']}, batch {row['batch']} of {row['length']}",
            f"{row['times_as_fast']:.2f} times",
            f"{row['low']:.2f} to {row['high']:.2f} in rounds",
        )
        for row in found[0].measured.tables.get("speed_ratios", ())
    ]


def _gate_rows(found: Sequence[Judged]) -> list[tuple[str, str, str]]:
    return [
        (
            f"gate {gate.metric}",
            _number(gate.metric, gate.value),
            f"{'held' if gate.held else 'NOT HELD'}: {gate.said}",
        )
        for one in found
        for gate in one.gates
    ]


def _number(name: str, value: float | None) -> str:
    return "nothing to measure" if value is None else format_value(name, value)


def _ends(one: Judged, name: str) -> str:
    ends = one.intervals.get(name)
    return "" if ends is None else f"{format_value(name, ends[0])} to {format_value(name, ends[1])}"


def _p(pair: Difference) -> str:
    if pair.p is None:
        return pair.verdict
    p = pair.p if pair.mcnemar is None else pair.mcnemar  # the one that the verdict is by
    said = "p < 0.001" if p < _SURE else f"p {p:.2g}"
    return f"{pair.verdict} ({said}, {format_number(pair.low or 0)} to {format_number(pair.high or 0)})"


def gate_error(failed: Sequence[Held]) -> GateError:
    """What ends the command: each gate that did not hold, and what was wanted."""
    lines = [
        f"{gate.subject}: {gate.metric} is {format_value(gate.metric, gate.value)}, and must be {gate.said}"
        for gate in failed
    ]
    return GateError("; ".join(lines), hint="the report stays; the model was not changed")
