"""The system calls that change the disk. Every one that the door makes passes here, where tests can let it fail.

Nothing here decides anything: what is called in which order stands in `writing.py` and `removing.py`.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Name = Literal[
    "mkdir", "open", "write", "fsync", "chmod", "rename", "exchange", "unlink", "rmtree", "foreign"
]


@dataclass(frozen=True)
class Call:
    """One call, as a fail point sees it.

    Attributes:
        when: Before the call is made, or after it has succeeded.
        name: What is done. `foreign` is a library's own writing of a file, or of all files of a folder.
        path: To what.
        target: Where to, for `rename` and `exchange`.
    """

    when: Literal["before", "after"]
    name: Name
    path: Path
    target: Path | None = None


class NotOfferedError(OSError):
    """The C library, the kernel or the file system has no such call."""


FailPoint = Callable[[Call], int | None]

fail_point: FailPoint | None = None
"""Set by tests alone. It may raise, end the process, or return the bytes to which a `write` is cut."""

_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_NO_REPLACE, _EXCHANGE = 1, 2
_HERE = -100  # AT_FDCWD


@contextmanager
def _watched(name: Name, path: Path, target: Path | None = None) -> Iterator[int | None]:
    watcher = fail_point
    if watcher is None:
        yield None
        return
    yield watcher(Call("before", name, path, target))
    watcher(Call("after", name, path, target))


@contextmanager
def foreign_write(path: Path) -> Iterator[None]:
    """Around a library's own writing of `path` (safetensors, `save_pretrained`), so that tests can interrupt it."""
    with _watched("foreign", path):
        yield


def make_folder(path: Path) -> None:
    """Make one folder, whose parent exists."""
    with _watched("mkdir", path):
        path.mkdir()


def create(path: Path) -> int:
    """Open an empty file for writing; return its descriptor."""
    with _watched("open", path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def write(descriptor: int, content: bytes, path: Path) -> None:
    """Write all of `content`, in as many calls as the system needs."""
    left = memoryview(content)
    while left:
        with _watched("write", path) as limit:
            done = os.write(descriptor, left[:limit])
        if done == 0:
            raise OSError(errno.EIO, "the system wrote nothing", str(path))
        left = left[done:]


def sync(descriptor: int, path: Path) -> None:
    """Bring an open file to the disk."""
    with _watched("fsync", path):
        os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk.

    A few network file systems have no fsync for folders and refuse it as an invalid argument: there the
    server alone decides when names reach the disk.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor, path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def set_mode(path: Path, mode: int) -> None:
    """Set who may read and write."""
    with _watched("chmod", path):
        path.chmod(mode)


def rename(source: Path, target: Path) -> None:
    """Rename; a file at `target` is replaced in the same moment."""
    with _watched("rename", source, target):
        source.replace(target)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file unless something is at `target`.

    Raises:
        FileExistsError: Something is.
    """
    with _watched("rename", source, target):
        try:
            _rename_with(source, target, _NO_REPLACE)
        except NotOfferedError:
            os.link(source, target)
            source.unlink()


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders change places in one moment.

    Raises:
        NotOfferedError: The system cannot do that here; nothing has changed.
    """
    with _watched("exchange", one, other):
        _rename_with(one, other, _EXCHANGE)


def unlink(path: Path) -> None:
    """Remove a file or a symbolic link."""
    with _watched("unlink", path):
        path.unlink()


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder and everything in it."""
    with _watched("rmtree", path):
        shutil.rmtree(path, ignore_errors=ignore_errors)


def _rename_with(source: Path, target: Path, flags: int) -> None:
    call = _renameat2()
    if call is None:
        raise NotOfferedError(errno.ENOSYS, "the C library has no renameat2")
    if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags) == 0:
        return
    number = ctypes.get_errno()
    refused = NotOfferedError if number in _NO_SUCH_CALL else OSError
    raise refused(number, os.strerror(number), str(source), None, str(target))


@cache
def _renameat2() -> Any:
    with suppress(AttributeError):
        return ctypes.CDLL(None, use_errno=True).renameat2
    return None
