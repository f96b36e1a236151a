"""Rows cut out of token streams, as arrays ready for an objective.

Row i of a stream is tokens[i*S : i*S + S + O]: S of its own (the stride), and O of the next row's (the overlap). Where
each token is predicted from those before it, O is 1: S inputs and, one further, S targets, so each token but a stream's
first is predicted exactly once.

Shapes: B rows, S = stride, O = overlap.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmkit.errors import DataError

Ints = npt.NDArray[np.int64]
Row = dict[str, Ints]
"""`ids`, up to S + O of them; where they are asked for `positions`, of each token in its document, and `other`, the
ids of a row that shares no document with it; and from the loader `seed`, a scalar: all that is random about the row
follows from it."""


class Stream(Protocol):
    """What `Rows` needs of a token stream; `shards.TokenStream` is one."""

    @property
    def name(self) -> str:
        """What to call the stream in a message."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""

    def read(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens in [start, stop)."""

    def document_starts(self, start: int, stop: int) -> Ints:
        """The positions in [start, stop) at which documents begin, sorted."""


class Rows:
    """All rows of some streams.

    Args:
        streams: One per source.
        stride: S, the tokens of a row's own.
        overlap: O, tokens of the next row that it sees too.
        partial: Also count a stream's last row that is shorter than S, as evaluation does: then no token is left out.
            Streams without any token are allowed. Training leaves that row out (under S of a stream's tokens), so
            that all its rows are full.

    Attributes:
        sizes: Rows in each stream.

    Raises:
        DataError: A stream is too short for one row.
    """

    def __init__(
        self, streams: Sequence[Stream], stride: int, *, overlap: int = 1, partial: bool = False
    ) -> None:
        self.streams = list(streams)
        self.stride = stride
        self.overlap = overlap
        self.sizes = [self._num_rows(stream, partial) for stream in self.streams]

    def __len__(self) -> int:
        return sum(self.sizes)

    def _num_rows(self, stream: Stream, partial: bool) -> int:
        usable = max(stream.num_tokens - self.overlap, 0)
        if partial:
            return -(-usable // self.stride)
        if usable < self.stride:
            raise DataError(
                f"the context is longer than the text: {stream.name!r} has {stream.num_tokens:,} tokens "
                f"to train on, a row needs {self.stride + self.overlap:,}",
                hint=_what_fits(usable),
            )
        return usable // self.stride

    def locate(self, index: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Source and row of each number in plain order: the first stream's rows, then the second's, ..."""
        ends = np.cumsum(self.sizes, dtype=np.int64)
        given = np.asarray(index, dtype=np.int64)
        source = np.searchsorted(ends, given, side="right")
        return source, given - (ends - self.sizes)[source]

    def take(self, sources: npt.ArrayLike, rows: npt.ArrayLike, *, isolate: bool = False) -> list[Row]:
        """Read rows.

        Args:
            sources: The stream of each row.
            rows: The row within its stream.
            isolate: Say where documents begin: `positions` count from the start of each token's document, or from
                the start of the row in a document that began before it.
        """
        places = zip(np.asarray(sources).tolist(), np.asarray(rows).tolist(), strict=True)
        return [self._read(source, row, isolate) for source, row in places]

    def _read(self, source: int, row: int, isolate: bool) -> Row:
        start, stop = self._span(source, row)
        stream = self.streams[source]
        found: Row = {"ids": stream.read(start, stop).astype(np.int64)}
        if isolate:
            found["positions"] = restarting_positions(
                stream.document_starts(start, stop) - start, stop - start
            )
        return found

    def _span(self, source: int, row: int) -> tuple[int, int]:
        if not 0 <= row < self.sizes[source]:
            raise IndexError(f"row {row} of {self.sizes[source]} in {self.streams[source].name!r}")
        start = row * self.stride
        return start, min(start + self.stride + self.overlap, self.streams[source].num_tokens)

    def take_other(self, source: int, row: int, seed: int) -> Row:
        """Another row, drawn by `seed`, that shares no document with this one; with `positions`.

        Raises:
            DataError: None was found: nearly all the text is one document.
        """
        found = self.find_other(source, row, seed)
        if found is None:
            raise DataError(
                f"no text of another document was found for row {row:,} of {self.streams[source].name!r}",
                hint="set `documents: paragraph` or `documents: line` on the source, or choose an objective without "
                "pairs",
            )
        return found

    def find_other(self, source: int, row: int, seed: int) -> Row | None:
        """The same; None where there is none."""
        first, last = self._near(source, row)
        elsewhere = len(self) - (last - first)
        if not elsewhere:
            return None
        drawn = int(np.random.default_rng(seed).integers(elsewhere))
        begins = sum(self.sizes[:source]) + first
        (other,), (there,) = self.locate([drawn if drawn < begins else drawn + last - first])
        return self._read(int(other), int(there), isolate=True)

    def _near(self, source: int, row: int) -> tuple[int, int]:
        """The rows [first, last) of the same source that share a document with this one, itself among them."""
        start, stop = self._span(source, row)
        stream = self.streams[source]
        before, after = stream.document_starts(0, start + 1), stream.document_starts(stop, stream.num_tokens)
        begins = int(before[-1]) if len(before) else 0
        ends = int(after[0]) if len(after) else stream.num_tokens
        # A row that only reaches into these documents by its overlap sees them, too.
        first = max(0, (begins - self.overlap) // self.stride)
        return first, min(self.sizes[source], -(-ends // self.stride))


def restarting_positions(starts: Ints, length: int) -> Ints:
    """0..length-1, counted anew from each of `starts`."""
    count = np.arange(length, dtype=np.int64)
    begin = np.zeros(length, dtype=np.int64)
    begin[starts] = starts
    return count - np.maximum.accumulate(begin)


def _what_fits(num_targets: int) -> str:
    if num_targets < 2:
        return "add text, or lower `held_out`"
    return f"`context: {num_targets}` would fit; or add text, or put this source's files into another source"
