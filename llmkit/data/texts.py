"""A source's texts in parts: read from its files, or from what preparation made of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from llmkit.data.npy import NpyWriter
from llmkit.data.parts import Part, parts_of, read_part
from llmkit.data.places import Tally
from llmkit.data.sources import check_found, fingerprint
from llmkit.errors import DataError

if TYPE_CHECKING:
    from llmkit.data.places import Document
    from llmkit.recipe.schema import Source

Stamp = tuple[int, int, int] | None
"""A file's size, time of change and inode; None where it cannot be asked for."""

SMALLEST_PART = 8 * 2**20
LARGEST_PART = 256 * 2**20
_PARTS = 2048
_BLOCK = 2**16
"""Ends of texts looked at together."""


class Texts(Protocol):
    """The texts of one source; picklable, for it goes to other processes."""

    @property
    def name(self) -> str:
        """What the source is called."""

    @property
    def identity(self) -> str:
        """A hash of all that decides the texts."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part, as they lie on the disk."""

    @property
    def cut(self) -> str:
        """A hash of how the texts are cut into parts: what is made part by part belongs to one way of cutting."""

    def read(self, number: int, tally: Tally) -> Iterator[str]:
        """The texts of a part, none of them blank, always in the same order."""

    def check(self, tally: Tally) -> None:
        """Check that all parts together gave what they should.

        Raises:
            DataError: They gave no text at all.
        """


@dataclass(frozen=True)
class SourceTexts:
    """A source's texts as its files hold them."""

    source: "Source"
    parts: tuple[Part, ...]
    name: str
    identity: str
    stamps: tuple[tuple[str, Stamp], ...] = ()

    @classmethod
    def of(cls, source: "Source", *, name: str, base: Path, cache: Path, size: int) -> "SourceTexts":
        """Cut the source into parts and hash its content; `size` is about how many bytes it has."""
        parts = tuple(parts_of(source, base, cache=cache, part_bytes=part_bytes(size)))
        local = {
            segment.file for part in parts for segment in part.segments if isinstance(segment.file, Path)
        }
        stamps = {str(path): _stamp(path) for path in local}
        # What is skipped is no part of the content, but whether anything may be.
        identity = combined(fingerprint(source, base, cache=cache), source.on_error)
        return cls(source, parts, name, identity, tuple(sorted(stamps.items())))

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part."""
        return [part.num_bytes for part in self.parts]

    @property
    def cut(self) -> str:
        """A hash of where the cuts are, whatever the files are called."""
        return combined(
            [[(one.start, one.stop, one.num_bytes) for one in part.segments] for part in self.parts]
        )

    def read(self, number: int, tally: Tally) -> Iterator[str]:
        """The texts of a part."""
        for document in self.documents(number, tally):
            yield document.text

    def check(self, tally: Tally) -> None:
        """Check that the source gave documents.

        Raises:
            DataError: It gave none; says what there was instead.
        """
        check_found(tally, self.name)

    def documents(self, number: int, tally: Tally, *, whole_rows: bool = False) -> Iterator["Document"]:
        """The documents of a part, with their places; `whole_rows` as for `read_part`.

        Raises:
            DataError: As `read_part`; or a file has changed since its content was hashed.
        """
        yield from read_part(self.parts[number], self.source, tally=tally, whole_rows=whole_rows)
        stamps = dict(self.stamps)
        for segment in self.parts[number].segments:
            name = str(segment.file)
            if name in stamps and _stamp(Path(name)) != stamps[name]:
                raise DataError(
                    f"{name}: it was changed while it was read", hint="run the same command again"
                )


@dataclass(frozen=True)
class KeptTexts:
    """A source's texts after preparation: parts of text, and which of their documents were kept.

    Attributes:
        folders: A folder of stored texts for each part, see `TextWriter`.
        keep: A `.npy` file of booleans, one a document over all parts of all sources.
        starts: Where each part's documents begin in `keep`.
    """

    folders: tuple[Path, ...]
    keep: Path
    starts: tuple[int, ...]
    name: str
    identity: str

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part's text."""
        return [(folder / TEXT).stat().st_size for folder in self.folders]

    @property
    def cut(self) -> str:
        """A hash of how many documents each part has."""
        return combined(self.identity, self.starts, len(self.folders))

    def read(self, number: int, tally: Tally) -> Iterator[str]:
        """The texts of a part that were kept."""
        keep = np.load(self.keep, mmap_mode="r")[self.starts[number] :]
        for place, text in enumerate(StoredTexts(self.folders[number])):
            if keep[place]:
                tally.bytes_read += len(text)
                tally.documents += 1
                yield text

    def check(self, tally: Tally) -> None:
        """Nothing is wrong with a source of which preparation kept nothing, as long as others are left."""


TEXT, ENDS = "text.bin", "ends.npy"


class TextWriter:
    """Writes texts into a folder: `text.bin` holds them in UTF-8 one after the other, `ends.npy` where each ends."""

    def __init__(self, folder: Path) -> None:
        self._text = (folder / TEXT).open("wb", buffering=2**20)
        self._ends = NpyWriter(folder / ENDS, np.dtype(np.int64))
        self._end = 0
        self.count = 0

    def add(self, text: str) -> None:
        """Append one document."""
        data = text.encode()
        self._text.write(data)
        self._end += len(data)
        self._ends.append(np.array([self._end], dtype=np.int64))
        self.count += 1

    def close(self) -> None:
        """Finish both files."""
        self._text.close()
        self._ends.close()


class StoredTexts:
    """The texts that a `TextWriter` wrote, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ends: npt.NDArray[np.int64] = np.load(folder / ENDS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        start = 0
        with (self._folder / TEXT).open("rb", buffering=2**20) as file:
            for first in range(0, len(self.ends), _BLOCK):
                for end in self.ends[first : first + _BLOCK].tolist():
                    yield file.read(end - start).decode()
                    start = end

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each text."""
        return np.diff(self.ends, prepend=0)


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def part_bytes(total: int) -> int:
    """How large parts are for a source of `total` bytes: a power of two, so that there are at most a few thousand."""
    size = SMALLEST_PART
    while size < LARGEST_PART and total // size > _PARTS:
        size *= 2
    return size


def combined(*pieces: Any) -> str:
    """One hash of several values."""
    return hashlib.sha256(repr(pieces).encode()).hexdigest()
