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
from llmkit.data.sources import check_found

if TYPE_CHECKING:
    from llmkit.data.places import Document
    from llmkit.recipe.schema import Source

SMALLEST_PART = 8 * 2**20
LARGEST_PART = 256 * 2**20
_PARTS = 2048


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

    @classmethod
    def of(
        cls, source: "Source", *, name: str, identity: str, base: Path, cache: Path, size: int
    ) -> "SourceTexts":
        """Cut the source into parts; `size` is about how many bytes it has."""
        return cls(
            source, tuple(parts_of(source, base, cache=cache, part_bytes=part_bytes(size))), name, identity
        )

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part."""
        return [part.num_bytes for part in self.parts]

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

    def documents(self, number: int, tally: Tally) -> Iterator["Document"]:
        """The documents of a part, with their places."""
        return read_part(self.parts[number], self.source, tally=tally)


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
            for end in self.ends.tolist():
                yield file.read(end - start).decode()
                start = end

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each text."""
        return np.diff(self.ends, prepend=0)


def part_bytes(total: int) -> int:
    """How large parts are for a source of `total` bytes: a power of two, so that there are at most a few thousand."""
    size = SMALLEST_PART
    while size < LARGEST_PART and total // size > _PARTS:
        size *= 2
    return size


def combined(*pieces: Any) -> str:
    """One hash of several values."""
    return hashlib.sha256(repr(pieces).encode()).hexdigest()
