"""Learn a unigram language model of pieces: which substrings a vocabulary should hold, and how likely each is.

Our own, because the trainer of the `tokenizers` library gives another vocabulary each time and on each number of
cores (it sums floating-point numbers in the order of a randomly seeded hash table), fails on small and on large
texts, and overflows. This one is a function of the words and their counts alone, in bounded memory.

Everything is held in flat arrays over one concatenated text, one entry a position:

    n  positions: characters of all segments      e  edges: occurrences of pieces in the text
    k  pieces                                     g  segments (words or parts of them)

**Source:** Kudo 2018, "Subword Regularization", section 3.2 (EM and pruning by loss); Liang and Klein 2007,
"Structured Bayesian Nonparametric Models" (the digamma in the M step, which makes rare pieces rarer).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

MAX_PIECE = 16
"""Characters of the longest piece."""

MAX_POSITIONS = 3_000_000
"""Characters of different words that are looked at, the most frequent first: about 1 GB of memory at most."""

_MAX_SEGMENT = 32  # products of 32 probabilities stay far above the smallest double
_SMALLEST = 1e-9
_COVERAGE = 0.9995
_CHARS_SHARE = 0.5
_SHRINK = 0.75
_SLACK = 1.1
_SEEDS_PER_ENTRY = 12
_MIN_SEEDS = 100_000

Ints: TypeAlias = npt.NDArray[np.signedinteger]
Floats: TypeAlias = npt.NDArray[np.float64]


def learn_pieces(words: Mapping[str, int], size: int, *, free: Iterable[str] = ()) -> list[tuple[str, float]]:
    """The pieces that spell the words best, with their log probabilities.

    Args:
        words: How often each word occurs.
        size: Pieces wanted; fewer come back where the words hold no more.
        free: Characters that are pieces anyway and count not towards `size`.

    Returns:
        (piece, natural log of its probability), the likeliest first. The most frequent characters are always
        among them; words with other characters are learnt from in parts.
    """
    anyway = set(free)
    alphabet = _alphabet(words, anyway, max(0, size))
    segments = _segments(words, alphabet | anyway)
    if not segments:
        return []
    lattice = _Lattice.of(segments, max(_MIN_SEEDS, _SEEDS_PER_ENTRY * size))
    target = size + sum(char in anyway for char in lattice.strings[: lattice.num_chars])
    lattice, shares = _fit(lattice, target)
    order = np.lexsort((np.arange(len(shares)), -shares))
    kept = set(range(lattice.num_chars))
    kept.update([k for k in order.tolist() if k >= lattice.num_chars][: max(0, target - lattice.num_chars)])
    return [(lattice.strings[k], round(float(np.log(shares[k])), 6)) for k in order.tolist() if k in kept]


def _alphabet(words: Mapping[str, int], free: set[str], size: int) -> set[str]:
    """The most frequent characters: those that make up 99.95 % of the text, at most half of the vocabulary."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    wanted = _COVERAGE * sum(counts.values())
    covered, alphabet = 0, set[str]()
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(alphabet - free) >= max(1, int(size * _CHARS_SHARE)):
            break
        covered += count
        alphabet.add(char)
    return alphabet


def _segments(words: Mapping[str, int], alphabet: set[str]) -> list[tuple[str, int]]:
    """The words, cut at characters outside the alphabet and at 32 characters, the most frequent ones."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        known = word if alphabet.issuperset(word) else "".join(c if c in alphabet else "\0" for c in word)
        for run in known.split("\0") if known is not word else [word]:
            for start in range(0, len(run), _MAX_SEGMENT):
                counts[run[start : start + _MAX_SEGMENT]] += count
    if sum(map(len, counts)) <= MAX_POSITIONS:
        return sorted(counts.items())
    chosen, total = [], 0
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], _hash(item[0]))):
        total += len(word)
        if total > MAX_POSITIONS:
            break
        chosen.append((word, count))
    return sorted(chosen)


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class _Text:
    """All segments, one after the other.

    Attributes:
        codes: [n] code points.
        segment: [n] the segment each position is in.
        left: [n] characters of its segment from a position on, itself included.
        counts: [g] how often each segment occurs.
        starts: [g] where each begins.
    """

    codes: Ints
    segment: Ints
    left: Ints
    counts: Floats
    starts: Ints

    @classmethod
    def of(cls, segments: list[tuple[str, int]]) -> "_Text":
        text = "".join(word for word, _ in segments)
        lengths = np.array([len(word) for word, _ in segments], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        segment = np.repeat(np.arange(len(segments)), lengths)
        ends = np.repeat(starts + lengths, lengths)
        return cls(
            codes=np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64),
            segment=segment,
            left=ends - np.arange(len(text)),
            counts=np.array([count for _, count in segments], dtype=np.float64),
            starts=starts,
        )

    def strings(self, starts: Ints, length: int) -> list[str]:
        codes = self.codes[starts[:, None] + np.arange(length)].astype("<u4")
        joined = codes.tobytes().decode("utf-32-le")
        return [joined[i : i + length] for i in range(0, len(joined), length)]


@dataclass
class _Substrings:
    """All substrings of one length that may become pieces.

    Attributes:
        at: [m] the positions where one begins, ascending.
        which: [m] which substring it is.
        first: [k] the first position of each.
        count: [k] its weighted count.
        whole: [k] no longer substring has the same count, so this one says something of its own.
    """

    at: Ints
    which: Ints
    first: Ints
    count: Floats
    whole: npt.NDArray[np.bool_]

    def dense(self, num_positions: int) -> Ints:
        """[n] which substring begins at each position, -1 for none."""
        found = np.full(num_positions, -1, dtype=np.int32)
        found[self.at] = self.which
        return found


def _all_substrings(text: _Text) -> list[_Substrings]:
    """Substrings of 1 to `MAX_PIECE` characters; of the longer ones those that occur at least twice."""
    weights = text.counts[text.segment]
    positions = np.arange(len(text.codes))
    first = _grouped(positions, text.codes, weights)
    found = [first]
    while len(found) < MAX_PIECE:
        before = found[-1]
        length = len(found)
        often = (before.count[before.which] >= 2) & (text.left[before.at] > length)
        at = before.at[often]
        if not len(at):
            break
        # A substring is known by its beginning, one character shorter, and its last character: exact, unhashed.
        keys = (before.which[often] << 21) | text.codes[at + length]
        longer = _grouped(at, keys, weights)
        _mark_parts(before, longer, keys, len(text.codes))
        found.append(longer)
    return found


def _grouped(at: Ints, keys: Ints, weights: Floats) -> _Substrings:
    _, index, which = np.unique(keys, return_index=True, return_inverse=True)
    count = _sums(which, weights[at], len(index))
    return _Substrings(at, which.astype(np.int64), at[index], count, np.ones(len(index), dtype=np.bool_))


def _sums(which: Ints, weights: Floats, size: int) -> Floats:
    """[size] the sum of the weights of each; one after the other, so the same on every machine."""
    return np.bincount(which, weights=weights, minlength=size).astype(np.float64, copy=False)


def _mark_parts(shorter: _Substrings, longer: _Substrings, keys: Ints, num_positions: int) -> None:
    dense = shorter.dense(num_positions)
    for shift in (0, 1):
        part = dense[longer.first + shift]
        same = (part >= 0) & (shorter.count[part] == longer.count)
        shorter.whole[part[same]] = False


@dataclass(frozen=True)
class _Lattice:
    """The pieces and all their occurrences: the graph whose paths are the ways to spell the segments.

    Nodes are the places between characters: node `position + segment` begins there.

    Attributes:
        text: The segments.
        strings: [k] the pieces, single characters first.
        num_chars: How many are single characters, which always stay.
        source: [e] the node an edge leaves.
        length: [e] its characters.
        piece: [e] its piece.
        first: [k] where each piece first stands.
        sizes: [k] each piece's characters.
    """

    text: _Text
    strings: list[str]
    num_chars: int
    source: Ints
    length: Ints
    piece: Ints
    first: Ints
    sizes: Ints

    @classmethod
    def of(cls, segments: list[tuple[str, int]], num_seeds: int) -> "_Lattice":
        text = _Text.of(segments)
        found = _all_substrings(text)
        chosen = _seeds(found, num_seeds)
        strings: list[str] = []
        edges, firsts, sizes = [], [], []
        for length, (substrings, ids) in enumerate(zip(found, chosen, strict=True), start=1):
            number = np.full(len(substrings.first), -1, dtype=np.int64)
            number[ids] = np.arange(len(ids)) + len(strings)
            strings += text.strings(substrings.first[ids], length)
            firsts.append(substrings.first[ids])
            sizes.append(np.full(len(ids), length, dtype=np.int64))
            piece = number[substrings.which]
            at = substrings.at[piece >= 0]
            edges.append((at + text.segment[at], np.full(len(at), length), piece[piece >= 0]))
        source, spans, which = (np.concatenate(part).astype(np.int32) for part in zip(*edges, strict=True))
        first, size = np.concatenate(firsts), np.concatenate(sizes)
        return cls(text, strings, len(chosen[0]), source, spans, which, first, size)

    def counts(self) -> Floats:
        """[k] how often each piece occurs, overlaps included."""
        weights = self.text.counts[self.segment_of(self.source)]
        return _sums(self.piece, weights, len(self.strings))

    def segment_of(self, nodes: Ints) -> Ints:
        """[...] the segment of each node."""
        return np.searchsorted(self.text.starts + np.arange(len(self.text.starts)), nodes, side="right") - 1

    def only(self, kept: npt.NDArray[np.bool_]) -> "_Lattice":
        """Without the other pieces and their occurrences."""
        number = np.cumsum(kept) - 1
        stays = kept[self.piece]
        strings = [string for string, keep in zip(self.strings, kept.tolist(), strict=True) if keep]
        return _Lattice(
            self.text,
            strings,
            self.num_chars,
            self.source[stays],
            self.length[stays],
            number[self.piece[stays]].astype(np.int32),
            self.first[kept],
            self.sizes[kept],
        )


def _seeds(found: list[_Substrings], num_seeds: int) -> list[Ints]:
    """For each length, which substrings to begin with: all single characters, then those that cover most text."""
    score = [part.count * length * part.whole for length, part in enumerate(found, start=1)]
    longer = np.concatenate([*score[1:], np.zeros(0)])
    enough = np.partition(longer, -num_seeds)[-num_seeds] if len(longer) > num_seeds else 0.0
    rest = [
        np.flatnonzero((part > enough) if enough else ((part > 0) & (found[i].count >= 2)))
        for i, part in enumerate(score[1:], 1)
    ]
    return [np.arange(len(score[0])), *rest]


def _fit(lattice: _Lattice, target: int) -> tuple[_Lattice, Floats]:
    """EM steps and prunings in turn until about `target` pieces are left."""
    counts = lattice.counts()
    shares = counts / counts.sum()
    while True:
        for _ in range(2):
            expected = _Paths(lattice).expected(shares)
            kept = expected >= 0.5
            kept[: lattice.num_chars] = True
            lattice, expected = lattice.only(kept), expected[kept]
            shares = _shares(expected)
        if len(shares) <= _SLACK * target or len(shares) == lattice.num_chars:
            return lattice, shares
        kept = _worth_keeping(
            lattice, expected, shares, max(int(_SLACK * target), int(_SHRINK * len(shares)))
        )
        lattice, shares = lattice.only(kept), shares[kept]


def _shares(expected: Floats) -> Floats:
    """The M step: exp(digamma(c)) is c - 1/2 + 1/24c, to three digits from c = 1 on."""
    floored = np.maximum(expected, 0.5)
    weights = floored - 0.5 + 1 / (24 * floored)
    return np.maximum(weights / weights.sum(), _SMALLEST)


class _Paths:
    """Sums over all ways to spell each segment, by dynamic programming over places, all segments at once."""

    def __init__(self, lattice: _Lattice) -> None:
        self._lattice = lattice
        self._starts = lattice.text.starts + np.arange(len(lattice.text.starts))
        self._num_nodes = len(lattice.text.codes) + len(lattice.text.starts)
        self._segment = lattice.segment_of(lattice.source)
        target = lattice.source + lattice.length
        self._forward = _levels(target - self._starts[self._segment], target)
        self._backward = _levels(lattice.source - self._starts[self._segment], lattice.source)[::-1]

    def expected(self, shares: Floats) -> Floats:
        """[k] how often each piece is used, on average over all spellings, weighted by their probability."""
        lattice = self._lattice
        source, target, chance = lattice.source, lattice.source + lattice.length, shares[lattice.piece]
        into = np.zeros(self._num_nodes)
        into[self._starts] = 1
        for edges, groups, nodes in self._forward:
            into[nodes] = np.add.reduceat(into[source[edges]] * chance[edges], groups)
        out = np.zeros(self._num_nodes)
        ends = np.append(self._starts[1:], self._num_nodes) - 1
        out[ends] = 1
        for edges, groups, nodes in self._backward:
            out[nodes] = np.add.reduceat(chance[edges] * out[target[edges]], groups)
        weight = lattice.text.counts / into[ends]
        used = into[source] * chance * out[target] * weight[self._segment]
        return _sums(lattice.piece, used, len(shares))


def _levels(level: Ints, node: Ints) -> list[tuple[Ints, Ints, Ints]]:
    """Edges by level and node: for each level the edges, where each node's group begins, and the nodes."""
    order = np.lexsort((node, level))
    bounds = np.flatnonzero(np.diff(level[order], prepend=-1, append=_MAX_SEGMENT + 1))
    parts = []
    for start, stop in pairwise(bounds.tolist()):
        edges = order[start:stop]
        nodes = node[edges]
        groups = np.flatnonzero(np.diff(nodes, prepend=-1))
        parts.append((edges, groups, nodes[groups]))
    return parts


def _worth_keeping(lattice: _Lattice, expected: Floats, shares: Floats, size: int) -> npt.NDArray[np.bool_]:
    """The `size` pieces without which the text would become least likely, and all single characters.

    The loss counts less for long pieces: else a title that three documents share is worth more than a common word.
    On held-out text the root gave the fewest tokens, in English and Chinese.
    """
    loss = expected * (np.log(shares) - _best_without(lattice, np.log(shares)))
    loss /= np.sqrt(np.maximum(lattice.sizes - 1, 1))
    loss[: lattice.num_chars] = np.inf
    kept = np.zeros(len(loss), dtype=np.bool_)
    kept[np.lexsort((np.arange(len(loss)), -np.round(loss, 6)))[:size]] = True
    kept[: lattice.num_chars] = True
    return kept


def _best_without(lattice: _Lattice, logs: Floats) -> Floats:
    """[k] the log probability of each piece's best spelling by other pieces."""
    num_positions = len(lattice.text.codes)
    at = lattice.source - lattice.segment_of(lattice.source)
    best = np.full((len(logs), MAX_PIECE + 1), -np.inf)
    best[:, 0] = 0
    tables = []
    for length in range(1, MAX_PIECE + 1):
        table = np.full(num_positions, -1, dtype=np.int32)
        table[at[lattice.length == length]] = lattice.piece[lattice.length == length]
        tables.append(table)
    for stop in range(1, MAX_PIECE + 1):
        rows = np.flatnonzero(lattice.sizes >= stop)
        for start in range(stop):
            piece = tables[stop - start - 1][lattice.first[rows] + start]
            usable = (piece >= 0) & (piece != rows)
            score = best[rows[usable], start] + logs[piece[usable]]
            best[rows[usable], stop] = np.maximum(best[rows[usable], stop], score)
    return best[np.arange(len(logs)), lattice.sizes]
