"""A step's rows in micro-batches, by the number of their tokens. Pure arithmetic: no tensors, no chance.

Which rows make a step is decided elsewhere (`order.py`), and so is what the step learns: a loss is a sum and a
count over all its rows. How they are grouped only decides what the step costs. There are two ways:

- *padded*: rows are filled up to the longest of their micro-batch, which costs `longest x count` tokens. Rows of
  about the same length go together.
- *packed*: rows stand in one line, behind each other, and a micro-batch costs the sum of its lengths.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Groups = list[list[int]]

OVERHEAD = 128
"""What one more micro-batch costs, in tokens, where nothing better is known: about that on a processor with a small
model. Where kernels are launched faster than they compute, it is thousands."""


def micro_batches(
    lengths: Sequence[int] | Ints, *, budget: int, world_size: int, packed: bool, overhead: int = OVERHEAD
) -> Groups:
    """The micro-batches of a step: which rows are computed together.

    The same lengths give the same groups. Each row is in exactly one. The first is (one of) the largest; in turns of
    `world_size` they are dealt to the processes, every other turn backwards, so that all have about as much to do.

    Args:
        lengths: Tokens of each row of the step, in the step's order.
        budget: Tokens of a micro-batch at most, padding counted. A row that is longer is a micro-batch of its own.
        world_size: How many processes share them: their number is a multiple of it.
        packed: Rows stand behind each other instead of being filled up to the longest.
        overhead: What one more micro-batch costs, in tokens: padded rows are cut into more groups than `budget`
            demands where that saves more padding than this. Packed rows have no padding, and no use for it.

    Returns:
        Lists of indices into `lengths`. None is empty, unless no other way leads to a multiple of `world_size` (three
        rows on four processes; five on two, if no two fit together): the last ones are then, and whoever computes
        them takes any row without its targets.

    Raises:
        ValueError: No rows, a length or a limit below 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, budget, world_size, overhead)
    order = np.argsort(-sizes, kind="stable")
    if packed:
        groups = _packed(sizes, order, budget, world_size)
    else:
        cuts = _cut(sizes[order], budget, world_size, overhead)
        groups = [order[i:j].tolist() for i, j in pairwise(cuts)]
    tokens = _packed_cost if packed else _padded_cost
    groups.sort(key=lambda group: (-tokens(sizes, group), group))
    groups += [[] for _ in range(-len(groups) % world_size)]
    return _in_turns(groups, world_size)


def cost(lengths: Sequence[int] | Ints, groups: Groups, *, packed: bool) -> int:
    """Tokens that are computed for these groups, padding counted: the sum over `groups`."""
    sizes = np.asarray(lengths, dtype=np.int64)
    one = _packed_cost if packed else _padded_cost
    return sum(one(sizes, group) for group in groups if group)


def _check(sizes: Ints, budget: int, world_size: int, overhead: int) -> None:
    if not sizes.size:
        raise ValueError("a step of no rows has no micro-batches")
    if sizes.min() < 1:
        raise ValueError(f"row {int(sizes.argmin())} has {int(sizes.min())} tokens: at least 1 is needed")
    if min(budget, world_size) < 1 or overhead < 0:
        raise ValueError(f"budget {budget} and world_size {world_size} are at least 1, overhead {overhead} 0")


def _packed_cost(sizes: Ints, group: Sequence[int]) -> int:
    return int(sizes[group].sum())


def _padded_cost(sizes: Ints, group: Sequence[int]) -> int:
    return int(sizes[group].max()) * len(group)


def _in_turns(groups: Groups, world_size: int) -> Groups:
    """Groups, largest first, with every other turn backwards. Empty ones stay last."""
    turns = [groups[i : i + world_size] for i in range(0, len(groups), world_size)]
    full = [turn if number % 2 == 0 or [] in turn else turn[::-1] for number, turn in enumerate(turns)]
    return [group for turn in full for group in turn]


# --- padded: cuts through the rows, longest first -------------------------------------------------------------------


def _cut(falling: Ints, budget: int, world_size: int, overhead: int) -> list[int]:
    """Where the rows, longest first, are cut: 0, ..., their number.

    The cheapest cuts; then more of them up to a multiple of `world_size`, each where it saves most.
    """
    cuts = _cheapest(falling, budget, overhead)
    if _multiple(len(cuts) - 1, world_size) > len(falling):  # too few rows for that many: as few as can be
        cuts = _cheapest(falling, budget, int(falling.sum()) + budget)
    enough = min(_multiple(len(cuts) - 1, world_size), len(falling))
    while len(cuts) - 1 < enough:
        insort(cuts, _best_further(falling, cuts))
    return cuts


def _cheapest(falling: Ints, budget: int, overhead: int) -> list[int]:
    """The cuts of least cost, `overhead` for each group counted.

    best[j], the least cost of the first j rows, is the minimum over i of best[i] and one group of i..j, which costs
    falling[i] * (j - i). The best i never moves back when j grows (the cost is a Monge array), nor does the first
    i that `budget` allows: so few need be looked at.
    """
    count = len(falling)
    best = np.zeros(count + 1, dtype=np.int64)
    came_from = [0] * (count + 1)
    start = 0
    for j in range(1, count + 1):
        while start < j - 1 and falling[start] * (j - start) > budget:
            start += 1
        costs = best[start:j] + falling[start:j] * np.arange(j - start, 0, -1)
        start += int(costs.argmin())
        best[j] = costs.min() + overhead
        came_from[j] = start
    cuts = [count]
    while cuts[-1]:
        cuts.append(came_from[cuts[-1]])
    return cuts[::-1]


def _best_further(falling: Ints, cuts: Sequence[int]) -> int:
    """The further cut that saves most padding; among equals the one nearest to its group's middle."""
    found: list[tuple[int, int, int]] = []
    for i, j in pairwise(cuts):
        if j - i > 1:
            saved = (falling[i] - falling[i + 1 : j]) * np.arange(j - i - 1, 0, -1)
            places = np.flatnonzero(saved == saved.max()) + i + 1
            place = int(places[np.abs(2 * places - i - j).argmin()])
            found.append((-int(saved.max()), -(j - i), place))
    return min(found)[2]


# --- packed: bins ----------------------------------------------------------------------------------------------------


def _packed(sizes: Ints, order: Ints, budget: int, world_size: int) -> Groups:
    """As few bins as are found, up to a multiple of `world_size`, and these about equally full."""
    alone = [[int(i)] for i in order if sizes[i] >= budget]
    rest = [int(i) for i in order[len(alone) :]]
    tight = _best_fit(sizes, rest, budget)
    fewest = len(alone) + -(-int(sizes[rest].sum()) // budget)
    enough = min(_multiple(len(alone) + len(tight), world_size), len(order))
    for number in range(_multiple(fewest, world_size), enough + 1, world_size):
        even = _even(sizes, rest, number - len(alone))
        if all(even) and max((_packed_cost(sizes, group) for group in even), default=0) <= budget:
            return alone + even
    while len(alone) + len(tight) < enough:
        tight.sort(key=lambda group: (len(group) > 1, _packed_cost(sizes, group)))
        tight += _even(sizes, tight.pop(), 2)
    return alone + tight


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _best_fit(sizes: Ints, falling: Sequence[int], budget: int) -> Groups:
    """Each row, longest first, into the fullest bin that still takes it.

    **Source**: Johnson et al., "Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms", 1974:
    at most 11/9 of the fewest bins that there can be, and 4.
    """
    bins: Groups = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the bin), sorted
    for row in falling:
        size = int(sizes[row])
        place = bisect_left(room, (size, 0))
        if place == len(room):
            bins.append([])
            room.append((budget, len(bins) - 1))
        left, number = room.pop(place)
        bins[number].append(row)
        insort(room, (left - size, number))
    return bins


def _even(sizes: Ints, falling: Sequence[int], number: int) -> Groups:
    """Each row, longest first, into the emptiest of `number` bins.

    **Source**: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969: the fullest bin holds at most 4/3 of what
    it must.
    """
    bins: Groups = [[] for _ in range(number)]
    filled = [(0, i) for i in range(number)]
    for row in falling if number else ():
        tokens, i = filled[0]
        bins[i].append(row)
        heapq.heapreplace(filled, (tokens + int(sizes[row]), i))
    return bins
