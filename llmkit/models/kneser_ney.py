"""Exact counts of n-grams in streams of token ids, and the probabilities of interpolated, modified Kneser-Ney.

An n-gram of k tokens is known by its *node*: its place among the distinct k-grams of the text. They are sorted by
their key, `node of the first k-1 tokens * V + last token`, so what follows a context lies side by side, and an n-gram
is found by one binary search a token. The node of a single token is its id.

Shape suffixes: N tokens of the text, G distinct n-grams of an order, P nodes of the order below, V vocabulary.

**Source**: Kneser and Ney, "Improved Backing-Off for M-Gram Language Modeling", 1995; Chen and Goodman, "An Empirical
Study of Smoothing Techniques for Language Modeling", 1998 (TR-10-98), section 3.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Nodes = npt.NDArray[Any]
"""int32, or int64 where there are too many."""
Discounts = tuple[float, float, float]
"""What is taken from a count of one, of two, and of three or more."""

NO_NODE = -1
FALLBACK: Discounts = (0.5, 1.0, 1.5)
"""Discounts of an order whose counts of counts say nothing of use: too little text, or too few kinds of tokens."""


@dataclass(frozen=True)
class Piece:
    """Some tokens of the text, in their order.

    Attributes:
        ids_N: Token ids.
        starts_N: Whether a token begins something new: no n-gram reaches back across it.
    """

    ids_N: npt.NDArray[np.integer]
    starts_N: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Level:
    """The distinct n-grams of one order.

    Attributes:
        keys_G: Sorted; see the head of this file. For order 1 the ids 0 to V - 1, seen or not.
        counts_G: For the highest order how often each occurs; for lower ones how many different tokens come before
            it, the beginning of a document counting as one.
    """

    keys_G: Ints
    counts_G: Ints


@dataclass(frozen=True)
class Estimate:
    """The probabilities of one order: p(w | h) = alpha(hw) + gamma(h) * p(w | h without its first token).

    Attributes:
        keys_G: As in `Level`.
        alpha_G: The n-grams' own share, after discounting.
        gamma_P: What each context leaves to the order below; 1 where nothing follows it.
        discounts: What was taken from counts of 1, 2, and 3 or more.
        estimated: Whether the counts gave these discounts; else they are `FALLBACK`.
    """

    keys_G: Ints
    alpha_G: Floats
    gamma_P: Floats
    discounts: Discounts
    estimated: bool


def count_ngrams(
    pieces: Callable[[], Iterable[Piece]],
    num_tokens: int,
    *,
    order: int,
    vocab_size: int,
    between: Callable[[int], object] = lambda order: None,
) -> list[Level]:
    """Count all n-grams of up to `order` tokens.

    The text is read twice for each order, a piece at a time; besides the counts, four bytes for each of its tokens
    are held (eight from 2^31 tokens on).

    Args:
        pieces: The text, from its beginning at each call; the first token is a start.
        num_tokens: N, the tokens of all pieces.
        order: The longest n-gram's tokens, at least 1.
        vocab_size: V; every id is below it.
        between: Called with each order before it is counted.

    Returns:
        One level for each order, from 1 on.
    """
    nodes_N: Nodes = np.empty(num_tokens, dtype=np.int32 if num_tokens < 2**31 else np.int64)
    for start, piece in _placed(pieces()):
        nodes_N[start : start + len(piece.ids_N)] = piece.ids_N
    levels: list[Level] = []
    keys_G, seen = np.arange(vocab_size, dtype=np.int64), np.zeros(vocab_size, dtype=np.int64)
    if order == 1:
        for start in range(0, num_tokens, _CHUNK):
            seen += np.bincount(nodes_N[start : start + _CHUNK], minlength=vocab_size)
    for above in range(2, order + 1):
        between(above)
        grown = _grow(pieces, nodes_N, vocab_size, num_nodes=len(keys_G))
        levels.append(Level(keys_G, grown.lefts_P))
        keys_G, seen = grown.keys_G, grown.counts_G
        if above < order:
            _move_up(pieces, nodes_N, vocab_size, keys_G)
    return [*levels, Level(keys_G, seen)]


_CHUNK = 1 << 22


@dataclass
class _Tally:
    """Keys with their counts, merged now and then, so that repeated ones take no memory."""

    keys: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    suffixes: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    waiting: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)

    def add(self, keys: Ints, suffixes: Ints) -> None:
        """Count `keys`; `suffixes` are a function of them."""
        distinct, first, counts = np.unique(keys, return_index=True, return_counts=True)
        self.waiting.append((distinct, counts, suffixes[first]))
        if sum(len(keys) for keys, _, _ in self.waiting) >= len(self.keys):
            self.merge()

    def merge(self) -> None:
        """Make what waits part of the rest."""
        parts = [(self.keys, self.counts, self.suffixes), *self.waiting]
        keys, counts, suffixes = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.waiting = []
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        self.keys, self.suffixes = keys[first], suffixes[order][first]
        self.counts = np.add.reduceat(counts[order], first) if len(first) else counts


@dataclass(frozen=True)
class _Grown:
    """The distinct n-grams of an order, how often each occurs, and the left neighbours of those one token shorter."""

    keys_G: Ints
    counts_G: Ints
    lefts_P: Ints


def _grow(
    pieces: Callable[[], Iterable[Piece]],
    nodes_N: Nodes,
    vocab_size: int,
    *,
    num_nodes: int,
) -> _Grown:
    """Count the n-grams one token longer than those whose nodes are `nodes_N`, of which there are `num_nodes`."""
    tally, first_P = _Tally(), np.zeros(num_nodes, dtype=np.int64)
    for start, piece in _placed(pieces()):
        here_N = nodes_N[start : start + len(piece.ids_N)]
        keys_N = _keys(_before(nodes_N, start, len(here_N)), piece, vocab_size)
        inside_N = keys_N >= 0
        tally.add(keys_N[inside_N], here_N[inside_N].astype(np.int64))
        first_P[here_N[~inside_N & (here_N >= 0)]] = 1  # preceded by a beginning
    tally.merge()
    return _Grown(tally.keys, tally.counts, np.bincount(tally.suffixes, minlength=num_nodes) + first_P)


def _move_up(
    pieces: Callable[[], Iterable[Piece]],
    nodes_N: Nodes,
    vocab_size: int,
    keys_G: Ints,
) -> None:
    """Turn the nodes of the n-grams that end at each token into those of n-grams one token longer, in place."""
    last = NO_NODE
    for start, piece in _placed(pieces()):
        stop = start + len(piece.ids_N)
        before_N = _before(nodes_N, start, stop - start)
        before_N[0] = last  # the place before has moved up already
        last = int(nodes_N[stop - 1])
        keys_N = _keys(before_N, piece, vocab_size)
        nodes_N[start:stop] = np.where(keys_N >= 0, np.searchsorted(keys_G, keys_N), NO_NODE)


def _placed(pieces: Iterable[Piece]) -> Iterable[tuple[int, Piece]]:
    start = 0
    for piece in pieces:
        yield start, piece
        start += len(piece.ids_N)


def _before(nodes_N: Nodes, start: int, length: int) -> Ints:
    """The node one token to the left of each token in a piece."""
    before_N = np.full(length, NO_NODE, dtype=np.int64)
    skipped = 1 if start == 0 else 0
    before_N[skipped:] = nodes_N[start - 1 + skipped : start + length - 1]
    return before_N


def _keys(before_N: Ints, piece: Piece, vocab_size: int) -> Ints:
    """The key of the n-gram that ends at each token; -1 where it would reach across a start."""
    keys_N = before_N * vocab_size + piece.ids_N
    return np.where((before_N < 0) | piece.starts_N, NO_NODE, keys_N)


def estimate(levels: Sequence[Level], vocab_size: int, discounts: Sequence[Discounts] = ()) -> list[Estimate]:
    """Turn counts into probabilities.

    Order 1 is interpolated with equal probabilities for all tokens, so that none is impossible.

    Args:
        levels: From `count_ngrams`.
        vocab_size: V.
        discounts: For each order; by default they follow from the counts.
    """
    found = []
    for number, level in enumerate(levels):
        given = discounts[number] if discounts else modified_discounts(level.counts_G)
        num_contexts = len(levels[number - 1].keys_G) if number else 1
        contexts_G = level.keys_G // vocab_size if number else np.zeros_like(level.keys_G)
        found.append(_estimate(level, contexts_G, num_contexts, given or FALLBACK, given is not None))
    return found


def modified_discounts(counts_G: Ints) -> Discounts | None:
    """The discounts that leaving one out would choose, or None where the counts give none from 0 to 1, 2 and 3.

    **Source**: Chen and Goodman 1998, equation (26).
    """
    n1, n2, n3, n4 = (int((counts_G == times).sum()) for times in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return None
    share = n1 / (n1 + 2 * n2)
    found = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
    return found if all(0 <= one <= most for one, most in zip(found, (1, 2, 3), strict=True)) else None


def _estimate(
    level: Level, contexts_G: Ints, num_contexts: int, discounts: Discounts, estimated: bool
) -> Estimate:
    taken_G = np.asarray([0.0, *discounts])[np.minimum(level.counts_G, 3)]
    total_P = np.bincount(contexts_G, weights=level.counts_G, minlength=num_contexts)
    left_P = np.bincount(contexts_G, weights=taken_G, minlength=num_contexts)
    known_P = total_P > 0
    gamma_P = np.divide(left_P, total_P, out=np.ones(num_contexts), where=known_P)
    alpha_G = (level.counts_G - taken_G) / np.where(known_P, total_P, 1.0)[contexts_G]
    return Estimate(level.keys_G, alpha_G, gamma_P, discounts, estimated)
