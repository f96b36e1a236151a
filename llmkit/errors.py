"""Every error a person can meet, and the exit code it ends with.

An error says what is wrong, where, the offending value, and what would work (`hint`). Anything that is not
an `LlmkitError` is a bug of ours and shows a traceback.
"""

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command (DESIGN section 5)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    GATE = 4
    INTERRUPTED = 75
    CTRL_C = 130


class LlmkitError(Exception):
    """Something a person can act on.

    Attributes:
        hint: What would work, as one sentence or command; empty when the message says it all.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(LlmkitError):
    """The command line asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class RecipeError(LlmkitError):
    """A recipe is wrong; `problems` holds every one of them, sorted by line, each a full text of its own."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class DataError(LlmkitError):
    """Input data is unreadable, empty or not of the stated form; the message names file and line."""

    exit_code = ExitCode.FAILED


class MissingError(LlmkitError):
    """A package, file or device is missing; `hint` holds the command that gets it."""

    exit_code = ExitCode.MISSING


class CorruptError(LlmkitError):
    """A durable artefact does not match its manifest; the message names the file and the reason."""


class RunError(LlmkitError):
    """A run cannot go on: a lock is held, the recipe changed, numbers are not finite, a worker died."""


class LostWorkerError(RunError):
    """Another worker is to blame: the connection to it broke, or it said that it could not go on."""


class GateError(LlmkitError):
    """A quality gate did not hold."""

    exit_code = ExitCode.GATE


class InterruptedRunError(LlmkitError):
    """A signal stopped the run after its state was saved; the same command resumes it."""

    exit_code = ExitCode.INTERRUPTED


class CtrlCError(InterruptedRunError):
    """Ctrl-C stopped the run after its state was saved."""

    exit_code = ExitCode.CTRL_C


def refused_by_system(error: OSError, *, hint: str = "") -> RunError:
    """What an error of the operating system, such as a full disk, means to a person: its own words."""
    where = f": {error.filename}" if error.filename else ""
    return RunError(f"{error.strerror or error}{where}", hint=hint)
