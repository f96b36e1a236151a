"""Near copies: MinHash signatures, candidates by locality-sensitive hashing, pairs checked, one kept of each group.

The documents kept are a function of the set of documents alone. Everything happens in the order of their rank
(longest first, then by key), which no file order or number of workers can change.

**Source**: Broder 1997, "On the resemblance and containment of documents" (shingles, MinHash); Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", chapter 3 (bands); Lee et al. 2022, "Deduplicating Training Data Makes
Language Models Better" (MinHash on n-grams, connected groups of which one document stays).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.data.duplicates.exact import Keys, Mask, gathered, part_edges, split_parts
from llmkit.data.duplicates.groups import Groups
from llmkit.data.words import RULES, Hashes, run_blocks, runs, scrambled, word_hashes
from llmkit.errors import MissingError
from llmkit.recipe.preparation import NearDuplicates

Signatures = NDArray[np.uint32]
Lengths = NDArray[np.integer]
Ranks = NDArray[np.int64]

_RULES = "near copies 1"
_SEED = 20220527
"""Of the permutations; another one would make other signatures."""
_FEW = 128
"""Documents signed at once; rensa starts threads of its own from 256 on, and workers are processes already."""
_MOST_CHARACTERS = 2**20
_PADDING = np.uint64(0x5851F42D4C957F2D)
_NOTHING = np.empty(0, np.uint64)
_SCANNED = 2**20
"""Documents looked at together."""
_ROWS = 2**12
"""Signatures looked at together."""
_WEIGHT_OF_MISSES = 0.95
_SMALL_BUCKET = 16
"""Up to so many documents a bucket's pairs are all checked."""
_LEADERS = 32
"""In a larger bucket every document is checked against so many others at most."""


class Signer:
    """Makes the MinHash signatures of texts: the share of equal places estimates the share of common shingles.

    A shingle is a run of `spec.ngram` words as `llmkit.data.words` has them (in Chinese, characters). A text with
    fewer words is one shingle as a whole, so it is a near copy of texts with just the same words; a text without
    any word is one of itself alone.

    rensa's full-set R-MinHash is used. Against the exact Jaccard similarity its estimate has no bias, and its
    deviation is that of 128 independent permutations or up to a third less (documents of some 30 to 100 shingles).

    Raises:
        MissingError: rensa is not installed.

    **Source**: Dahlgaard, Knudsen and Thorup 2017, "Fast Similarity Sketching" (what R-MinHash follows).
    """

    def __init__(self, spec: NearDuplicates) -> None:
        self._ngram = spec.ngram
        self._permutations = spec.permutations
        _rensa()  # missing? then before any work

    def sign(self, texts: Sequence[str]) -> Signatures:
        """The signatures of some texts.

        Returns:
            uint32 [texts, permutations].
        """
        signatures = np.empty((len(texts), self._permutations), np.uint32)
        for start, stop in _batches(texts):
            shingles, edges = self._shingles(texts[start:stop])
            matrix = _rensa().digest_matrix_from_flat_token_hashes(
                shingles, edges.astype(np.uint64), self._permutations, _SEED
            )
            signatures[start:stop] = np.array(matrix.to_rows(), np.uint32)
        return signatures

    def _shingles(self, texts: Sequence[str]) -> tuple[Hashes, Ranks]:
        """Hashes of the shingles of all texts, and where those of each text begin and the last end."""
        if len(texts) == 1 and len(texts[0]) > _MOST_CHARACTERS:
            long = np.concatenate([_NOTHING, *run_blocks(texts[0], [self._ngram])])
            if len(long):
                return long, np.array([0, len(long)])
        words, counts = word_hashes(texts)
        # Every text gets at least one shingle: what is shorter is filled up with a word that no text has.
        filled = np.maximum(counts, self._ngram)
        begins = np.cumsum(filled) - filled
        padded = np.full(int(filled.sum()), _PADDING, np.uint64)
        padded[np.arange(len(words)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)] = words
        for wordless in np.flatnonzero(counts == 0).tolist():
            padded[begins[wordless]] = _whole(texts[wordless])
        (_, shingles), *_ = runs(padded, [self._ngram])
        own = np.ones(len(padded), np.bool_)  # not the runs that cross from one text into the next
        for back in range(1, self._ngram):
            own[begins + filled - back] = False
        edges = np.concatenate(([0], np.cumsum(filled - self._ngram + 1)))
        return shingles[own[: len(shingles)]], edges


def near_identity() -> dict[str, str | int]:
    """What decides the result besides the texts and the settings.

    Raises:
        MissingError: rensa is not installed.
    """
    return {
        "rules": _RULES,
        "words": RULES,
        "rensa": int(_rensa().ALGORITHM_VERSION),
        "seed": _SEED,
    }


def near_copies(
    signatures: Sequence[Signatures],
    lengths: Sequence[Lengths],
    keys: Sequence[Keys],
    keep: Sequence[Mask],
    spec: NearDuplicates,
) -> list[Mask]:
    """Which documents to keep so that of every group of near copies one stays: the longest, then the smallest key.

    Two documents are near copies when their signatures agree in at least `spec.threshold` of the places; a group is
    what is connected by such pairs. Pairs are looked for where a band of the signature is equal (see `bands`). The
    threshold is applied to the estimate as it is: the estimate has no bias, so a margin in either direction would
    only move the threshold. At 128 permutations it is off by 0.035 (standard deviation) near 0.8.

    See `near_groups`, which also tells which document stays for which.

    Args:
        signatures: For each part uint32 [documents, permutations]; may be memory-mapped.
        lengths: For each part the documents' lengths, integers [documents].
        keys: For each part uint64 [documents, 2].
        keep: For each part bool [documents]; only documents marked True take part, the others stay False.
        spec: The settings.

    Returns:
        For each part bool [documents].
    """
    return kept_of(near_groups(signatures, lengths, keys, keep, spec), part_edges(signatures))


def kept_of(leaders: Ranks, edges: Sequence[int]) -> list[Mask]:
    """The masks of the documents that stay, by part, from what `near_groups` gave."""
    kept = np.empty(edges[-1], np.bool_)
    for start in range(0, len(leaders), _SCANNED):
        block = leaders[start : start + _SCANNED]
        kept[start : start + len(block)] = block == np.arange(start, start + len(block))
    return split_parts(kept, edges)


def near_groups(
    signatures: Sequence[Signatures],
    lengths: Sequence[Lengths],
    keys: Sequence[Keys],
    keep: Sequence[Mask],
    spec: NearDuplicates,
) -> Ranks:
    """Which document stays for each document; arguments as for `near_copies`.

    Time is about linear: in a bucket of more than 16 documents each is checked against 32 others at most, the best
    ranked ones that are not yet in one group. Memory is some 60 bytes a document, besides the arguments.

    Returns:
        int64 [documents of all parts]: a place in the whole corpus, its own for a document that stays; -1 for
        those that take no part.
    """
    edges = part_edges(signatures)
    corpus = _Corpus(signatures, edges, _ranked(lengths, keys, keep, edges), spec.permutations)
    copies, originals = corpus.drop_equal()
    groups = Groups(len(corpus.places))
    least = math.ceil(spec.threshold * spec.permutations - 1e-9)
    for columns in band_columns(spec.threshold, spec.permutations):
        _join_band(corpus, groups, columns, least)
    leaders = np.full(edges[-1], -1, np.int64)
    for start in range(0, len(corpus.places), _SCANNED):
        ranks = np.arange(start, min(start + _SCANNED, len(corpus.places)))
        leaders[corpus.places[ranks]] = corpus.places[groups.find(ranks)]
    leaders[copies] = leaders[originals]
    return leaders


def band_columns(threshold: float, permutations: int) -> list[tuple[int, int]]:
    """The columns of a signature that make up each band."""
    number, rows = bands(threshold, permutations)
    return [(band * rows, (band + 1) * rows) for band in range(number)]


@cache
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """How many bands of how many rows find the pairs above a threshold best.

    A pair of similarity s meets in some band with the probability 1 - (1 - s^rows)^bands. The area of that curve
    below the threshold stands for pairs compared needlessly, the area above the curve from the threshold on for
    copies missed. As every pair found is checked, a needless one costs only time: misses weigh 19 times as much.

    Returns:
        Number of bands and rows in a band.

    **Source**: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4; the weighing of the two
    areas as in Zhu et al. 2016, "LSH Ensemble", section 5.
    """
    steps = 1000
    similarity = (np.arange(steps) + 0.5) / steps
    above = similarity >= threshold
    choices = ((permutations // rows, rows) for rows in range(1, permutations + 1))
    return min(choices, key=lambda choice: _error(similarity, above, *choice))


def _error(similarity: NDArray[np.float64], above: Mask, number: int, rows: int) -> float:
    met = 1 - (1 - similarity**rows) ** number
    return float((1 - _WEIGHT_OF_MISSES) * met[~above].sum() + _WEIGHT_OF_MISSES * (1 - met[above]).sum())


class _Corpus:
    """The documents that take part, by rank, and their signatures."""

    def __init__(
        self, signatures: Sequence[Signatures], edges: Sequence[int], places: Ranks, permutations: int
    ) -> None:
        self.places = places
        self._signatures = signatures
        self._edges = edges
        self._permutations = permutations

    def hashes(self, first: int, stop: int) -> Hashes:
        """A hash of these columns of each signature, in order of rank."""
        in_order = np.empty(self._edges[-1], np.uint64)
        for part, (start, _) in zip(self._signatures, pairwise(self._edges), strict=True):
            for row in range(0, len(part), _ROWS):
                block = part[row : row + _ROWS, first:stop]
                in_order[start + row : start + row + len(block)] = _row_hashes(block)
        return in_order[self.places]

    def drop_equal(self) -> tuple[Ranks, Ranks]:
        """Of documents with equal signatures only the first in rank takes part: the others are its copies.

        Returns:
            The places of the copies, and of the document that each is a copy of.
        """
        hashes = self.hashes(0, self._permutations)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        again = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
        # The one before is the original, or a copy of what the place before that one is a copy of, and so on.
        begins = np.flatnonzero(np.diff(again, prepend=-1) != 1)
        first = np.repeat(again[begins] - 1, np.diff(begins, append=len(again)))
        copies, originals = self.places[order[again]], self.places[order[first]]
        taking_part = np.ones(len(self.places), np.bool_)
        taking_part[order[again]] = False
        self.places = self.places[taking_part]
        return copies, originals

    def agreeing(self, lefts: Ranks, rights: Ranks, least: int) -> Mask:
        """Which pairs of documents agree in at least so many places of their signatures."""
        agree = np.empty(len(lefts), np.bool_)
        for start in range(0, len(lefts), _ROWS):
            here = slice(start, start + _ROWS)
            equal = self._rows(lefts[here]) == self._rows(rights[here])
            agree[here] = np.count_nonzero(equal, axis=1) >= least
        return agree

    def _rows(self, ranks: Ranks) -> NDArray[np.generic]:
        return gathered(self._signatures, self._edges, self.places[ranks])


def _ranked(
    lengths: Sequence[Lengths], keys: Sequence[Keys], keep: Sequence[Mask], edges: Sequence[int]
) -> NDArray[np.int64]:
    """The places of the documents that take part, longest first, then by key."""
    places = np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *keep]))
    # 32 bits of the length and 32 of the key decide nearly all; the few ties get sorted by everything.
    coarse = np.empty(edges[-1], np.uint64)
    for length, key, (start, stop) in zip(lengths, keys, pairwise(edges), strict=True):
        shortness = np.uint64(2**32 - 1) - np.minimum(length, 2**32 - 1).astype(np.uint64)
        coarse[start:stop] = (shortness << np.uint64(32)) | (key[:, 0] >> np.uint64(32))
    coarse = coarse[places]
    order = np.argsort(coarse, kind="stable")
    coarse = coarse[order]
    tied = np.zeros(len(order) + 1, np.bool_)
    tied[1:-1] = coarse[1:] == coarse[:-1]
    ties = np.flatnonzero(tied[1:] | tied[:-1])
    places = places[order]
    if len(ties):
        long = gathered(lengths, edges, places[ties])
        first, second = gathered(keys, edges, places[ties]).T
        places[ties] = places[ties[np.lexsort((second, first, -long.astype(np.int64)))]]
    return places


def _join_band(corpus: _Corpus, groups: Groups, columns: tuple[int, int], least: int) -> None:
    """Put together what one band finds: documents of a bucket whose signatures agree."""
    hashes = corpus.hashes(*columns)
    order = np.argsort(hashes, kind="stable")  # in a bucket, the best rank comes first
    hashes = hashes[order]
    equal = np.zeros(len(hashes) + 1, np.bool_)  # whether a document is in the bucket of the one before
    equal[1:-1] = hashes[1:] == hashes[:-1]
    del hashes
    starts = np.flatnonzero(equal[1:] & ~equal[:-1])
    sizes = np.flatnonzero(equal[:-1] & ~equal[1:]) + 1 - starts
    small = sizes <= _SMALL_BUCKET
    _join_small(corpus, groups, order, (starts[small], sizes[small]), least)
    for start, size in zip(starts[~small].tolist(), sizes[~small].tolist(), strict=True):
        _join_large(corpus, groups, order[start : start + size], least)


def _join_small(
    corpus: _Corpus, groups: Groups, order: Ranks, buckets: tuple[Ranks, Ranks], least: int
) -> None:
    """Check all pairs of each bucket: those one place apart, then those two apart, ..."""
    starts, sizes = buckets
    for apart in range(1, _SMALL_BUCKET):
        pairs = np.maximum(sizes - apart, 0)
        within = np.arange(int(pairs.sum())) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        lefts = np.repeat(starts, pairs) + within
        _join_pairs(corpus, groups, order[lefts], order[lefts + apart], least)


def _join_large(corpus: _Corpus, groups: Groups, members: Ranks, least: int) -> None:
    """Check all of a bucket against its best document, then against the best of those not joined to it, ..."""
    pending = members
    for _ in range(_LEADERS):
        leader = pending[:1]
        _join_pairs(corpus, groups, np.repeat(leader, len(members)), members, least)
        pending = pending[groups.find(pending) != groups.find(leader)]
        if not len(pending):
            return


def _join_pairs(corpus: _Corpus, groups: Groups, lefts: Ranks, rights: Ranks, least: int) -> None:
    apart = groups.find(lefts) != groups.find(rights)
    lefts, rights = lefts[apart], rights[apart]
    agree = corpus.agreeing(lefts, rights, least)
    groups.join(lefts[agree], rights[agree])


def _row_hashes(block: Signatures) -> Hashes:
    rolled = np.zeros(len(block), np.uint64)
    for column in range(block.shape[1]):
        rolled = scrambled(rolled ^ block[:, column].astype(np.uint64))
    return rolled


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start, characters = 0, 0
    for number, text in enumerate(texts):
        if number > start and (number - start == _FEW or characters + len(text) > _MOST_CHARACTERS):
            yield start, number
            start, characters = number, 0
        characters += len(text)
    if start < len(texts):
        yield start, len(texts)


def _whole(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@cache
def _rensa() -> Any:
    try:
        from rensa import RMinHash
    except ImportError:
        raise MissingError(
            "finding near copies needs the package rensa", hint="pip install 'llmkit[clean]'"
        ) from None
    return RMinHash
