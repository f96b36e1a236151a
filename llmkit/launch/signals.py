"""Being asked to stop: remembered at once, acted on when the step is done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from llmkit.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Asked politely: by a scheduler or `kill`, by Slurm shortly before the time limit, by Ctrl-C."""


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
    """While it is active, signals that ask to stop only set `requested`; a second Ctrl-C stops at once.

    On exit the handlers from before are back.

    Attributes:
        requested: The first signal that asked to stop; 0 when none has.
    """

    def __init__(self) -> None:
        self.requested: int = 0
        self._interrupted = False
        self._active = ExitStack()

    def __enter__(self) -> "StopSignal":
        self._active.enter_context(handling(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._active.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.requested = self.requested or number


def exit_for(signum: int) -> ExitCode:
    """The exit code after a stop that saved its state: 130 for Ctrl-C, 75 for the others."""
    return ExitCode.CTRL_C if signum == signal.SIGINT else ExitCode.INTERRUPTED
