"""Where a file can be cut so that its pieces can be read apart, by bytes and without knowing what lies before."""

import codecs
import re
from collections.abc import Iterable, Iterator

SECTION = 4 * 2**20
"""Running text may be cut near multiples of so many bytes, whoever reads it, so its documents are always the same."""
WINDOW = 2**20
"""How far after such a place a blank line is looked for; after that the next line end does."""

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
# Encodings in which the byte 0x0a is always a line end, and which need not be read from the beginning.
_CUTTABLE = re.compile(
    r"ascii|utf-8|iso8859-\d+|cp(125\d|437|8\d\d|93[26]|949|950)|koi8-\w|gb2312|gbk|gb18030|big5|big5hkscs"
    r"|euc_\w+|shift_jis\w*"
)


def is_cuttable(encoding: str) -> bool:
    """Whether text in this encoding can be cut at its line ends, told by bytes."""
    try:
        return _CUTTABLE.fullmatch(codecs.lookup(encoding).name) is not None
    except LookupError:
        return False


def sections(
    chunks: Iterable[bytes], begin: int, cuts: Iterable[int], *, window: int = 0, to_end: bool = True
) -> Iterator[tuple[int, bytes]]:
    """A stream of bytes, cut at line ends.

    A cut asked for at byte `c` is made after the first blank line that ends in `c` to `c + window`, or else
    after the first line end from byte `c - 1` on. So it depends on the bytes from there on alone.

    Args:
        chunks: The bytes in pieces, cut anywhere.
        begin: The byte of the file at which they begin, before or at the first cut minus 1.
        cuts: Where to cut, ascending; may be endless.
        window: How far to look for a blank line; with 0 only line ends count.
        to_end: Whether what comes after the last cut is wanted.

    Yields:
        The byte at which the section begins, and a piece of it.
    """
    stream, section = _Stream(chunks, begin), begin
    for cut in cuts:
        yield from ((section, piece) for piece in stream.until(cut - 1))
        if stream.is_over():
            return
        blank = _after_blank_line(stream, cut, window) if window else None
        if blank is not None:
            yield from ((section, piece) for piece in stream.until(blank))
        elif stream.at < cut:  # else the line end that is looked for is the one before `at`
            yield from ((section, piece) for piece in stream.until_line_end())
        section = stream.at
    if to_end:
        yield from ((section, piece) for piece in stream.rest())


def _after_blank_line(stream: "_Stream", cut: int, window: int) -> int | None:
    """Where the first blank line ends that begins after a line end from byte `cut - 1` on, if within the window."""
    stream.hold(cut + window)
    # Beyond the cut: then a line end stood before `at`, for the cut before this one was made there.
    before = b"\n" if stream.at >= cut else b""
    found = _BLANK_LINE.search(before + stream.held[: max(cut + window - stream.at, 0)])
    return stream.at + found.end() - len(before) if found else None


class _Stream:
    """Bytes in pieces, of which the next few can be looked at before they are taken.

    Attributes:
        at: The byte of the file that comes next.
        held: What was read and not yet taken.
    """

    def __init__(self, chunks: Iterable[bytes], at: int) -> None:
        self._chunks = (chunk for chunk in chunks if chunk)
        self.at = at
        self.held = b""

    def is_over(self) -> bool:
        """Whether nothing comes any more."""
        return not self.held and not self._read()

    def hold(self, end: int) -> None:
        """Read so far that all before byte `end` is held, if there is so much."""
        while self.at + len(self.held) < end and self._read():
            pass

    def until(self, end: int) -> Iterator[bytes]:
        """Take all before byte `end`."""
        while self.at < end and not self.is_over():
            yield self._take(end - self.at)

    def until_line_end(self) -> Iterator[bytes]:
        """Take all up to the next line end, and that."""
        end = 0
        while not end and not self.is_over():
            end = self.held.find(b"\n") + 1
            yield self._take(end or len(self.held))

    def rest(self) -> Iterator[bytes]:
        """Take everything."""
        while not self.is_over():
            yield self._take(len(self.held))

    def _read(self) -> bool:
        chunk = next(self._chunks, b"")
        self.held = self.held + chunk if self.held else chunk
        return bool(chunk)

    def _take(self, size: int) -> bytes:
        piece, self.held = self.held[:size], self.held[size:]
        self.at += len(piece)
        return piece
