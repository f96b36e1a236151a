"""What commands print, and on which stream: stdout carries the result and nothing else."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

CALLED = "LLMKIT_CALLED"
"""In a worker's environment: how the command that started it was called."""


def program() -> str:
    """How llmkit was called, so that a printed command can be typed again: `llmkit`, `.venv/bin/llmkit`."""
    if CALLED in os.environ:  # by the process that started this one
        return os.environ[CALLED]
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_as_found(Path(sys.executable))} -m llmkit"
    return "llmkit" if called.name != "llmkit" else _as_found(called)


def _as_found(called: Path) -> str:
    """A program's name where a shell finds this very one by it, else its path; links to it are others."""
    found = shutil.which(called.name)
    if found and Path(found).absolute() == called.absolute():
        return called.name
    return shlex.quote(os.path.relpath(called) if called.is_relative_to(Path.cwd()) else str(called))


def as_typed(command: str) -> str:
    """`llmkit run x` with the first word as the user has to type it here."""
    return program() + command.removeprefix("llmkit") if command.startswith("llmkit ") else command


def say(text: str) -> None:
    """Print for a person: to stderr, so that stdout stays clean."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def give(text: str) -> None:
    """Print a result: to stdout, at once."""
    print(text, flush=True)  # noqa: T201


def give_json(value: object) -> None:
    """Print one JSON value on one line of stdout."""
    from llmkit.report.formatting import jsonable

    give(json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False))


def as_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, aligned; the last column is left as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def close_quietly(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that Python's exit does not complain about a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
