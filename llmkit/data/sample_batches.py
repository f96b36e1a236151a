"""A step of labelled rows: which rows, and how they are shared out; a pure function of the step.

A step holds a fixed number of rows whatever their lengths, so the gradient does not depend on the machine. How many
rows are computed at a time follows from a number of tokens: see `packing.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from llmkit.data.loader import Encode, StepExamples, evenly_spaced
from llmkit.data.order import RowOrder
from llmkit.data.packing import Groups, micro_batches
from llmkit.data.rows import Ints
from llmkit.data.samples import LabelledRow, RowStore, Samples
from llmkit.data.seeds import held_out_seed, row_seed

_UNLEARNED = -100
_MOST_KEPT = 50_000_000
"""Tokens of encoded rows that a process keeps, some bytes each."""


class SampleBatches:
    """Deals each step's rows out to ranks.

    Step s holds the training positions [s*R, (s+1)*R) for R = rows_per_step. Its micro-batches are made of the rows'
    lengths; number k goes to rank k % world_size. Every rank has as many as every other.

    Args:
        rows: Where rows come from.
        order: Which row comes when; its sources are `groups`.
        rows_per_step: R, over all ranks.
        tokens: Tokens of a micro-batch at most; a longer row is alone in its own.
        packed: Whether rows of a micro-batch stand in one line, without padding.
        world_size: Number of ranks.
        rank: The rank asked for.
        groups: The numbers of the rows in each source of the order; None: one source, all rows.
        encode: What is made of each row.
        draws: Whether chance decides what is made of a row; where not, it is made once and kept.
        partner: The seed of a row -> the number of another that `encode` mixes into it, so that both need room.
        share: Lengths of a step's rows and the number of ranks -> its micro-batches; None: by `tokens` and `packed`.
    """

    def __init__(
        self,
        rows: Samples,
        order: RowOrder,
        *,
        rows_per_step: int,
        tokens: int,
        packed: bool,
        world_size: int,
        rank: int,
        encode: Encode,
        draws: bool = False,
        groups: Sequence[Ints] | None = None,
        partner: Callable[[int], int] | None = None,
        share: Callable[[Ints, int], Groups] | None = None,
    ) -> None:
        self.rows = rows
        self.order = order
        self.rows_per_step = rows_per_step
        self.tokens = tokens
        self.packed = packed
        self.world_size = world_size
        self.rank = rank
        self.encode = encode
        self.groups = groups
        self.partner = partner
        self.share = share
        self._keeps = not draws and int(rows.lengths.sum()) <= _MOST_KEPT
        self._made: dict[int, Mapping[str, Ints]] = {}

    def of_step(self, step: int) -> StepExamples:
        """This rank's `(global micro-batch number, examples)` of optimizer step `step`, counted from 0."""
        numbers = self.numbers(step)
        found: StepExamples = []
        for micro, group in enumerate(self.shares(numbers, self.others(step))):
            if micro % self.world_size == self.rank:
                found.append((micro, self._examples(step, numbers, group)))
        return found

    def numbers(self, step: int) -> Ints:
        """The numbers of the step's rows, in the order in which they come."""
        positions = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        sources, within = self.order.locate(positions)
        if self.groups is None:
            return within
        return np.array([self.groups[s][w] for s, w in zip(sources.tolist(), within.tolist(), strict=True)])

    def others(self, step: int) -> Ints | None:
        """The numbers of the rows that are mixed into those of a step; None where none are."""
        if self.partner is None:
            return None
        return np.array([self.partner(self._seed(step, place)) for place in range(self.rows_per_step)])

    def shares(self, numbers: Ints, others: Ints | None = None) -> list[list[int]]:
        """The micro-batches of all ranks, as places within the step; a row has room for what is mixed into it."""
        lengths = self.rows.lengths[numbers]
        if others is not None:
            lengths = np.maximum(lengths, self.rows.lengths[others])
        if self.share is not None:
            return self.share(lengths, self.world_size)
        return micro_batches(lengths, budget=self.tokens, world_size=self.world_size, packed=self.packed)

    def places(self, step: int, micro: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """Micro-batch and row number of each row of a step; of these micro-batches only, or of all."""
        numbers = self.numbers(step)
        return [
            (number, int(numbers[place]))
            for number, group in enumerate(self.shares(numbers, self.others(step)))
            if micro is None or number in micro
            for place in group
        ]

    def _examples(self, step: int, numbers: Ints, group: Sequence[int]) -> list[Mapping[str, Ints]]:
        if not group:  # there are fewer rows than ranks
            return [unlearned(self._example(step, int(numbers[0]), 0))]
        return [self._example(step, int(numbers[place]), place) for place in group]

    def _example(self, step: int, number: int, place: int) -> Mapping[str, Ints]:
        if number in self._made:
            return self._made[number]
        example = self.encode({**self.rows[number], "seed": self._seed(step, place)})
        if self._keeps:
            self._made[number] = example
        return example

    def _seed(self, step: int, place: int) -> int:
        return row_seed(self.order.seed, step * self.rows_per_step + place)


def unlearned(example: Mapping[str, Ints]) -> Mapping[str, Ints]:
    """The example with nothing to learn from it."""
    return {
        name: np.full_like(value, _UNLEARNED) if name.startswith("targets") else value
        for name, value in example.items()
    }


def held_out_batches(
    rows: RowStore, *, tokens: int, max_rows: int | None, world_size: int, rank: int
) -> Iterator[list[tuple[int, LabelledRow]] | None]:
    """This rank's share of the held-out rows with their numbers: long ones first, rows of like length together.

    Every rank gets the same number of rounds: None stands for a batch that this one does not have.

    Args:
        rows: The rows; each comes once.
        tokens: Tokens of a batch at most, padding counted.
        max_rows: At most so many groups of rows over all ranks, evenly spaced, each whole; None takes all.
        world_size: Number of ranks.
        rank: The rank asked for.
    """
    known = np.unique(rows.groups)
    chosen = np.flatnonzero(np.isin(rows.groups, known[evenly_spaced(len(known), max_rows)]))
    order = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
    groups: list[list[int]] = []
    for number in order.tolist():
        longest = rows.lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    for start in range(0, len(groups), world_size):
        mine = groups[start + rank] if start + rank < len(groups) else None
        yield (
            None
            if mine is None
            else [(number, {**rows[number], "seed": held_out_seed(number)}) for number in mine]
        )
