"""Micro-batches of labelled rows that all have one shape, for a compiled model, which is made anew for each.

Each has as many rows, and beside them a few of which nothing is learned but that are as long as any: what fills a batch
up to its longest row then fills all batches up to the same length, in every part that a task has, whatever it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.data.sample_batches import unlearned
from llmkit.data.samples import Samples
from llmkit.objectives.base import Example, LooksAhead, Objective
from llmkit.plan import Plan


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
    def of(cls, objective: Objective, rows: Samples, tokens: int) -> "Even":
        """For these rows, which are all encoded once.

        Args:
            objective: The task.
            rows: Those to learn from.
            tokens: Of a micro-batch, at most.
        """
        fillers = fillers_of(objective, rows)
        longest = int(rows.lengths.max())
        return cls(max(1, tokens // longest - len(fillers)), longest, fillers)

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch, where each row counts as the longest."""
        return self.rows * self.longest

    def filled(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of a micro-batch, and what makes it like all others."""
        spare = self.rows - len(examples)
        return [*examples, *[self.fillers[0]] * spare, *self.fillers]


def is_even(objective: Objective, plan: Plan, *, packed: bool) -> bool:
    """Whether a run's micro-batches are made alike: a compiled model's are.

    Lines of packed rows have nothing to fill up; a task that compares a row with all others would count the fillers
    among them.
    """
    return plan.compile and not packed and not (isinstance(objective, LooksAhead) and objective.looks_ahead)


def fillers_of(objective: Objective, rows: Samples) -> list[Example]:
    """Of each part of the examples the longest there is, once each, with nothing to learn from it."""
    longest: dict[str, Example] = {}
    for number in range(len(rows)):
        example = objective.encode({**rows[number], "seed": 0})
        for name, value in example.items():
            if name not in longest or np.size(value) > np.size(longest[name][name]):
                longest[name] = example
    # One that is the longest in several parts is needed once.
    chosen = {id(example): example for example in longest.values()}
    return [unlearned(example) for example in chosen.values()]
