"""Locks that are never stale: the kernel drops them when their holder dies."""

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llmkit.durable.refusals import naming_full_disks
from llmkit.durable.removing import discard
from llmkit.durable.writing import make_folders
from llmkit.errors import RunError

_SCRATCH = ".scratch-"
_LOCK = ".lock"
_TRIES, _TRY_EVERY_S = 3, 0.02
"""Who only looks whether a folder is locked (`lock_holder`) holds its lock for a moment."""


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for an exclusive lock on the file `path` and hold it; who comes next finds what was made meanwhile.

    The kernel drops the lock when its holder dies. The empty file stays behind.
    """
    make_folders(path.parent)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for this block alone, removed at its end; those of processes that were killed go first."""
    make_folders(parent)
    for leftover in parent.glob(f"{_SCRATCH}*"):
        with _held(leftover) as is_ours:
            if is_ours:
                discard(leftover)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        with _held(folder) as is_ours:
            if is_ours:  # else another process took it for a leftover before it was locked
                try:
                    yield folder
                finally:
                    discard(folder)
                return


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a scratch folder; False when another process does, or the folder is gone."""
    try:
        file = (folder / ".lock").open("ab")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield folder.is_dir()


def lock_holder(folder: Path) -> str | None:
    """Who writes in a run folder now, in words; None when nobody does, or it cannot be known. Changes nothing."""
    try:
        with (folder / _LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).decode(errors="replace").strip() or "another process"
    except OSError:  # no lock file, none of ours to read, or a file system without locks
        return None
    return None


def _lock(file: TextIO) -> None:
    """Take a file's lock alone.

    Raises:
        BlockingIOError: Another process holds it, and not only to look.
    """
    for _ in range(_TRIES - 1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_EVERY_S)
        else:
            return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """One writer a run folder. The kernel drops the lock when its holder dies, so a lock is never stale."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _LOCK
        self._file: TextIO | None = None

    def __enter__(self) -> "RunLock":
        with naming_full_disks(self.path.parent):
            try:
                make_folders(self.path.parent)
                file = self.path.open("a+")
            except FileNotFoundError as error:
                raise RunError(
                    f"the folder {self.path.parent} cannot be made",
                    hint="Choose another place with --runs DIR or LLMKIT_RUNS.",
                ) from error
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunError(
                f"{self.path.parent}: another run writes here ({holder})",
                hint="Wait for it, stop it, or give this run another `name`.",
            ) from None
        except OSError as error:
            file.close()
            raise RunError(
                f"{self.path.parent}: this file system does not lock files ({error.strerror})",
                hint="Choose another place with --runs DIR or LLMKIT_RUNS.",
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
