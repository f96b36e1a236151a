"""How fast a model is, and how large."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.evaluate.measurement import FEWEST, Figures, Items, Measurement
from llmkit.metrics.inputs import Integers
from llmkit.recipe.evaluation import Speed
from llmkit.registry import EVALUATIONS, kind_for
from llmkit.run.measure.asked import Asked, Subject

if TYPE_CHECKING:
    from llmkit.evaluate.speed import Contender, Timed

_SIZES = ("memory_bytes", "num_parameters", "file_bytes")
_Key = tuple[frozenset[tuple[str, str]], str, str]
_waiting: list[tuple[_Key, Subject, Measurement]] = []
"""Models that were timed in turn with another, and were not asked for yet: each is handed out once."""


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Time a model; those that are measured by the same command are timed in turn with it, all at the first call.

    Args:
        subject: The model.
        asked: What is timed (`speed`), and the others.

    Raises:
        UsageError: A length does not fit a model.
        RunError: The process of a model died.
    """
    settings = asked.section.speed or Speed()
    all_of_it = [subject, *asked.others]
    names = frozenset((one.word, str(one.place)) for one in all_of_it)
    key = (names, settings.model_dump_json(), asked.device)
    if not any((known, one) == (key, subject) for known, one, _ in _waiting):
        _waiting[:] = [
            (key, one, found)
            for one, found in zip(all_of_it, _measure_all(all_of_it, settings, asked), strict=True)
        ]
    place = next(number for number, (known, one, _) in enumerate(_waiting) if (known, one) == (key, subject))
    return _waiting.pop(place)[2]


def _measure_all(subjects: Sequence[Subject], settings: Speed, asked: Asked) -> list[Measurement]:
    from llmkit.evaluate.speed import time_models

    def told(done: int, total: int) -> None:
        asked.reporter.progress("speed", done, total, unit="round")

    contenders = [_contender(one, settings) for one in subjects]
    timed = time_models(contenders, settings, device=asked.device, told=told)
    return [
        _measurement(one, number, timed, settings, asked.device, bf16=contenders[number].bf16)
        for number, one in enumerate(subjects)
    ]


def _contender(subject: Subject, settings: Speed) -> "Contender":
    from llmkit.evaluate.speed import Contender

    precision = subject.precision if settings.precision == "auto" else settings.precision
    return Contender(
        subject.word,
        subject.place,
        bf16=precision == "bf16",
        trust_remote_code=subject.trust_remote_code,
        kind=kind_for(subject.task.section.task, subject.task.facts) if subject.task else None,
    )


def _measurement(
    subject: Subject,
    number: int,
    all_timed: "Sequence[Timed]",
    settings: Speed,
    device: str,
    *,
    bf16: bool,
) -> Measurement:
    """A model's figures: times to wait for the smallest batch, amounts by the second for the largest; shortest rows."""
    from llmkit.evaluate.speed import figures_of, ratios, restless, row_of

    timed = all_timed[number]
    cells = sorted(timed.rounds, key=lambda cell: (cell.length, cell.batch))
    latency = cells[0]
    throughput = next(cell for cell in reversed(cells) if cell.length == latency.length)

    def of_rounds(rounds: Integers) -> Figures:
        found = figures_of(timed, latency, throughput, rounds.tolist())
        return {name: value for name, value in found.items() if name not in _SIZES}

    figures = figures_of(timed, latency, throughput)
    names = [f"round {place + 1}" for place in range(settings.rounds)]
    items = Items(names, of_rounds) if settings.rounds >= FEWEST else None
    others = [one for place, one in enumerate(all_timed) if place != number]
    tables = {"speed": [row_of(timed, cell) for cell in timed.rounds]}
    if others:
        tables["speed_ratios"] = [line for other in others for line in ratios(timed, other)]
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task="speed",
        data="",
        figures=figures,
        shown=[name for name in EVALUATIONS["speed"].metrics if name in figures],
        best=EVALUATIONS["speed"].best,
        items=items,
        tables=tables,
        settings={
            "device": device,
            "precision": "bf16" if bf16 else "fp32",
            "threads": _threads(),
            "rounds": settings.rounds,
            "latency_of": {"batch": latency.batch, "length": latency.length},
            "throughput_of": {"batch": throughput.batch, "length": throughput.length},
            **({"new_tokens": latency.new_tokens} if timed.facts["writes"] else {}),
        },
        warnings=[said for said in [restless(timed)] if said],
    )


def _threads() -> int:
    """Threads that a process of this environment computes with."""
    import torch

    return torch.get_num_threads()
