"""Writing: temporary name, fsync, manifest, rename, fsync of the parent. In this order, or it proves nothing."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from llmkit.durable import calls
from llmkit.durable.manifest import MANIFEST, hash_file, manifest_text, read_manifest, sealed
from llmkit.durable.refusals import naming_full_disks
from llmkit.durable.removing import beside, discard


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content`, atomically and durably."""
    _write(path, content, calls.rename)


def write_new_file(path: Path, content: bytes | str) -> None:
    """Write the file `path`, atomically and durably, unless something is there already.

    Raises:
        FileExistsError: Something is.
    """
    _write(path, content, calls.rename_new)


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
    temporary = beside(path, "tmp")
    with naming_full_disks(path):
        make_folders(path.parent)
        discard(temporary)
        try:
            calls.make_folder(temporary)
            yield temporary
            _complete(temporary, dict(facts or {}))
            replaced = _put_in_place(temporary, path)
        except BaseException:
            discard(temporary)
            raise
        calls.sync_path(path.parent)
        if replaced is not None:
            discard(replaced)


def replace_in_folder(path: Path, name: str, content: bytes | str) -> None:
    """Replace a file of a published folder, and its entry in the manifest.

    The folder agrees with its manifest at every moment: first the entry goes, then the file changes, then it is entered
    again. Whoever calls this holds the folder's lock, for two at a time would enter each other's hashes.

    Args:
        path: A published folder.
        name: The file, by its path in the folder; it may be new.
        content: What it holds from now on.

    Raises:
        CorruptError: The folder has no readable manifest.
    """
    body = {key: value for key, value in read_manifest(path).items() if key != "sha256"}
    others = {key: entry for key, entry in body["files"].items() if key != name}
    write_file(path / MANIFEST, sealed({**body, "files": others}))
    write_file(path / name, content)
    entry = {"bytes": (path / name).stat().st_size, "sha256": hash_file(path / name)}
    write_file(path / MANIFEST, sealed({**body, "files": dict(sorted({**others, name: entry}.items()))}))


def make_folders(path: Path) -> None:
    """Make a folder and the parents it lacks, each durably; what is there stays.

    Raises:
        NotADirectoryError: A file stands in the way.
    """
    missing = []
    place = path.absolute()
    while not place.exists():
        missing.append(place)
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    for folder in reversed(missing):
        try:
            calls.make_folder(folder)
        except FileExistsError:  # another process was faster
            if not folder.is_dir():
                raise
        calls.sync_path(folder.parent)


def open_log(path: Path) -> TextIO:
    """Open a log for appending lines; a new one is durably there before its first line.

    A lone surrogate, which UTF-8 cannot hold, is written as its JSON escape.
    """
    if not path.exists():
        write_file(path, b"")
    return path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def sync_log(file: TextIO) -> None:
    """Bring every line of a log to the disk."""
    file.flush()
    calls.sync(file.fileno(), Path(file.name))


def _write(path: Path, content: bytes | str, put_in_place: Callable[[Path, Path], None]) -> None:
    temporary = beside(path, "tmp")
    with naming_full_disks(path):
        make_folders(path.parent)
        try:
            descriptor = calls.create(temporary)
            try:
                calls.write(descriptor, content.encode() if isinstance(content, str) else content, temporary)
                calls.sync(descriptor, temporary)
            finally:
                os.close(descriptor)
            put_in_place(temporary, path)
        except BaseException:
            discard(temporary)
            raise
        calls.sync_path(path.parent)


def _complete(temporary: Path, facts: Mapping[str, object]) -> None:
    """Bring all that is in the folder to the disk, and then the manifest, which says that it is complete."""
    inside = sorted(temporary.rglob("*"))
    files = [path for path in inside if path.is_file()]
    # safetensors writes mode 0600 whatever the umask says; the folder's own mode tells what that is.
    # (os.umask could only tell by changing it for a moment, for all threads.)
    mode = temporary.stat().st_mode & 0o666
    for file in files:
        calls.set_mode(file, mode)
        calls.sync_path(file)
    for folder in (path for path in inside if path.is_dir()):
        calls.sync_path(folder)
    write_file(temporary / MANIFEST, manifest_text(temporary, files, facts))


def _put_in_place(temporary: Path, path: Path) -> Path | None:
    """Give the folder its name; return where what was there before is now."""
    if not os.path.lexists(path):
        calls.rename(temporary, path)
        return None
    with suppress(calls.NotOfferedError):
        calls.exchange(temporary, path)
        return temporary
    replaced = beside(path, "kept")
    discard(replaced)
    calls.rename(path, replaced)
    try:
        calls.rename(temporary, path)
    except BaseException:
        calls.rename(replaced, path)
        raise
    return replaced
