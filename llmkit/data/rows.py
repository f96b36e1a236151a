"""Rows of `context` tokens cut out of token streams, as arrays ready for a model.

Row i of a stream is tokens[i*T : i*T + T + 1]: T inputs and, one further, T targets. So each token but a
stream's first is predicted exactly once.

Shapes: B rows, T = context.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmkit.errors import DataError

Ints = npt.NDArray[np.int64]
Row = dict[str, Ints]
"""`ids`, up to T + 1 of them; where documents are isolated `positions`, of each token in its document; and from the
loader `seed`, a scalar: all that is random about the row follows from it."""


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
        context: T, the tokens in a row.
        partial: Also count a stream's last row that is shorter than T, as evaluation does. Then every token but a
            stream's first is predicted. Streams without any token are allowed. Training leaves that row out (under
            T of a stream's tokens), so that all its rows are full.

    Attributes:
        sizes: Rows in each stream.

    Raises:
        DataError: A stream is too short for one row.
    """

    def __init__(self, streams: Sequence[Stream], context: int, *, partial: bool = False) -> None:
        self.streams = list(streams)
        self.context = context
        self.sizes = [self._num_rows(stream, partial) for stream in self.streams]

    def __len__(self) -> int:
        return sum(self.sizes)

    def _num_rows(self, stream: Stream, partial: bool) -> int:
        num_targets = max(stream.num_tokens - 1, 0)
        if partial:
            return -(-num_targets // self.context)
        if num_targets < self.context:
            raise DataError(
                f"the context is longer than the text: {stream.name!r} has {stream.num_tokens:,} tokens "
                f"to train on, a row of `context: {self.context}` needs {self.context + 1:,}",
                hint=_what_fits(num_targets),
            )
        return num_targets // self.context

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
            found["positions"] = _restarting_positions(
                stream.document_starts(start, stop) - start, stop - start
            )
        return found

    def _span(self, source: int, row: int) -> tuple[int, int]:
        if not 0 <= row < self.sizes[source]:
            raise IndexError(f"row {row} of {self.sizes[source]} in {self.streams[source].name!r}")
        start = row * self.context
        return start, min(start + self.context + 1, self.streams[source].num_tokens)


def _restarting_positions(starts: Ints, length: int) -> Ints:
    """0..length-1, counted anew from each of `starts`."""
    count = np.arange(length, dtype=np.int64)
    begin = np.zeros(length, dtype=np.int64)
    begin[starts] = starts
    return count - np.maximum.accumulate(begin)


def _what_fits(num_targets: int) -> str:
    if num_targets < 2:
        return "add text, or lower `held_out`"
    return f"`context: {num_targets}` would fit; or add text, or put this source's files into another source"
