"""Micro-batches of labelled rows that all have one shape, for a compiled model, which is made anew for each.

Each has as many rows, and beside them a few of which nothing is learned but that are as long as any: what fills a batch
up to its longest row then fills all batches up to the same length, in every part that a task has, whatever it is.
Packed rows stand in as many lines of one width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from llmkit.data.augment.mixing import mixed
from llmkit.data.packing import Groups, micro_batches
from llmkit.data.rows import Ints
from llmkit.data.sample_batches import unlearned
from llmkit.data.samples import Samples
from llmkit.objectives.base import Example, Extends, Lines, Objective
from llmkit.objectives.sft import LINE
from llmkit.plan import Plan

_UNIT = 64
"""Widths are a multiple of it, as kernels like them."""


@dataclass(frozen=True)
class Even:
    """How micro-batches are made alike.

    Attributes:
        rows: Rows of each that something is learned from, at most.
        longest: Tokens of the longest row.
        fillers: Rows without targets, as long as any in one part or another; at least one.
    """

    rows: int
    longest: int
    fillers: Sequence[Example]

    @classmethod
    def of(cls, objective: Objective, rows: Samples, tokens: int, *, mixes: bool) -> "Even | None":
        """For these rows, which are all encoded once.

        Args:
            objective: The task.
            rows: Those to learn from.
            tokens: Of a micro-batch, at most.
            mixes: Whether each row has another beside it.

        Returns:
            None where batches cannot be alike, as some rows take more lines of one than others.
        """
        fillers = fillers_of(objective, rows)
        if fillers is None:
            return None
        if mixes:
            fillers = [unlearned(mixed(filler, filler, 0.5)) for filler in fillers]
        longest = int(rows.lengths.max())
        return cls(max(1, tokens // longest - len(fillers)), longest, fillers)

    def share(self, lengths: Ints, world_size: int) -> Groups:
        """The micro-batches of a step's rows, where each takes the room of the longest."""
        room, budget = np.full_like(lengths, self.longest), self.rows * self.longest
        return micro_batches(room, budget=budget, world_size=world_size, packed=False)

    def filled(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of a micro-batch, and what makes it like all others."""
        spare = self.rows - len(examples)
        return [*examples, *[self.fillers[0]] * spare, *self.fillers]


@dataclass(frozen=True)
class EvenLines:
    """How micro-batches of packed rows are made alike: as many lines of one width each.

    Attributes:
        objective: Puts rows in lines.
        width: Tokens of a line. Every line ends with at least one that fills it up, so that in each of them several
            examples are kept apart.
        lines: Of a micro-batch.
        rows: Of the longest, in a micro-batch.
    """

    objective: Lines
    width: int
    lines: int
    rows: int

    @classmethod
    def of(cls, objective: Lines, rows: Samples, tokens: int) -> "EvenLines":
        """For these rows, in micro-batches of so many tokens, or of the longest row's."""
        longest = int(rows.lengths.max())
        needed = -(-(longest + 1) // _UNIT) * _UNIT
        width = max(needed, min(tokens, LINE) // _UNIT * _UNIT)
        lines = max(1, tokens // width)
        return cls(objective, width, lines, lines * ((width - 1) // longest))

    def share(self, lengths: Ints, world_size: int) -> Groups:
        """The micro-batches of a step's rows: as few lines as are found, dealt out in equal numbers."""
        bins = self._in_lines(lengths)
        shares = [list(chain(*bins[first : first + self.lines])) for first in range(0, len(bins), self.lines)]
        return shares + [[] for _ in range(-len(shares) % world_size)]

    def _in_lines(self, lengths: Sequence[int] | Ints) -> Groups:
        return micro_batches(lengths, budget=self.width - 1, world_size=1, packed=True)

    def filled(self, examples: Sequence[Example]) -> list[Example]:
        """The lines of a micro-batch whose rows fit into as many.

        Rows that were put in lines together with others go into as few without them: each goes where it went before.
        """
        bins = self._in_lines([len(example["input_ids"]) for example in examples])
        assert len(bins) <= self.lines
        bins += [[] for _ in range(self.lines - len(bins))]
        return [self.objective.line([examples[n] for n in sorted(bin)], self.width) for bin in bins]


def make_even(
    objective: Objective, rows: Samples, plan: Plan, *, packed: bool, mixes: bool
) -> Even | EvenLines | None:
    """How a run's micro-batches are made alike: a compiled model's are. None: they are not.

    Args:
        objective: The task.
        rows: Those to learn from.
        plan: The run's.
        packed: Whether rows stand behind each other.
        mixes: Whether each row has another beside it.
    """
    if not plan.compile:
        return None
    if not packed:
        return Even.of(objective, rows, plan.micro_batch_tokens, mixes=mixes)
    return EvenLines.of(objective, rows, plan.micro_batch_tokens) if isinstance(objective, Lines) else None


def fillers_of(objective: Objective, rows: Samples) -> list[Example] | None:
    """Of each part of the examples the longest there is, once each, with nothing to learn from it.

    Returns:
        None where examples make different numbers of rows.
    """
    longest: dict[str, tuple[int, Example]] = {}
    for number in range(len(rows)):
        example = objective.encode({**rows[number], "seed": 0})
        for name, extent in _extents(objective, example).items():
            if number and name.startswith("num_") and extent != longest[name][0]:
                return None
            if name not in longest or extent > longest[name][0]:
                longest[name] = extent, example
    # One that is the longest in several parts is needed once.
    chosen = {id(example): example for _, example in longest.values()}
    return [unlearned(example) for example in chosen.values()]


def _extents(objective: Objective, example: Example) -> Mapping[str, int]:
    if isinstance(objective, Extends):
        return objective.extents(example)
    return {name: np.size(value) for name, value in example.items()}
