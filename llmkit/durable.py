"""The one door for durable writes: what is published here is complete, hashed and on the disk, or absent.

A file or folder is written beside its place under a temporary name, fsynced, renamed, and the parent folder
is fsynced. A folder carries `manifest.json` with the size and SHA-256 of every file, so that damage is found
and named. At no moment does a reader see half an artefact. A file that is replaced is always there, old or
new; a folder that is replaced is absent between two renames.

**Source**: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, section 3 (why rename needs
both fsyncs).
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llmkit.errors import CorruptError, RunError

MANIFEST = "manifest.json"


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content`, atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp-{_own_name()}")
    with naming_full_disks(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, keys in the order given."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def write_folder(path: Path, *, facts: Mapping[str, object] | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill; publish it as `path`, with a manifest, when the block ends well.

    Args:
        path: Where the folder appears; what is there already is replaced.
        facts: Further entries of the manifest. A caller may go on filling the mapping inside the block.
    """
    temporary = path.with_name(f".{path.name}.tmp-{_own_name()}")
    with naming_full_disks(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _publish(temporary, path, dict(facts or {}))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the folder `path`.

    Raises:
        CorruptError: It is missing or not readable.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CorruptError(f"{path}: {MANIFEST} is missing, so the folder was never completed") from None
    except (ValueError, OSError) as error:
        raise CorruptError(f"{path / MANIFEST}: not readable ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptError(f"{path / MANIFEST}: it does not list files")
    return manifest


def verify_folder(path: Path, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """Compare every file of `path` with the manifest, and the manifest with its own hash; return it.

    Args:
        path: A published folder.
        only: Look at these files alone; by default at all.

    Raises:
        CorruptError: Names the file and the reason: missing, another size, another hash.
    """
    manifest = read_manifest(path)
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _hash_of_manifest(body):
        raise CorruptError(f"{path / MANIFEST}: its own hash does not match")
    for name, entry in manifest["files"].items():
        if only is None or name in only:
            _verify_file(path / name, entry)
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(path: Path) -> None:
    """Remove a published folder so that a kill midway cannot leave something that looks complete."""
    doomed = path.with_name(f".{path.name}.old-{_own_name()}")
    path.rename(doomed)
    _fsync_folder(path.parent)
    shutil.rmtree(doomed)


def sweep_beside(path: Path) -> None:
    """Remove what killed writers of `path` left beside it. Call it only while holding a lock on `path`."""
    for leftover in (*path.parent.glob(f".{path.name}.tmp-*"), *path.parent.glob(f".{path.name}.old-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what killed writers left in `parent`. Call it only while holding the lock of the run."""
    for leftover in (*parent.glob(".*.tmp-*"), *parent.glob(".*.old-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def naming_full_disks(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals on the way to `path` into errors a person can act on."""
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"no space left on the disk while writing {path}",
                hint="Nothing that was complete is lost: free some space and run the same command again.",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(
                f"cannot write {path}: {os.strerror(number)}",
                hint="Choose another folder with --runs DIR or LLMKIT_RUNS.",
            ) from error
        if number == errno.ENOTDIR:
            raise RunError(f"cannot write {path}: a file stands where a folder is needed") from error
        raise


def _errno_of(error: Exception) -> int | None:
    """The system's error number; libraries in Rust, such as safetensors, have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for an exclusive lock on the file `path` and hold it; who comes next finds what was made meanwhile.

    The kernel drops the lock when its holder dies. The empty file stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class RunLock:
    """One writer a run folder. The kernel drops the lock when its holder dies, so a lock is never stale."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: TextIO | None = None

    def __enter__(self) -> "RunLock":
        with naming_full_disks(self.path.parent):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+")
            except FileNotFoundError as error:
                raise RunError(
                    f"the folder {self.path.parent} cannot be made",
                    hint="Choose another place with --runs DIR or LLMKIT_RUNS.",
                ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunError(
                f"{self.path.parent}: another run writes here ({holder})",
                hint="Wait for it, stop it, or give this run another `name`.",
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _own_name() -> str:
    """What tells this process from others, also from those of other machines that share the folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _publish(temporary: Path, path: Path, facts: dict[str, object]) -> None:
    files = {}
    for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
        _apply_umask(file)
        _fsync(file)
        files[file.relative_to(temporary).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": hash_file(file),
        }
    body = {"files": files, **facts}
    manifest = {**body, "sha256": _hash_of_manifest(body)}
    write_file(temporary / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    for folder in (p for p in temporary.rglob("*") if p.is_dir()):
        _fsync_folder(folder)
    if path.exists():
        remove_folder(path)
    temporary.rename(path)
    _fsync_folder(path.parent)


def _hash_of_manifest(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CorruptError(f"{path}: {size:,} bytes where the manifest says {entry['bytes']:,}")
        if hash_file(path) != entry["sha256"]:
            raise CorruptError(f"{path}: its content does not match the hash in the manifest")
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing") from None
    except (OSError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: not readable ({error})") from error


def _apply_umask(path: Path) -> None:
    # safetensors writes mode 0600 whatever the umask says.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_fsync_folder = _fsync
