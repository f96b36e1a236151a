"""Reach a size or a time: chains of steps are tried from mild to strong, and the best that will do is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import DataError, GateError, MissingError, RunError, UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.recipe.compression import Step, Target
from llmkit.report.console import Reporter
from llmkit.report.formatting import format_percent, format_value
from llmkit.run.compression.artefacts import Artefact, stored_type
from llmkit.run.compression.judge import (
    Judged,
    compared,
    is_exported,
    limit_of,
    measure,
    weight_bytes,
)
from llmkit.run.compression.material import Material
from llmkit.run.compression.timing import fitting, speed_of

ChainOf = Callable[[str, Sequence[Step]], list[Artefact]]
"""A name and steps -> the first model and what the steps make of it, in a folder of that name."""

_MIXED_BITS = 5.0
"""Bits of a weight in the mean where `mixed` says nothing."""
_ROUNDING = 0.1
"""By how much more than its share may go where that is rounded to whole layers and channels."""
_INT8 = {"method": "quantize", "format": "int8"}
_INT4 = {"method": "quantize", "format": "int4"}
_SMALL: dict[str, list[dict[str, Any]]] = {
    "int8": [_INT8],
    "w8a8": [{"method": "quantize", "format": "w8a8"}],
    "mixed": [{"method": "quantize", "format": "mixed"}],
    "int4": [_INT4],
    "channels-25-int4": [{"method": "prune", "what": "channels", "share": 0.25}, _INT4],
    "layers-25-int4": [{"method": "prune", "what": "layers", "share": 0.25}, _INT4],
}
_FAST: dict[str, list[dict[str, Any]]] = {
    "channels-15": [{"method": "prune", "what": "channels", "share": 0.15}],
    "layers-10": [{"method": "prune", "what": "layers", "share": 0.1}],
    "channels-30": [{"method": "prune", "what": "channels", "share": 0.3}],
    "layers-25": [{"method": "prune", "what": "layers", "share": 0.25}],
    "layers-25-channels-30": [
        {"method": "prune", "what": "layers", "share": 0.25},
        {"method": "prune", "what": "channels", "share": 0.3},
    ],
    "layers-50": [{"method": "prune", "what": "layers", "share": 0.5}],
}
_EXPORTS: dict[str, list[dict[str, Any]]] = {
    "onnx-int8": [{"method": "export", "to": "onnx", "type": "int8"}],
    "gguf-q8_0": [{"method": "export", "to": "gguf", "type": "q8_0"}],
    "gguf-q4_0": [{"method": "export", "to": "gguf", "type": "q4_0"}],
}
"""Runtimes that compute in few bits: files are smaller and answers faster. Nothing can follow an export."""


@dataclass
class Tried:
    """What came of a chain of steps.

    Attributes:
        name: What it is called.
        judged: Its last model, measured; None where it could not be made.
        facts: As the report has it: `name`, `file_bytes`, `size_ratio`, `latency_ratio`, `figure`, `difference`,
            `held`, `reached`, `chosen`, or the `error`.
        artefacts: The whole chain.
        drop: The share of the figure that was lost; below nought where it got better.
    """

    name: str
    judged: Judged | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    artefacts: Sequence[Artefact] = ()
    drop: float = 0.0


@dataclass(frozen=True)
class Search:
    """What came of a search.

    Attributes:
        artefacts: The chain that was chosen; where none will do, the one that comes closest.
        tried: All that was tried, for the report.
        failed: What ends the command where none will do.
        measured: By the folder of a model, its figures, which need not be had again.
    """

    artefacts: Sequence[Artefact]
    tried: Sequence[dict[str, Any]]
    failed: GateError | None = None
    measured: Mapping[Path, Measurement] = field(default_factory=dict)


def ladder(target: Target) -> dict[str, list[Step]]:
    """What is tried for a target, from mild to strong.

    Rounding makes files small and torch no faster, so a time is reached by taking parts out of the model; the other
    runtimes do both, and come last.
    """
    steps = (_FAST if target.latency is not None else {}) | (_SMALL if target.size is not None else {})
    if target.size is not None and target.latency is not None:
        steps = {f"{name}-int8": [*parts, _INT8] for name, parts in _FAST.items()} | {
            name: parts for name, parts in _SMALL.items() if len(parts) > 1
        }
    steps = steps | _EXPORTS
    return {name: [Step.model_validate(part) for part in parts] for name, parts in steps.items()}


def search(
    first: Measurement,
    metric: str,
    material: Material,
    chain_of: ChainOf,
    reporter: Reporter,
    *,
    rungs: dict[str, list[Step]] | None = None,
) -> Search:
    """Try chains of steps, and choose the one that loses least of those that reach the target.

    What does not fit the model, or needs a package that is not there, is passed over and named; so is what cannot be
    small enough, as long as something else can.

    Args:
        first: The figures of the model that all begin with.
        metric: The figure that `max_drop` is about.
        material: What the chains are made of; its section has the target.
        chain_of: Makes a chain.
        reporter: Told what happens.
        rungs: What is tried, by name; by default `ladder`.

    Raises:
        UsageError: There is no target, or nothing could be made at all.
    """
    target = material.section.target
    if target is None or (target.size is None and target.latency is None):
        raise UsageError("compress.target: nothing says how small or fast", hint="target: {size: 30%}")
    tried = []
    rungs = ladder(target) if rungs is None else rungs
    hopeless = _too_large(rungs, target)
    for name, steps in rungs.items():
        if name in hopeless:
            reporter.note(f"{name} was passed over: {hopeless[name]}")
            tried.append(_passed_over(name, hopeless[name]))
            continue
        reporter.phase("compress", f"trying {name}")
        tried.append(_try(name, steps, first, metric, material, chain_of, reporter))
    made = [one for one in tried if one.judged is not None]
    if not made:
        why = "; ".join(f"{one.name}: {one.facts['error']}" for one in tried)
        raise UsageError(f"compress.target: nothing that could be tried fits the model ({why})")
    if target.latency is not None:
        _time(made, material, reporter)
    for one in made:
        one.facts["reached"] = _excess(one, target) <= 0
    fitting = [one for one in made if one.facts["reached"] and one.facts["held"]]
    best = min(fitting or made, key=lambda one: _rank(one, material, chosen=bool(fitting)))
    best.facts["chosen"] = bool(fitting)
    failed = None if fitting else _failed(best, metric, first, material)
    known = {one.judged.artefact.place: one.judged.measured for one in made if one.judged is not None}
    measured = {place: found for place, found in known.items() if found is not None}
    return Search(best.artefacts, [one.facts for one in tried], failed, measured)


def _too_large(rungs: Mapping[str, Sequence[Step]], target: Target) -> dict[str, str]:
    """Which chains cannot reach a size, and why; none where no chain can, for then the closest is wanted."""
    if target.size is None:
        return {}
    least = {name: least_size(steps) for name, steps in rungs.items()}
    found = {
        name: f"it leaves at least {format_percent(size)} of the size in 16 bits"
        for name, size in least.items()
        if size > target.size
    }
    return {} if len(found) == len(rungs) else found


def least_size(steps: Sequence[Step]) -> float:
    """What a chain leaves at least of a model's size in 16 bits, were all of its weights such as the steps treat."""
    size = 1.0
    for step in steps:
        if step.method == "quantize":
            bits = {"int4": 4.0, "mixed": step.bits or _MIXED_BITS}.get(str(step.format), 8.0)
            size *= bits / 16
        elif step.method == "export":
            plain = "q8_0" if step.to == "gguf" else "f16"
            kind = plain if step.type in (None, "auto") else str(step.type)
            size *= {"q4_0": 4.0, "q8_0": 8.0, "int8": 8.0}.get(kind, 16.0) / 16
        elif step.method == "prune" and step.what != "weights":
            size *= 1 - (step.share or 0.0) - _ROUNDING
    return size


def _passed_over(name: str, why: str) -> Tried:
    return Tried(name, facts={"name": name, "error": why, "held": False, "reached": False})


def _try(
    name: str,
    steps: Sequence[Step],
    first: Measurement,
    metric: str,
    material: Material,
    chain_of: ChainOf,
    reporter: Reporter,
) -> Tried:
    """Make a chain and measure its last model."""
    exports = bool(steps) and steps[-1].method == "export"
    try:
        artefacts = chain_of(name, steps)
        last = artefacts[-1]
        measured = measure(material.of(last.word, last.place), material, reporter)
    except (UsageError, MissingError, DataError, RunError) as error:
        if isinstance(error, RunError) and not exports:
            raise  # of an export it says that the file is not the model
        reporter.note(f"{name} was passed over: {error.message}")
        return _passed_over(name, error.message)
    judged = Judged(last, measured, compared(measured, first, material.asked.seed))
    judged.file_bytes = weight_bytes(last.place)
    before, after = first.figures[metric], measured.figures[metric]
    sign = 1.0 if first.direction(metric) == "lower" else -1.0
    drop = sign * (after - before) / (abs(before) or 1.0)
    most = material.section.max_drop
    held = most is None or limit_of(most, metric, judged, first).held
    facts = {
        "name": name,
        "folder": str(last.place),
        "file_bytes": judged.file_bytes,
        "size_ratio": judged.file_bytes / bytes_in_16_bits(artefacts[0].place),
        "latency_ratio": None,
        "figure": after,
        "difference": after - before,
        "held": held,
        "reached": False,
        "chosen": False,
    }
    return Tried(name, judged, facts, artefacts, drop)


def bytes_in_16_bits(place: Any) -> float:
    """Bytes that a model's files would have with weights of 16 bits."""
    return weight_bytes(place) * 2 / stored_type(place).itemsize


def _time(made: Sequence[Tried], material: Material, reporter: Reporter) -> None:
    """Time what was made, all in turn with the first model."""
    from llmkit.recipe.evaluation import Speed

    asked = material.section.speed or Speed(length=[64], new_tokens=16, rounds=3)
    settings = fitting(asked, made[0].artefacts[0].place)
    judged = [Judged(made[0].artefacts[0], None), *(one.judged for one in made if one.judged is not None)]
    speed_of(judged, settings, material, reporter)
    for one in made:
        assert one.judged is not None
        one.facts["latency_ratio"] = 1 / one.judged.speed[0]["times_as_fast"]


def _excess(one: Tried, target: Target) -> float:
    """By how much a model is too large or too slow, as a share of what was asked for; nought or less: it is not."""
    pairs = ((target.size, one.facts["size_ratio"]), (target.latency, one.facts["latency_ratio"]))
    return max(found / asked - 1 for asked, found in pairs if asked is not None)


def _rank(one: Tried, material: Material, *, chosen: bool) -> tuple[float, ...]:
    """Less is better: what was lost; where nothing will do, how far from that it is."""
    target = material.section.target
    assert target is not None
    if chosen:
        # Who asks for a size alone wants what the same libraries read; time is what other runtimes are for.
        moves = target.latency is None and is_exported(one.artefacts[-1])
        return (moves, one.drop, one.facts["file_bytes"])
    most = material.section.max_drop
    lost = 0.0 if one.facts["held"] or most is None else one.drop / max(most, 1e-3) - 1
    return (max(0.0, _excess(one, target)) + max(0.0, lost), one.drop)


def _failed(one: Tried, metric: str, first: Measurement, material: Material) -> GateError:
    section, facts = material.section, one.facts
    assert section.target is not None
    asked = [
        f"{what} {format_percent(most)}"
        for what, most in (("size", section.target.size), ("latency", section.target.latency))
        if most is not None
    ]
    most = f" and max_drop {format_percent(section.max_drop)}" if section.max_drop is not None else ""
    took = f", {format_percent(facts['latency_ratio'])} of the time" if facts["latency_ratio"] else ""
    return GateError(
        f"compress.target: nothing that was tried reaches {', '.join(asked)}{most}; the closest is {one.name}: "
        f"{format_percent(facts['size_ratio'])} of the size in 16 bits{took}, {metric} from "
        f"{format_value(metric, first.figures[metric])} to {format_value(metric, facts['figure'])}",
        hint="ask for less, allow a larger max_drop, or give steps of your own with `recover`",
    )
