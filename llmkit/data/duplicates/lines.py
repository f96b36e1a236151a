"""Lines that many documents share: menus, footers, licence headers."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmkit.data.words import Hashes

_SCANNED = 2**20
"""Keys looked at together."""
_HELD = 2**25
"""Keys sorted together, about: 256 MB."""


def line_keys(text: str) -> Hashes:
    """Keys of the text's different lines, blank ones left out, white space around a line ignored.

    Returns:
        uint64 [lines], ascending, none twice: BLAKE2b-64 of the line in UTF-8.
    """
    return np.unique(_keys([stripped for line in text.split("\n") if (stripped := line.strip())]))


def frequent_lines(keys: Sequence[Hashes], more_than: int, *, passes: int | None = None) -> Hashes:
    """The lines that stand in more than so many documents.

    Keys are counted by ranges of their value, one range a pass, so memory is bounded by the largest range.

    Args:
        keys: Arrays of `line_keys` of single documents, one after another (a line stands once for each document
            that has it), in any order; they may be memory-mapped.
        more_than: A line is frequent when it is in more documents than this.
        passes: How many times the arrays are read; by default so many that a pass holds some 256 MB.

    Returns:
        uint64 [lines], ascending.
    """
    total = sum(len(array) for array in keys)
    passes = passes or -(-total // _HELD) or 1
    bounds = [2**64 * number // passes for number in range(passes + 1)]
    found = [_frequent(_within(keys, low, high - 1), more_than) for low, high in pairwise(bounds)]
    return np.concatenate(found)


def strip_lines(text: str, frequent: Hashes) -> tuple[str, int]:
    """The text without its frequent lines, and how many were taken out; blank lines stay.

    Args:
        text: The document.
        frequent: What `frequent_lines` gave.
    """
    lines = text.split("\n")
    stripped = [line.strip() for line in lines]
    is_frequent = _among(_keys(stripped), frequent)
    kept = [
        line
        for line, bare, out in zip(lines, stripped, is_frequent.tolist(), strict=True)
        if not (out and bare)
    ]
    return ("\n".join(kept), len(lines) - len(kept)) if len(kept) < len(lines) else (text, 0)


def _keys(lines: Sequence[str]) -> Hashes:
    digests = [
        hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest() for line in lines
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _within(keys: Sequence[Hashes], low: int, last: int) -> Hashes:
    """All keys from `low` to `last`, sorted."""
    picked = np.empty(sum(int(mask.sum()) for _, mask in _scan(keys, low, last)), np.uint64)
    at = 0
    for chunk, mask in _scan(keys, low, last):
        found = chunk[mask]
        picked[at : at + len(found)] = found
        at += len(found)
    picked.sort()
    return picked


def _scan(keys: Sequence[Hashes], low: int, last: int) -> Iterator[tuple[Hashes, NDArray[np.bool_]]]:
    for array in keys:
        for start in range(0, len(array), _SCANNED):
            chunk = np.asarray(array[start : start + _SCANNED])
            yield chunk, (chunk >= np.uint64(low)) & (chunk <= np.uint64(last))


def _frequent(ordered: Hashes, more_than: int) -> Hashes:
    """Values that stand more often than that in a sorted array: the value so many places on is still the same."""
    if len(ordered) <= more_than:
        return np.empty(0, np.uint64)
    return np.unique(ordered[more_than:][ordered[more_than:] == ordered[: len(ordered) - more_than]])


def _among(keys: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(keys), np.bool_)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return ordered[places] == keys
