"""Documents whose text is the same, by 128-bit keys."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]

KEY_BYTES = 16


def document_keys(texts: Iterable[str]) -> Keys:
    """A key for each text: equal texts have equal keys, and no two others ever will.

    Returns:
        uint64 [texts, 2]: BLAKE2b-128 of the text in UTF-8, so the same on every machine.

    **Source**: BLAKE2b, RFC 7693. With 10^12 documents two of them share 128 bits with a chance of 10^-15.
    """
    digests = [
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()
        for text in texts
    ]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).astype(np.uint64)


def keep_first(keys: Sequence[Keys]) -> list[Mask]:
    """Which documents to keep so that of every group of equal keys the first stays.

    Memory is about 24 bytes a document, besides the keys themselves (which may be memory-mapped).

    Args:
        keys: For each part uint64 [documents, 2], in the order of the corpus.

    Returns:
        For each part bool [documents].
    """
    edges = part_edges(keys)
    keep = np.ones(edges[-1], np.bool_)
    repeated = _in_runs(joined([part[:, 0] for part in keys], np.uint64))
    if len(repeated):
        firsts, seconds = gathered(keys, edges, repeated).T
        # By key, then by place: `repeated` ascends and the sort is stable.
        order = np.lexsort((seconds, firsts))
        same = (np.diff(firsts[order]) == 0) & (np.diff(seconds[order]) == 0)
        keep[repeated[order[1:][same]]] = False
    return split_parts(keep, edges)


def part_edges(parts: Sequence[NDArray[np.generic]]) -> list[int]:
    """Where in the whole corpus each part begins, and where the last one ends."""
    return [0, *np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()]


def joined(parts: Sequence[NDArray[np.generic]], kind: type) -> NDArray[np.generic]:
    """The parts one after another as one array of that type."""
    return np.concatenate([np.empty(0, kind), *(np.asarray(part, kind) for part in parts)])


def split_parts(mask: Mask, edges: Sequence[int]) -> list[Mask]:
    """A mask over the whole corpus as one for each part."""
    return [mask[start:stop].copy() for start, stop in pairwise(edges)]


def gathered(
    parts: Sequence[NDArray[np.generic]], edges: Sequence[int], places: NDArray[np.int64]
) -> NDArray[np.generic]:
    """Rows of the whole corpus from arrays by part, in the order of `places`."""
    rows = np.empty((len(places), *parts[0].shape[1:]), parts[0].dtype)
    part_of = np.searchsorted(edges, places, side="right") - 1
    for part in np.unique(part_of).tolist():
        here = np.flatnonzero(part_of == part)
        rows[here] = parts[part][places[here] - edges[part]]
    return rows


def _in_runs(values: NDArray[np.generic]) -> NDArray[np.int64]:
    """The places of values that stand more than once, ascending."""
    order = np.argsort(values, kind="stable")
    values = values[order]
    equal = values[1:] == values[:-1]
    del values
    repeated = np.zeros(len(order), np.bool_)
    repeated[order[1:][equal]] = True
    repeated[order[:-1][equal]] = True
    return np.flatnonzero(repeated)
