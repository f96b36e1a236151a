"""One text and what quality rules count in it, each counted at most once."""

import math
from collections import Counter
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

NEGLIGIBLE: Final = 0.1
"""A share of repeated n-grams that no rule objects to."""

Hashes = npt.NDArray[np.uint64]

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Units:
    """The units (words or characters) of a text, for counting its repeated n-grams.

    Args:
        ids: int [m] The same number for the same unit.
        lengths: int [m] Characters in each unit.
    """

    def __init__(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        self._ids = _mixed(ids.astype(np.uint64))
        self._lengths = lengths.astype(np.int64)
        self._total = int(self._lengths.sum())
        self._hashes: dict[int, Hashes] = {1: self._ids}
        self._repeated = 1.0

    def top_share(self, n: int) -> float:
        """The share of the characters that stand in the most frequent n-gram; 0 when none occurs twice.

        Of several that are equally frequent, the longest counts.
        """
        hashes = self._ngrams(n)
        values, counts = _values_twice(hashes)
        if not len(values):
            return 0.0
        most = int(counts.max())
        starts = _places(hashes, values[counts == most])
        ends = np.concatenate([[0], np.cumsum(self._lengths)])
        longest = int((ends[starts + n] - ends[starts]).max())
        return min(1.0, most * longest / self._total)

    def repeated_share(self, n: int) -> float:
        """The share of the characters that stand in n-grams that came before, each character counted once."""
        hashes = self._ngrams(n)
        values, _ = _values_twice(hashes)
        if not len(values):
            return 0.0
        places = _places(hashes, values)
        _, first = np.unique(hashes[places], return_index=True)
        again = np.delete(places, first)
        # A unit is covered when one of the n-grams that begin at it or up to n - 1 units before came before.
        depth = np.zeros(len(self._ids) + 1, dtype=np.int64)
        depth[again] += 1
        depth[again + n] -= 1
        covered = np.cumsum(depth[:-1]) > 0
        return float(self._lengths[covered].sum() / self._total)

    def repeated_bound(self, n: int) -> float:
        """`repeated_share(n)`, or any more than it that is at most `NEGLIGIBLE`; to be asked with rising n.

        What longer n-grams cover, the shorter ones inside them cover too, so the share can only fall with n:
        for most texts the first question answers all.
        """
        if self._repeated > NEGLIGIBLE:
            self._repeated = self.repeated_share(n)
        return self._repeated

    def _ngrams(self, n: int) -> Hashes:
        """uint64 [m - n + 1]: one number for each n-gram, by place."""
        if n not in self._hashes:
            shorter = self._ngrams(n - 1)
            self._hashes[n] = _mixed(shorter[:-1] * _MULTIPLIER + self._ids[n - 1 :])
        return self._hashes[n]


def _values_twice(hashes: Hashes) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The values that occur at least twice, sorted, and how often each does. Most n-grams occur once."""
    ordered = np.sort(hashes)
    bounds = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    counts = np.diff(bounds)
    twice = counts > 1
    return ordered[bounds[:-1][twice]], counts[twice]


def _places(hashes: Hashes, values: Hashes) -> npt.NDArray[np.int64]:
    """Where one of the sorted values stands."""
    nearest = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    return np.flatnonzero(values[nearest] == hashes)


def _mixed(values: Hashes) -> Hashes:
    """Spread the bits (the finaliser of SplitMix64), so that two n-grams practically never share a number."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


class Passage:
    """A text with its words, lines and paragraphs.

    Words are what blanks separate; lines and paragraphs (separated by an empty line) come stripped, and blank ones
    are left out.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What blanks separate."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without blanks around."""
        return [stripped for line in self.text.split("\n") if (stripped := line.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What empty lines separate."""
        return [stripped for part in self.text.split("\n\n") if (stripped := part.strip())]

    @cached_property
    def solid(self) -> str:
        """The text without blanks and line ends."""
        return "".join(self.words)

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each character occurs, blanks left out."""
        return Counter(self.solid)

    @cached_property
    def word_units(self) -> Units:
        """The words, for n-grams."""
        numbers = {word: number for number, word in enumerate(dict.fromkeys(self.words))}
        ids = np.fromiter(map(numbers.__getitem__, self.words), dtype=np.int64)
        return Units(ids, np.fromiter(map(len, self.words), dtype=np.int64))

    @cached_property
    def character_units(self) -> Units:
        """The characters without blanks, for n-grams."""
        ids = np.frombuffer(self.solid.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        return Units(ids, np.ones(len(ids), dtype=np.int64))

    def entropy(self) -> float:
        """The entropy of the characters, in nats."""
        total = len(self.solid)
        return -sum(n / total * math.log(n / total) for n in self.counts.values())


def repeats(parts: list[str]) -> list[str]:
    """The parts that came before, each time they come again."""
    seen, again = set[str](), list[str]()
    for part in parts:
        if part in seen:
            again.append(part)
        else:
            seen.add(part)
    return again
