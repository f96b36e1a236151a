"""What the operating system refuses, in words that a person can act on."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.errors import RunError


@contextmanager
def naming_full_disks(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals on the way to `path` into errors a person can act on.

    Raises:
        RunError: No space, a size limit, a failing disk, no permission, or a file where a folder is needed.
    """
    try:
        yield
    except Exception as error:
        refusal = _refusal(_errno_of(error), path)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(number: int | None, path: Path) -> RunError | None:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"no space left on the disk while writing {path}",
            hint="Nothing that was complete is lost: free some space and run the same command again.",
        )
    if number == errno.EFBIG:
        return RunError(
            f"a file is larger than this system lets it be while writing {path}",
            hint="Nothing that was complete is lost: `ulimit -f` shows the limit; raise it and run the same again.",
        )
    if number == errno.EIO:
        return RunError(
            f"the disk reports an input/output error at {path}",
            hint="Nothing that was complete is lost: look at the disk (`dmesg`), then run the same command again.",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(
            f"cannot write {path}: {os.strerror(number)}",
            hint="Choose another folder with --runs DIR or LLMKIT_RUNS.",
        )
    if number == errno.ENOTDIR:
        return RunError(f"cannot write {path}: a file stands where a folder is needed")
    return None


def _errno_of(error: Exception) -> int | None:
    """The system's error number; libraries in Rust, such as safetensors, have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
