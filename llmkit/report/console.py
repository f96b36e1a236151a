"""One Reporter with three faces: live on a terminal, plain lines in a pipe, JSON lines with `--json`.

Everything goes to stderr: stdout carries only a command's result. The live face is in `live`, imported only
when it is used, because rich costs start-up time that a pipe need not pay.
"""

import contextlib
import json as jsonlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, TextIO

from llmkit.errors import LlmkitError, RecipeError
from llmkit.report.formatting import (
    cell_width,
    format_bytes,
    format_count,
    format_duration,
    jsonable,
    labelled,
    one_line,
    visible,
)

Clock = Callable[[], float]
Values = Mapping[str, float | str]
_NOTHING: Values = {}


class Reporter(Protocol):
    """Tells a person, or a program, what a command does. Text is data: markup in it is shown, not obeyed."""

    def phase(self, name: str, detail: str = "") -> None:
        """A part of the work begins: `tokenize`, `pretrain`."""

    def progress(
        self, phase: str, done: int, total: int | None, values: Values = _NOTHING, *, unit: str = "step"
    ) -> None:
        """`done` of `total` units are done (None: nobody knows how many). Call as often as you like.

        `values` are shown by their names (`train/loss`, `lr`, `tokens_per_s`, `memory_bytes`); `eta_s`
        replaces the estimate made here. `unit` is `step`, `document`, `bytes`, ...
        """

    def note(self, text: str) -> None:
        """Something good to know."""

    def warn(self, text: str) -> None:
        """Something a person should look at; shown even when quiet."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model wrote after `prompt` at `step`; `text` does not repeat the prompt."""

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """A few aligned rows of the same length."""

    def error(self, err: LlmkitError) -> None:
        """What ended the command."""

    def close(self) -> None:
        """Give the terminal back; the reporter may not be used afterwards. Calling it twice is fine."""


class Pace:
    """How fast the current phase goes, from its first progress on: a resumed run's past is left out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._phase = ""
        self._first_done = 0
        self._last_done = 0
        self._started = 0.0

    def eta(self, phase: str, done: int, total: int | None) -> float | None:
        """Seconds until `total`, or None while unknown."""
        now = self._clock()
        if phase != self._phase or done < self._last_done:  # another run, such as a recipe's next variant
            self._phase, self._first_done, self._started = phase, done, now
        self._last_done = done
        gained, spent = done - self._first_done, now - self._started
        if total is None or done >= total or gained <= 0 or spent <= 0:
            return None
        return (total - done) * spent / gained


class Throttle:
    """Lets a phase's first and last progress through, and in between one every `interval` seconds."""

    def __init__(self, clock: Clock, interval: float) -> None:
        self._clock = clock
        self._interval = interval
        self._phase = ""
        self._last = 0.0
        self._finished = False

    def lets(self, phase: str, done: int, total: int | None) -> bool:
        """Whether this progress is to be shown now."""
        now = self._clock()
        new, finished = phase != self._phase, total is not None and done >= total
        due = now - self._last >= self._interval and not self._finished
        if not (new or due or (finished and not self._finished)):
            return False
        self._phase, self._last, self._finished = phase, now, finished
        return True

    def restart(self) -> None:
        """The next progress is a phase's first, even when the phase's name comes again."""
        self._phase = ""


def progress_text(done: int, total: int | None, values: Values, eta: float | None, unit: str) -> str:
    """The words of a progress line: `step 120/600 20% loss 4.21 lr 5.9e-04 12.3k tok/s eta 3m10s`."""
    parts = [f"{_amount(done, unit)}/{_amount(total, unit)}" if total is not None else _amount(done, unit)]
    if unit != "bytes":
        parts[0] = f"{unit} {parts[0]}"
    if total:
        parts.append(f"{100 * min(done, total) // total}%")
    parts += [labelled(key, value) for key, value in values.items() if key != "eta_s"]
    if eta is not None:
        parts.append(f"eta {format_duration(eta)}")
    return one_line(" ".join(parts))


def _amount(value: int, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    return str(value) if value < 100_000 else format_count(value)


def eta_of(values: Values, measured: float | None) -> float | None:
    """The caller's own estimate where it gave one, else the measured one."""
    given = values.get("eta_s")
    return float(given) if given is not None else measured


def error_text(err: LlmkitError) -> list[str]:
    """An error's lines: every problem of a recipe, the message, the hint."""
    problems = list(err.problems) if isinstance(err, RecipeError) else []
    return [*problems, f"error: {err.message}", *([f"hint: {err.hint}"] if err.hint else [])]


class _Lines:
    """Writes whole lines; falls silent when the reader is gone, for a report must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, line: str) -> None:
        if self._gone:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        safe = line.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._stream.write(safe + "\n")
            self._stream.flush()
        except OSError:  # a closed pipe, a vanished terminal: there is no one left to tell
            self._gone = True


class PlainReporter:
    """Lines that each stand alone: no escape codes, no carriage returns, progress every `interval` s."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic, interval: float = 10.0) -> None:
        self._lines = _Lines(stream)
        self._throttle = Throttle(clock, interval)
        self._pace = Pace(clock)

    def phase(self, name: str, detail: str = "") -> None:
        """See Reporter."""
        self._throttle.restart()
        self._lines.write(one_line(f"{name}: {detail}" if detail else name))

    def progress(
        self, phase: str, done: int, total: int | None, values: Values = _NOTHING, *, unit: str = "step"
    ) -> None:
        """See Reporter."""
        eta = eta_of(values, self._pace.eta(phase, done, total))
        if self._throttle.lets(phase, done, total):
            self._lines.write(f"{one_line(phase)} {progress_text(done, total, values, eta, unit)}")

    def note(self, text: str) -> None:
        """See Reporter."""
        self._paragraph(text)

    def warn(self, text: str) -> None:
        """See Reporter."""
        self._paragraph(f"warning: {text}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """See Reporter."""
        self._lines.write(f"sample step {step}: {one_line(prompt)}|{one_line(text)}")

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """See Reporter."""
        self._lines.write(one_line(title))
        cells = [[one_line(str(cell)) for cell in row] for row in rows]
        widths = [max(map(cell_width, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = (c + " " * (w - cell_width(c)) for c, w in zip(row, widths, strict=True))
            self._lines.write("  " + "  ".join(padded).rstrip())

    def error(self, err: LlmkitError) -> None:
        """See Reporter."""
        for text in error_text(err):
            self._paragraph(text)

    def close(self) -> None:
        """See Reporter."""

    def _paragraph(self, text: str) -> None:
        for line in visible(text).split("\n"):
            self._lines.write(line)


class JsonReporter:
    """One JSON object a line: `{"event": "progress", "time": ..., ...}`; progress at most once a second."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic, interval: float = 1.0) -> None:
        self._lines = _Lines(stream)
        self._throttle = Throttle(clock, interval)
        self._pace = Pace(clock)

    def phase(self, name: str, detail: str = "") -> None:
        """See Reporter."""
        self._throttle.restart()
        self._event("phase", name=name, detail=detail)

    def progress(
        self, phase: str, done: int, total: int | None, values: Values = _NOTHING, *, unit: str = "step"
    ) -> None:
        """See Reporter."""
        eta = eta_of(values, self._pace.eta(phase, done, total))
        if self._throttle.lets(phase, done, total):
            shown = {key: value for key, value in values.items() if key != "eta_s"}
            self._event("progress", phase=phase, done=done, total=total, unit=unit, eta_s=eta, values=shown)

    def note(self, text: str) -> None:
        """See Reporter."""
        self._event("note", text=text)

    def warn(self, text: str) -> None:
        """See Reporter."""
        self._event("warning", text=text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """See Reporter."""
        self._event("sample", step=step, prompt=prompt, text=text)

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """See Reporter."""
        self._event("table", title=title, rows=rows)

    def error(self, err: LlmkitError) -> None:
        """See Reporter."""
        problems = list(err.problems) if isinstance(err, RecipeError) else []
        code = int(err.exit_code)
        kind = type(err).__name__
        self._event("error", type=kind, message=err.message, hint=err.hint, problems=problems, exit_code=code)

    def close(self) -> None:
        """See Reporter."""

    def _event(self, event: str, **fields: object) -> None:
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.write(jsonlib.dumps(jsonable({"event": event, "time": stamp, **fields}), allow_nan=False))


class QuietReporter:
    """Passes warnings and errors on to another reporter and keeps the rest to itself."""

    def __init__(self, inner: Reporter) -> None:
        self._inner = inner

    def phase(self, name: str, detail: str = "") -> None:
        """Not shown."""

    def progress(
        self, phase: str, done: int, total: int | None, values: Values = _NOTHING, *, unit: str = "step"
    ) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""

    def warn(self, text: str) -> None:
        """See Reporter."""
        self._inner.warn(text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Not shown."""

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """Not shown."""

    def error(self, err: LlmkitError) -> None:
        """See Reporter."""
        self._inner.error(err)

    def close(self) -> None:
        """See Reporter."""
        self._inner.close()


def is_live(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether `stream` is a terminal that can redraw, and a person watches it: not TERM=dumb, not CI."""
    with contextlib.suppress(ValueError):  # isatty of a closed stream
        return (
            stream.isatty()
            and env.get("TERM", "") not in ("", "dumb", "unknown")
            and env.get("CI", "").lower() in ("", "0", "false")
        )
    return False


def make_reporter(
    *,
    json: bool = False,
    quiet: bool = False,
    stderr: TextIO | None = None,
    env: Mapping[str, str] | None = None,
) -> Reporter:
    """The face that fits the flags and where stderr goes; `quiet` leaves warnings and errors only."""
    stream = sys.stderr if stderr is None else stderr
    env = os.environ if env is None else env
    if json or quiet:
        face: Reporter = JsonReporter(stream) if json else PlainReporter(stream)
        return QuietReporter(face) if quiet else face
    if is_live(stream, env):
        from llmkit.report.live import LiveReporter

        return LiveReporter(stream, color=not env.get("NO_COLOR"))
    return PlainReporter(stream)
