"""How fast the models of a chain are: all in turn, with weights in bfloat16, the first in float32, too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.evaluate.speed import Contender, ratios, restless, row_of, time_models
from llmkit.recipe.evaluation import Speed
from llmkit.recipe.schema import Compress
from llmkit.registry import kind_for
from llmkit.report.console import Reporter
from llmkit.run.compression.judge import Judged, is_exported
from llmkit.run.compression.material import Material

_FASTER = 1.1
"""From here on fp32 is said to be the faster of the two."""

if TYPE_CHECKING:
    from llmkit.evaluate.speed import Start, Timed


def speed_of(
    judged: Sequence[Judged],
    settings: Speed,
    material: Material,
    reporter: Reporter,
    *,
    start: "Start | None" = None,
) -> list[str]:
    """Time all models of a chain; `speed` of each is filled in.

    The first is timed in float32 as well: a processor without instructions for bfloat16 computes faster so. Every ratio
    is to the first in bfloat16. What another runtime runs is timed there, in the type that its file has.

    Args:
        judged: The chain, its first model first.
        settings: Batches, lengths, rounds; its precision says nothing here.
        material: What the chain is made of.
        reporter: Told what happens.
        start: Brings a model to where it can be asked; by default into a process of its own.

    Returns:
        Warnings.

    Raises:
        UsageError: A length does not fit a model.
        RunError: The process of a model died.
    """

    def told(done: int, total: int) -> None:
        reporter.progress("speed", done, total, unit="round")

    reporter.phase("compress", "timing")
    given = [(judged[0], "fp32"), *((one, precision_of(one)) for one in judged)]
    contenders = [_contender(one, precision, material) for one, precision in given]
    more: dict[str, Any] = {} if start is None else {"start": start}
    timed = time_models(contenders, settings, device=material.asked.device, told=told, **more)
    baseline = timed[1]
    rows: dict[int, list[dict[str, Any]]] = {}
    for (one, precision), found in zip(given, timed, strict=True):
        rows.setdefault(id(one), []).extend(_rows(found, baseline, precision))
    for one in judged:
        one.speed = rows[id(one)]
    for one, found in zip(judged, timed[1:], strict=True):
        one.num_parameters = one.num_parameters or int(found.facts["num_parameters"] or 0)
    return _slow_bf16(judged[0]) + [
        f"{one.artefact.word}: {said}"
        for (one, _), found in zip(given, timed, strict=True)
        if (said := restless(found))
    ]


def fitting(settings: Speed, place: Path) -> Speed:
    """How models are timed: where the recipe says nothing, rows that they have room for."""
    from llmkit.models.tasks import longest_input

    if settings != Compress().speed:
        return settings
    longest = longest_input(str(place), trusted=False)
    (length,) = settings.length
    if longest is None or length + settings.new_tokens <= longest:
        return settings
    new_tokens = min(settings.new_tokens, max(1, longest // 4))
    return settings.model_copy(
        update={"length": [max(1, min(length, longest - new_tokens))], "new_tokens": new_tokens}
    )


def _slow_bf16(first: Judged) -> list[str]:
    """What to say where the baseline is not how anybody would run the model here."""
    times = [row["times_as_fast"] for row in first.speed if row["precision"] == "fp32"]
    if not times or min(times) < _FASTER:
        return []
    return [
        f"in fp32 {first.artefact.word} is {min(times):.1f} times as fast as in bf16 on this machine, so "
        f"divide the others' ratios by that; processors with instructions for bf16 differ"
    ]


def precision_of(one: Judged) -> str:
    """What a model of a chain computes in: `bf16`, or of what another runtime runs the type of its file."""
    if not is_exported(one.artefact):
        return "bf16"
    step = one.artefact.step
    assert step is not None
    kind = step.type if step.type not in (None, "auto") else (one.artefact.facts or {}).get("type")
    return f"{step.to} {kind}" if kind else str(step.to)


def _contender(one: Judged, precision: str, material: Material) -> Contender:
    task = material.task
    return Contender(
        f"{one.artefact.word} ({precision})",
        one.artefact.place,
        half=precision == "bf16",
        trust_remote_code=material.subject.trust_remote_code,
        kind=kind_for(task.section.task, task.facts) if task is not None else None,
    )


def _rows(timed: "Timed", baseline: "Timed", precision: str) -> list[dict[str, Any]]:
    """The cells of a model, each with how many times as fast it is as the baseline."""
    against: Sequence[Mapping[str, Any]] = (
        [{} for _ in timed.rounds] if timed is baseline else ratios(timed, baseline)
    )
    found = []
    for cell, ratio in zip(timed.rounds, against, strict=True):
        times = {
            "times_as_fast": ratio.get("times_as_fast", 1.0),
            "times_low": ratio.get("low", 1.0),
            "times_high": ratio.get("high", 1.0),
        }
        found.append({"precision": precision, **row_of(timed, cell), **times})
    return found
