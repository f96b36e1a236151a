"""Being asked to stop: remembered at once, acted on when the step is done."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from llmkit.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Asked politely: by a scheduler or `kill`, by Slurm shortly before the time limit, by Ctrl-C."""

TIME_IS_UP = -1
"""What `StopSignal.asked` gives in place of a signal's number when the time given to the run is up."""


NOTED: list[int] = []
"""Signals that came before anything better than leaving at once was set up. Leaving is an exception, and one that is
raised in a destructor or a callback is lost: training looks here when it begins, so that the signal is not."""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give the stop signals to `handler` for a while; works in the main thread only, as Python has it."""
    before: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            # None stands for a handler that was not set from Python; the default is the nearest there is.
            signal.signal(number, signal.SIG_DFL if old is None else old)


class StopSignal:
    """While it is active, signals that ask to stop are only remembered; a second Ctrl-C stops at once.

    Not so in a worker of ours: its parent sees to the second Ctrl-C, and one Ctrl-C that goes to parent and worker
    alike comes here twice. On exit the handlers from before are back.

    Attributes:
        requested: The first signal that asked to stop; 0 when none has.
        deadline: When (`time.monotonic()`) the time given to the run is up; None for never.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.requested: int = NOTED[0] if NOTED else 0
        self.deadline = deadline
        self._interrupted = False
        self._has_parent = "LLMKIT_RENDEZVOUS" in os.environ
        self._active = ExitStack()

    def __enter__(self) -> "StopSignal":
        self._active.enter_context(handling(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._active.close()

    def asked(self, reserve_s: float = 0.0) -> int:
        """What asks to stop now: a signal's number, `TIME_IS_UP`, or 0 for nothing.

        Args:
            reserve_s: Seconds that stopping takes (the step under way, the save), so that it is done in time.
        """
        if self.requested:
            return self.requested
        late = self.deadline is not None and time.monotonic() + reserve_s >= self.deadline
        return TIME_IS_UP if late else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted and not self._has_parent:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.requested = self.requested or number


def describe_stop(code: int) -> str:
    """The name of what `StopSignal.asked` gave, for people: `SIGTERM`, `--max-time`.

    Raises:
        ValueError: It is neither a signal's number nor `TIME_IS_UP`.
    """
    return "--max-time" if code == TIME_IS_UP else signal.Signals(code).name


def exit_for(code: int) -> ExitCode:
    """The exit code after a stop that saved its state: 130 for Ctrl-C, 75 for other signals and `TIME_IS_UP`."""
    return ExitCode.CTRL_C if code == signal.SIGINT else ExitCode.INTERRUPTED
