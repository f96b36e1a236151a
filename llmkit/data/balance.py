"""Rows by class, so that rare classes are learned from more often: sources of an order, each with its share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmkit.data.rows import Ints

Balance = Literal["root", "classes"]


@dataclass(frozen=True)
class Groups:
    """Rows in groups.

    Attributes:
        rows: The numbers of the rows of each group, in their order; no group is empty.
        shares: What part of the rows that are learned from comes from each; they sum to 1.
    """

    rows: Sequence[Ints]
    shares: Sequence[float]


def by_class(labels: Iterable[str], balance: Balance) -> Groups:
    """Groups of the rows that have the same label.

    Args:
        labels: Of each row, in the rows' order.
        balance: `classes` gives all classes the same share, `root` one in proportion to the root of their rows.
    """
    numbers: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        numbers.setdefault(label, []).append(number)
    rows = [np.asarray(numbers[label], dtype=np.int64) for label in sorted(numbers)]
    sizes = np.array([len(group) for group in rows], dtype=np.float64)
    raw = np.ones_like(sizes) if balance == "classes" else np.sqrt(sizes)
    return Groups(rows, (raw / raw.sum()).tolist())
