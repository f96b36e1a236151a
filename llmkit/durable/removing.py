"""Removing: a kill midway leaves nothing that looks complete, and the next writer sweeps what it left."""

import os
import socket
from contextlib import suppress
from glob import escape
from pathlib import Path

from llmkit.durable import calls
from llmkit.durable.refusals import naming_full_disks

_KINDS = ("tmp", "old", "kept")


def beside(path: Path, what: str) -> Path:
    """A hidden name beside `path`, of this process alone, also among those of other machines.

    `what`: `tmp` is being written, `old` is being removed, `kept` waits until its successor has its name.
    """
    return path.with_name(f".{path.name}.{what}-{socket.gethostname()}-{os.getpid()}")


def remove_folder(path: Path) -> None:
    """Remove a published folder so that a kill midway cannot leave something that looks complete."""
    doomed = beside(path, "old")
    with naming_full_disks(path):
        discard(doomed)
        calls.rename(path, doomed)
        calls.sync_path(path.parent)
        calls.remove_tree(doomed)


def remove_file(path: Path) -> None:
    """Remove a file for good, if it is there."""
    with suppress(FileNotFoundError), naming_full_disks(path):
        calls.unlink(path)
        calls.sync_path(path.parent)


def discard(path: Path) -> None:
    """Remove, as far as it goes, what nobody takes for complete: leftovers, and caches that are verified when read.

    What cannot be removed stays: that costs space, and the next sweep tries again.
    """
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            calls.remove_tree(path, ignore_errors=True)
        elif os.path.lexists(path):
            calls.unlink(path)


def sweep_beside(path: Path) -> None:
    """Remove what killed writers of `path` left beside it. Call it only while holding a lock on `path`.

    A folder that was killed between the two renames which replace it gets its name back.
    """
    _sweep(path.parent, escape(path.name))


def sweep(parent: Path) -> None:
    """Do as `sweep_beside` for all that stands in `parent`. Call it only while holding the lock of the run."""
    _sweep(parent, "*")


def _sweep(parent: Path, name: str) -> None:
    for kept in parent.glob(f".{name}.kept-*"):
        path = kept.with_name(kept.name[1:].rpartition(".kept-")[0])
        if not os.path.lexists(path):
            calls.rename(kept, path)
            calls.sync_path(parent)
    for leftover in (path for what in _KINDS for path in parent.glob(f".{name}.{what}-*")):
        discard(leftover)
