"""Files: which ones a recipe's paths mean, and their bytes in pieces, decompressed, in bounded memory."""

import glob
import gzip
import hashlib
import logging
import os
import select
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache as remember
from pathlib import Path
from typing import Any, BinaryIO

from llmkit.data.places import FileFault, Tally
from llmkit.data.remote import RemoteFile
from llmkit.durable import scratch_folder, write_folder
from llmkit.errors import DataError, MissingError

CHUNK_BYTES = 2**18  # fits a processor's cache, which is several times faster than a megabyte
_ZSTD_CHUNK_BYTES = 2**14  # zstd can blow a byte up a thousandfold: little in keeps little out
_MOST_NAMES = 8
_SILENCE_S = 5.0

File = Path | RemoteFile
"""A file here or elsewhere."""


def resolve(patterns: Sequence[str], base: Path) -> list[Path]:
    """The files that paths, globs and folders mean: in the order given, sorted within each, none twice.

    A relative one is looked for in the current folder and, where nothing is there, in `base`. A folder means
    all files in and below it; hidden files and folders are passed over.

    Raises:
        DataError: Nothing is there; the message names what is near.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_matches(pattern, base)))
    return list(found)


def shown(path: File) -> str:
    """The path as messages show it: relative to the current folder where it lies below."""
    if isinstance(path, RemoteFile):
        return path.shown
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def ending(path: File) -> tuple[str, str]:
    """The ending that tells the form and the one that tells the compression: `.jsonl`, `.zst` or empty."""
    if path.suffix.lower() in (".gz", ".zst"):
        return Path(path.stem).suffix.lower(), path.suffix.lower()
    return path.suffix.lower(), ""


def hash_of(path: File) -> str:
    """SHA-256 of the file's bytes as they are on disk; for one elsewhere of what tells its content.

    Raises:
        DataError: The file cannot be read.
    """
    if isinstance(path, RemoteFile):
        return path.identity()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def read_chunks(path: File, tally: Tally, *, start: int = 0) -> Iterator[bytes]:
    """The file's bytes, decompressed, in pieces of some hundred kilobytes.

    Args:
        path: The file.
        tally: Counts the bytes taken from disk.
        start: The byte to begin with; for files that are not compressed.

    Raises:
        DataError: The file cannot be read, or its compressed data is damaged or ends too early.
        MissingError: It is a `.zst` file and zstandard is not installed, or it cannot be reached.
    """
    compression = ending(path)[1]
    decompressed = {".gz": _gunzip, ".zst": _unzstd}.get(compression, _plain)
    try:
        with open_file(path, start) as file:
            yield from decompressed(_Counting(file, tally), path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileFault(
            f"{shown(path)}: damaged {compression} data ({error})",
            hint="copy or download the file again",
            reason=f"damaged {compression} data",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def open_file(path: File, start: int = 0) -> Any:
    """The file to read bytes from, beginning at byte `start`.

    Raises:
        OSError: The system does not let us.
        MissingError: It is elsewhere and cannot be reached.
    """
    if isinstance(path, RemoteFile):
        return path.open(start)
    file = path.open("rb", buffering=0)
    if start:
        file.seek(start)
    return file


def unreadable(path: File, error: OSError) -> FileFault:
    """The error for a file that the system does not let us read."""
    reason = error.strerror or str(error)
    hint = f"chmod u+r {shown(path)}" if isinstance(error, PermissionError) else ""
    return FileFault(
        f"{shown(path)}: cannot be read ({reason})", hint=hint, reason=f"cannot be read ({reason})"
    )


def size_of(path: File) -> int:
    """Bytes of the file on disk; 0 for one elsewhere whose size is not told.

    Raises:
        DataError: The file cannot be looked at.
    """
    if isinstance(path, RemoteFile):
        return path.size or 0
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


@remember
def spool_stdin(cache: Path) -> Path:
    """Copy standard input into the cache, once a process, to a file named by its hash; return that file.

    Raises:
        DataError: Standard input is a terminal, or nothing comes from it.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "`files: -` reads standard input, but nothing is piped into it",
            hint="cat books/*.txt | llmkit run RECIPE",
        )
    _note_silence()
    folder = cache / "stdin"
    with scratch_folder(folder) as temporary:
        text = temporary / "stdin"
        with text.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, CHUNK_BYTES)
        if not text.stat().st_size:
            raise DataError(
                "`files: -` reads standard input, but that ended before a single byte came",
                hint="see whether the command before the `|` writes anything",
            )
        spooled = folder / hash_of(text)
        if not spooled.is_dir():
            with write_folder(spooled) as published:
                text.rename(published / "stdin")
    return spooled / "stdin"


def _note_silence() -> None:
    """Say that we wait, where nothing comes: a service may leave standard input open for ever."""
    try:
        ready = select.select([sys.stdin.fileno()], [], [], _SILENCE_S)[0]
    except (OSError, ValueError):  # a stand-in without a file behind it
        return
    if not ready:
        logging.getLogger(__name__).warning("waiting for text on standard input; nothing has come yet")


class _Counting:
    """A binary file that adds what is read from it to a tally."""

    def __init__(self, file: BinaryIO, tally: Tally) -> None:
        self._file = file
        self._tally = tally

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._tally.bytes_read += len(data)
        return data


def _plain(file: _Counting, _path: File) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gunzip(file: _Counting, _path: File) -> Iterator[bytes]:
    reader: Any = gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[call-overload]
    while chunk := reader.read(CHUNK_BYTES):
        yield chunk


def _unzstd(file: _Counting, path: File) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise MissingError(
            f"{shown(path)}: reading .zst needs the package zstandard", hint="pip install 'llmkit[zstd]'"
        ) from None
    # Not zstandard's own stream reader: that one takes a file that ends too early for a whole one.
    frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    begun = False
    try:
        while data := file.read(_ZSTD_CHUNK_BYTES):
            while data:
                begun = True
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(), False
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if begun:
        raise EOFError("it ends too early")


def _matches(pattern: str, base: Path) -> list[Path]:
    expanded = os.path.expanduser(pattern)
    for root in (Path.cwd(), base):
        path = root / expanded
        if path.is_file():
            return [path]
        if path.is_dir():
            return _files_below(path) or _fail_on_empty(path)
        if glob.has_magic(expanded):
            found = [root / match for match in sorted(glob.glob(expanded, root_dir=root, recursive=True))]
            files = [file for match in found for file in (_files_below(match) if match.is_dir() else [match])]
            if files:
                return files
    raise _nothing_there(pattern, base / expanded if not (Path.cwd() / expanded).parent.is_dir() else None)


def _files_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _fail_on_empty(folder: Path) -> list[Path]:
    raise DataError(f"{shown(folder)}: the folder holds no files (hidden ones do not count)")


def _nothing_there(pattern: str, elsewhere: Path | None) -> DataError:
    path = elsewhere or Path.cwd() / os.path.expanduser(pattern)
    missing = path.name
    while not path.parent.is_dir():
        path = path.parent
        missing = path.name
    names = sorted(name for name in os.listdir(path.parent) if not name.startswith("."))
    close = get_close_matches(missing, names, n=3, cutoff=0.5)
    listed = close or names[:_MOST_NAMES]
    what = "no file matches" if glob.has_magic(pattern) else "no such file or folder:"
    if not listed:
        return DataError(f"{what} {pattern}", hint=f"the folder {shown(path.parent)} is empty")
    nearest = ", ".join(shown(path.parent / name) for name in listed)
    more = ", ..." if not close and len(names) > len(listed) else ""
    return DataError(f"{what} {pattern}", hint=f"{'nearest' if close else 'there are'}: {nearest}{more}")
