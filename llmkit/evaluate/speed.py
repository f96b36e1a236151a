"""How fast models are, and how large: each alone in a process of its own, asked in turn.

What disturbs a machine comes and goes, so models are timed one after the other, round after round, and compared within
the rounds. What a round is made of does not depend on the models before it: each round begins with another one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from llmkit import errors
from llmkit.errors import LlmkitError, RunError, UsageError
from llmkit.launch.local import end_with_parent, finding_our_code
from llmkit.recipe.evaluation import Speed
from llmkit.registry import ModelKind

ROUND_S = 0.25
"""A model is asked in one round until about so much time has passed, so that short times are medians of many."""
MOST_CALLS = 20
"""But not more often than this."""
RESTLESS = 0.25
"""Rounds that differ by more than this share of their median were disturbed."""


@dataclass(frozen=True)
class Contender:
    """A model to be timed.

    Attributes:
        word: What it is called.
        folder: Its folder.
        bf16: Compute matrix products in bfloat16.
        half: Hold the weights in bfloat16 and compute everything so, as models are served.
        trust_remote_code: Code that comes with it may run.
        kind: What it is loaded as; None: as its configuration says.
    """

    word: str
    folder: Path
    bf16: bool = False
    half: bool = False
    trust_remote_code: bool = False
    kind: ModelKind | None = None


@dataclass(frozen=True)
class Cell:
    """What a model is timed with.

    Attributes:
        batch: Rows computed together.
        length: Tokens of each.
        new_tokens: Tokens that it adds to each, where it writes.
    """

    batch: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Call:
    """How long one batch took.

    Attributes:
        seconds: All of it.
        first_s: Until the first new token, of a model that writes.
    """

    seconds: float
    first_s: float | None = None


@dataclass(frozen=True)
class Timed:
    """What came of timing a model.

    Attributes:
        word: What it is called.
        facts: `kind`, `writes`, `longest`, `num_parameters`, `file_bytes`, `memory_bytes`.
        rounds: For each cell, what each round's calls took.
    """

    word: str
    facts: Mapping[str, Any]
    rounds: Mapping[Cell, Sequence[Sequence[Call]]] = field(default_factory=dict)


class Asked(Protocol):
    """A model that answers, wherever it is."""

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer to a request; see `speed_worker.Server`."""


Start = Callable[[Contender, str], Any]
"""A contender and a device -> a context in which an `Asked` answers for it."""


@contextmanager
def worker(contender: Contender, device: str) -> Iterator[Asked]:
    """A process that holds the model; it is killed at the end, and when this process ends in whatever way."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "llmkit.evaluate.speed_worker"],
        env=finding_our_code(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        process_group=0,
        preexec_fn=end_with_parent(),
    )
    with process:
        try:
            yield _Worker(contender, process)
        finally:
            process.kill()


class _Worker:
    def __init__(self, contender: Contender, process: "subprocess.Popen[str]") -> None:
        self._contender = contender
        self._process = process

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The process's answer.

        Raises:
            LlmkitError: What the process says that is wrong.
            RunError: It died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died(request)
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise _as_raised(answer["error"])
        return answer

    def _died(self, request: Mapping[str, Any]) -> RunError:
        code = self._process.wait()
        said = f"signal {-code}" if code < 0 else f"exit code {code}"
        asked = ", ".join(f"{key} {value}" for key, value in request.items() if key in ("batch", "length"))
        return RunError(
            f"{self._contender.word}: the process that was to {request['do']} the model ended with {said}"
            + (f" ({asked})" if asked else ""),
            hint="its own words stand above; without any, memory may have run out: try a smaller speed.batch",
        )


def _as_raised(told: Mapping[str, str]) -> LlmkitError:
    kind = getattr(errors, told["type"], RunError)
    error: LlmkitError = kind(told["message"], hint=told["hint"])
    return error


def time_models(
    contenders: Sequence[Contender],
    settings: Speed,
    *,
    device: str = "cpu",
    start: Start = worker,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timed]:
    """Time models in turn.

    For each batch size and length every model is asked once to warm up, once to see how long it takes, and then in each
    round as often as fits into `ROUND_S`, at least once and at most `MOST_CALLS` times.

    Args:
        contenders: The models; all are held at once.
        settings: What is timed, and how often.
        device: `cpu`, `cuda` or `mps`.
        start: Brings a model to where it can be asked; by default into a process of its own.
        told: Called with the number of rounds that are done, and of all.

    Raises:
        UsageError: A length does not fit a model, or a folder holds none.
        RunError: A process died.
    """
    with ExitStack() as stack:
        models = [stack.enter_context(start(one, device)) for one in contenders]
        facts = [dict(m.ask(_loading(one, device))) for m, one in zip(models, contenders, strict=True)]
        cells = cells_of(settings, [(one.word, fact) for one, fact in zip(contenders, facts, strict=True)])
        found: list[dict[Cell, list[list[Call]]]] = [{cell: [] for cell in cells} for _ in models]
        for number, cell in enumerate(cells):
            calls = [_calls_in_a_round(model, cell) for model in models]
            for turn in range(settings.rounds):
                for which in _in_turn(len(models), turn):
                    found[which][cell].append([_time(models[which], cell) for _ in range(calls[which])])
                told(number * settings.rounds + turn + 1, len(cells) * settings.rounds)
        for model, fact in zip(models, facts, strict=True):
            fact.update(model.ask({"do": "memory"}))
    return [Timed(one.word, *rest) for one, *rest in zip(contenders, facts, found, strict=True)]


def _loading(one: Contender, device: str) -> dict[str, Any]:
    words = {"folder": str(one.folder), "device": device, "bf16": one.bf16, "half": one.half}
    return {"do": "load", **words, "trusted": one.trust_remote_code, "kind": one.kind}


def _in_turn(number: int, turn: int) -> list[int]:
    """Who is asked in a round, in order: each begins with another one."""
    return [(turn + place) % number for place in range(number)]


def _time(model: Asked, cell: Cell) -> Call:
    request = {"do": "time", "batch": cell.batch, "length": cell.length, "new_tokens": cell.new_tokens}
    answer = model.ask(request)
    return Call(answer["seconds"], answer["first_s"])


def _calls_in_a_round(model: Asked, cell: Cell) -> int:
    """How often a model is asked in each round; before that it is warmed up."""
    _time(model, cell)
    return max(1, min(MOST_CALLS, int(ROUND_S / max(_time(model, cell).seconds, 1e-9))))


def cells_of(settings: Speed, models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Cell]:
    """What is timed. A length that nobody asked for is cut to what all models read.

    Args:
        settings: Batches and lengths.
        models: What each is called, and its facts.

    Raises:
        UsageError: A length that was asked for does not fit.
    """
    rooms = [(word, _room(fact, settings.new_tokens)) for word, fact in models]
    tightest, room = min(rooms, key=lambda pair: pair[1])
    if room < 1:
        raise UsageError(
            f"{tightest}: {settings.new_tokens} new tokens are more than the model has room for",
            hint="speed.new_tokens: 8",
        )
    lengths = list(settings.length)
    if "length" not in settings.model_fields_set:
        lengths = [min(length, int(room)) for length in lengths]
    if max(lengths) > room:
        raise UsageError(
            f"speed.length {max(lengths):,} does not fit {tightest}: it has room for {int(room):,} tokens"
            + (f" before {settings.new_tokens} new ones" if _reads_on(dict(models)[tightest]) else ""),
            hint=f"speed.length: {int(room)}",
        )
    return [Cell(batch, length, settings.new_tokens) for batch in settings.batch for length in lengths]


def _room(facts: Mapping[str, Any], new_tokens: int) -> float:
    longest = facts["longest"]
    if longest is None:
        return float("inf")
    return longest - (new_tokens if _reads_on(facts) else 0)


def _reads_on(facts: Mapping[str, Any]) -> bool:
    """Whether what a model writes takes room in what it reads."""
    return bool(facts["kind"] == "causal")


# --- what is made of the times


def row_of(timed: Timed, cell: Cell) -> dict[str, Any]:
    """A line of the table: a model with one batch size and length."""
    figures = figures_of(timed, cell, cell)
    shown = {key: value for key, value in figures.items() if key not in ("num_parameters", "file_bytes")}
    by_round = [_median_s(calls) * 1000 for calls in timed.rounds[cell]]
    return {
        "model": timed.word,
        "batch": cell.batch,
        "length": cell.length,
        **({"new_tokens": cell.new_tokens} if timed.facts["writes"] else {}),
        **shown,
        "calls": sum(map(len, timed.rounds[cell])),
        "latency_ms_low": min(by_round),
        "latency_ms_high": max(by_round),
    }


def figures_of(
    timed: Timed, latency: Cell, throughput: Cell, rounds: Sequence[int] | None = None
) -> dict[str, float]:
    """The figures of a model.

    Args:
        timed: What was measured.
        latency: The cell that times to wait are of.
        throughput: The cell that amounts by the second are of.
        rounds: Numbers of the rounds that count, some of them several times; None: all once.

    Returns:
        `latency_ms_p50`, `latency_ms_p95`: of a batch, with all that is written; `rows_per_s`; `tokens_per_s`: read. Of
        models that write `first_token_ms_p50`, `first_token_ms_p95`; and `decode_tokens_per_s`: written after the first
        ones. `memory_bytes`, `num_parameters`, `file_bytes`.
    """
    waits, work = _of_rounds(timed.rounds[latency], rounds), _of_rounds(timed.rounds[throughput], rounds)
    whole_s, read_s = sum(call.seconds for call in work), sum(_reading(call) for call in work)
    rows = throughput.batch * len(work)
    figures = {
        **_percentiles("latency_ms", [call.seconds for call in waits]),
        "rows_per_s": rows / whole_s,
        "tokens_per_s": rows * throughput.length / read_s,
    }
    if timed.facts["writes"]:
        figures |= _percentiles("first_token_ms", [_reading(call) for call in waits])
        if throughput.new_tokens > 1:
            written = rows * (throughput.new_tokens - 1)
            figures["decode_tokens_per_s"] = written / (whole_s - read_s)
    return figures | {name: timed.facts[name] for name in ("memory_bytes", "num_parameters", "file_bytes")}


def _of_rounds(rounds: Sequence[Sequence[Call]], numbers: Sequence[int] | None) -> list[Call]:
    chosen = range(len(rounds)) if numbers is None else numbers
    return [call for number in chosen for call in rounds[number]]


def _reading(call: Call) -> float:
    """Seconds until the rows were read: all, for models that do not write."""
    return call.seconds if call.first_s is None else call.first_s


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    half, most = np.percentile(seconds, [50, 95]) * 1000
    return {f"{name}_p50": float(half), f"{name}_p95": float(most)}


def ratios(timed: Timed, other: Timed) -> list[dict[str, Any]]:
    """How many times as fast as another a model is, by cell: the median over the rounds, and the range.

    Of each round the fastest calls are compared: those that were disturbed least.

    Raises:
        ValueError: They were not timed in turn.
    """
    if list(timed.rounds) != list(other.rounds):
        raise ValueError("these were not timed in turn")
    lines = []
    for cell, own in timed.rounds.items():
        pairs = zip(own, other.rounds[cell], strict=True)
        found = [_fastest_s(theirs) / _fastest_s(ours) for ours, theirs in pairs]
        sizes = {"batch": cell.batch, "length": cell.length}
        spread = {"times_as_fast": median(found), "low": min(found), "high": max(found)}
        lines.append({"model": timed.word, "against": other.word, **sizes, **spread})
    return lines


def _fastest_s(calls: Sequence[Call]) -> float:
    return min(call.seconds for call in calls)


def _median_s(calls: Sequence[Call]) -> float:
    return median(call.seconds for call in calls)


def restless(timed: Timed) -> str:
    """A warning where a model's rounds differ much: something else used the machine; empty where they do not."""
    shares = []
    for rounds in timed.rounds.values():
        medians = [_median_s(calls) for calls in rounds]
        shares.append((max(medians) - min(medians)) / median(medians))
    worst = max(shares, default=0.0)
    if worst <= RESTLESS:
        return ""
    return (
        f"rounds differ by up to {worst:.0%}; something else used this machine, so trust ratios within "
        "rounds rather than milliseconds"
    )
