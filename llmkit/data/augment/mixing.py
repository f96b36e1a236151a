"""Which row is mixed into which, and how much of it: a function of the training row's seed alone.

**Source**: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, section 2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmkit.data.augment.rows import Encode
from llmkit.data.balance import Groups
from llmkit.data.samples import RowStore
from llmkit.data.seeds import OTHER, mix_seed

SHARE = "share"
"""In an example: how much of it is its own row, from 0 to 1; the rest is the row that it is mixed with."""
MIXED = "_mixed"
"""Ends the names of what a mixed example has of that other row."""

_PARTNER, _SHARE, _OTHER_SEED = 1, 2, 3
_NOT_OF_A_TEXT = ("cut",)


class Mixing:
    """Encodes each training row together with another one, drawn as the rows to learn from are.

    Args:
        encode: What is made of a row that is alone.
        rows: The rows to learn from.
        alpha: Of the distribution Beta(alpha, alpha) of the shares: 1 is even, a small one mixes most rows little.
        groups: The rows by class, where classes are balanced.
    """

    def __init__(self, encode: Encode, rows: RowStore, alpha: float, groups: Groups | None = None) -> None:
        self._encode = encode
        self._rows = rows
        self._alpha = alpha
        self._groups = groups
        self._ends = np.cumsum(groups.shares) if groups else None

    def partner(self, seed: int) -> int:
        """The number of the row that is mixed into the one with this seed; now and then it is the same row."""
        drawn = mix_seed(seed, OTHER, _PARTNER)
        if self._groups is None or self._ends is None:
            return drawn % len(self._rows)
        where = _chance(seed, _PARTNER).random() * self._ends[-1]
        group = int(np.searchsorted(self._ends, where, side="right"))
        return int(self._groups.rows[group][drawn % len(self._groups.rows[group])])

    def share(self, seed: int) -> float:
        """How much stays of the row with this seed."""
        return float(_chance(seed, _SHARE).beta(self._alpha, self._alpha))

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The example of the row, with that of its partner beside it."""
        seed = int(row["seed"])
        other = self._encode({**self._rows[self.partner(seed)], "seed": mix_seed(seed, OTHER, _OTHER_SEED)})
        return mixed(self._encode(row), other, self.share(seed))


def _chance(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(mix_seed(seed, OTHER, purpose))


def mixed(example: Mapping[str, Any], other: Mapping[str, Any], share: float) -> dict[str, Any]:
    """An example with another beside it.

    Args:
        example: Of a row.
        other: Of the row that it is mixed with.
        share: How much of it is its own row.
    """
    beside = {name + MIXED: value for name, value in other.items() if name not in _NOT_OF_A_TEXT}
    return {**example, **beside, SHARE: np.asarray([share], dtype=np.float32)}
