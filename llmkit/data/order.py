"""Which row comes at which position of training: a pure function of (seed, position).

Nothing is stored and nothing is shuffled in memory: a keyed permutation is computed for the positions asked
for, so that step 5,000,000 costs what step 0 costs and a resumed run has nothing to restore.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from math import fsum, inf

import numpy as np
import numpy.typing as npt

from llmkit.errors import DataError, RecipeError

Ints = npt.NDArray[np.int64]

_ROUNDS = 10
_LARGEST = 2**48
_BLOCK = 1024
_LARGEST_BLOCK = 2**20
_SLOTS_OF_SMALLEST = 16
_CAP_SLACK = 1e-9


class Permutation:
    """A keyed permutation of 0..n-1 that takes no memory: a Feistel network with cycle walking.

    The network permutes the smallest power of two that holds n (at least 4); a value that falls outside
    0..n-1 is sent through again until it falls inside, which keeps the whole a bijection. At most two passes
    are expected.

    Args:
        n: Size of the domain, 1 to 2**48.
        key: Whatever tells this permutation from others, such as `(seed, "epoch", 3)`.

    Raises:
        ValueError: `n` is out of range.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), sections 3.2 and 3.3.
    """

    def __init__(self, n: int, key: tuple[int | str, ...]) -> None:
        if not 1 <= n <= _LARGEST:
            raise ValueError(f"a permutation needs 1 to 2**48 elements, not {n}")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits - bits // 2)
        self._low_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)
        self._keys = _round_keys(key)

    def __call__(self, index: npt.ArrayLike) -> Ints:
        """The images of `index`, in its shape.

        Raises:
            IndexError: An index is not in 0..n-1.
        """
        given = np.asarray(index, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.n):
            raise IndexError(f"index out of 0..{self.n - 1}")
        values = self._encrypt(given.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64).reshape(given.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low_mask
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                high = high ^ (_mix(low, key) & self._high_mask)
            else:
                low = low ^ (_mix(high, key) & self._low_mask)
        return (high << self._low_bits) | low


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit values (the finaliser of SplitMix64); products wrap around on purpose."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _round_keys(key: tuple[int | str, ...]) -> list[np.uint64]:
    digests = b"".join(
        hashlib.blake2b(repr(key).encode(), digest_size=64, salt=bytes([half])).digest() for half in (0, 1)
    )
    return [np.uint64(word) for word in np.frombuffer(digests, dtype="<u8")[:_ROUNDS]]


@lru_cache(maxsize=64)
def _permutation(n: int, key: tuple[int | str, ...]) -> Permutation:
    return Permutation(n, key)


class RowOrder:
    """Training position -> (source, row), forever: after the last row the next epoch begins.

    Without weights one permutation per epoch runs over all rows of all sources, so each row comes once an
    epoch. With weights, positions come in blocks; a block holds a fixed number of slots per source (largest
    remainders), in an order of its own; a source's slots walk through that source's rows, permuted anew each
    time they are used up.

    Args:
        sizes: Rows in each source.
        weights: Relative share of each source, or None for shares by size.
        seed: The recipe's seed.

    Raises:
        DataError: There are no rows, or a weighted source has none.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = [int(size) for size in sizes]
        self.seed = seed
        self.num_rows = sum(self.sizes)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        if self.num_rows == 0 or (weights is not None and min(self.sizes) == 0):
            raise DataError(f"no rows to train on (rows per source: {self.sizes})")
        self.counts = None if weights is None else slots_per_block(weights)
        if self.counts is not None and len(self.counts) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} sources but {len(self.counts)} weights")

    def locate(self, positions: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Source and row for each training position (any non-negative integers, 1-D)."""
        given = np.asarray(positions, dtype=np.int64)
        if self.counts is None:
            return self._locate_by_size(given)
        return self._locate_by_weight(given, np.asarray(self.counts, dtype=np.int64))

    def _locate_by_size(self, positions: Ints) -> tuple[Ints, Ints]:
        index = self._permuted(positions, self.num_rows, "epoch")
        source = np.searchsorted(self._ends, index, side="right")
        return source, index - (self._ends - self.sizes)[source]

    def _locate_by_weight(self, positions: Ints, counts: Ints) -> tuple[Ints, Ints]:
        block = int(counts.sum())
        slot = self._permuted(positions, block, "block")
        ends = np.cumsum(counts)
        source = np.searchsorted(ends, slot, side="right")
        # The how-manieth slot of its source this is, counted from the start of training.
        turn = positions // block * counts[source] + slot - (ends - counts)[source]
        row = np.empty_like(turn)
        for number, size in enumerate(self.sizes):
            mine = source == number
            row[mine] = self._permuted(turn[mine], size, f"source {number}")
        return source, row

    def _permuted(self, positions: Ints, size: int, what: str) -> Ints:
        """Each position within its round of `size`, permuted by the round's own key."""
        rounds, within = np.divmod(positions, size)
        result = np.empty_like(within)
        for number in np.unique(rounds):
            here = rounds == number
            result[here] = _permutation(size, (self.seed, what, int(number)))(within[here])
        return result


def slots_per_block(weights: Sequence[float]) -> list[int]:
    """Slots each source has in a block, by largest remainder; their sum is a power of two, 1,024 or more.

    The block is made large enough for the smallest source to have 16 slots, so that no share is off by more
    than a few percent of itself.

    Raises:
        RecipeError: A weight is not positive, or under 1/65,536 of all.
    """
    if not weights or min(weights) <= 0 or not np.isfinite(sum(weights)):
        raise RecipeError(f"weights must be positive numbers, not {list(weights)}")
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    block = _BLOCK
    while shares.min() * block < _SLOTS_OF_SMALLEST:
        block *= 2
    if block > _LARGEST_BLOCK:
        raise RecipeError(
            f"the smallest weight {min(weights)} is under 1/65536 of the sum {sum(weights)}",
            hint="raise it or leave that source out",
        )
    counts = np.floor(shares * block).astype(np.int64)
    remainders = shares * block - counts
    # Stable: among equal remainders the earlier source wins, on every machine.
    largest_first = np.argsort(-remainders, kind="stable")
    counts[largest_first[: block - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def common_weights(weights: Sequence[float | None]) -> list[float] | None:
    """The sources' weights for `RowOrder`: all of them, or None when no source has one.

    Raises:
        RecipeError: Some sources have a weight and others have none.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        raise RecipeError(
            f"{len(given)} of {len(weights)} sources have a weight",
            hint="give every source a `weight`, or none (then each counts by its size)",
        )
    return given


def capped_weights(
    sizes: Sequence[int], weights: Sequence[float], caps: Sequence[float | None], num_rows: int
) -> list[float]:
    """The sources' shares, lowered so that none is read more than its cap times over in a run.

    What a capped source then lacks goes to the others in proportion to their weights, which may bring further
    ones to their caps, until all hold.

    Args:
        sizes: Rows in each source.
        weights: Relative share of each source.
        caps: How often at most each source may be read, None for any number of times.
        num_rows: Rows the run takes from all sources together.

    Returns:
        Shares that sum to 1.

    Raises:
        RecipeError: All sources are capped, and together they do not have so many rows.
        DataError: A source has no rows.
    """
    if min(sizes) == 0:
        raise DataError(f"no rows to train on (rows per source: {list(sizes)})")
    most = [inf if cap is None else cap * size / num_rows for cap, size in zip(caps, sizes, strict=True)]
    if sum(most) < 1 - _CAP_SLACK:
        rows = int(sum(most) * num_rows)
        raise RecipeError(
            f"with `max_epochs` the sources have {rows:,} rows to read, and the run takes {num_rows:,}",
            hint=f"shorten the run to {rows:,} rows, raise `max_epochs` by {1 / sum(most):.3g} times, "
            "leave it out for one source, or add text",
        )
    capped: set[int] = set()
    while True:
        room = 1 - sum(most[i] for i in capped)
        free = fsum(weight for i, weight in enumerate(weights) if i not in capped)
        shares = [most[i] if i in capped else room * weight / free for i, weight in enumerate(weights)]
        over = {i for i, share in enumerate(shares) if i not in capped and share > most[i]}
        if not over:
            return [share / fsum(shares) for share in shares]
        capped |= over
