"""Any exception to an error that a person can act on."""

from typing import Any

from llmkit.errors import LlmkitError, UsageError, refused_by_system


class BugError(LlmkitError):
    """Something that llmkit did not foresee."""


def complain(error: Exception, *, as_json: bool) -> int:
    """Say on stderr what went wrong and what would work, in the face that fits stderr.

    Args:
        error: Any exception that ended a command.
        as_json: One JSON object on one line instead of text.

    Returns:
        The exit code that belongs to the error.
    """
    from llmkit.report.console import make_reporter

    known = foreseen(error)
    reporter = make_reporter(json=as_json)
    reporter.error(known)
    reporter.close()
    return int(known.exit_code)


def foreseen(error: Any) -> LlmkitError:
    """`error` itself when it is ours, else what it means to the person at the keyboard."""
    if isinstance(error, LlmkitError):
        return error
    if hasattr(error, "format_message"):  # typer's usage errors; their class is not public
        context = getattr(error, "ctx", None)
        return UsageError(
            error.format_message(), hint=f"see {context.command_path} --help" if context else ""
        )
    if isinstance(error, OSError):
        return refused_by_system(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return BugError(
        text, hint="this is a bug in llmkit; the same command with --debug shows where it happened"
    )
