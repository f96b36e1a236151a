"""Figures of answers that are good or bad, from how much likelier each is than it was when training began.

Shape suffixes: N rows, I items (prompts).

**Source**: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024, section 4.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.objectives.base import Ints
from llmkit.objectives.detail import Detail, worst_first

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Judged:
    """What was found of answers.

    Args:
        prompts: Of each row what it answers: equal texts are one item.
        found: Of each row: its log ratio in nats, whether it counts, whether it is good, the log ratio of an answer
            to another prompt, and whether there is one.
        beta: What a nat is worth.
        weights: Of a good and of a bad answer in the loss.
    """

    def __init__(
        self, prompts: Sequence[str], found: Sequence[Any], *, beta: float, weights: tuple[float, float]
    ) -> None:
        found_NK: Floats = np.array(found, dtype=np.float64).reshape(len(prompts), 5)
        self._beta, self._weights = beta, weights
        self._ratio_N, self._other_N = found_NK[:, 0], found_NK[:, 3]
        self._counts_N: Bools = found_NK[:, 1] == 1
        self._good_N: Bools = found_NK[:, 2] == 1
        self._has_other_N: Bools = found_NK[:, 4] == 1
        numbers: dict[str, int] = {}
        self._owner_N: Ints = np.array(
            [numbers.setdefault(text, len(numbers)) for text in prompts], dtype=int
        )
        order = np.argsort(self._owner_N, kind="stable")
        sizes = np.bincount(self._owner_N, minlength=len(numbers))
        self._rows = np.split(order, np.cumsum(sizes)[:-1]) if len(numbers) else []
        compared = [self._compared(rows) for rows in self._rows]
        self._right_I: Floats = np.array([right for right, _ in compared], dtype=np.float64)
        self._pairs_I: Floats = np.array([pairs for _, pairs in compared], dtype=np.float64)

    def figures(self, items: Ints | None = None) -> dict[str, float]:
        """The figures of some items, some of them several times; None: of all.

        `loss`; `kl`, the reference point in nats; `chosen` and `rejected`, what good and bad answers are worth on
        average, and `margin`, the difference; `accuracy`: how often a good answer is worth more than a bad one, ties
        half: of answers to the same prompt where any prompt has both kinds, else of all.
        """
        items = np.arange(len(self._rows)) if items is None else items
        rows = np.concatenate([self._rows[item] for item in items]) if len(items) else np.array([], dtype=int)
        if not self._counts_N[rows].any():
            return {}
        kl = self._reference_point(rows)
        rows = rows[self._counts_N[rows]]
        found = {"loss": float(self._losses(rows, kl).mean()), "kl": kl}
        means = {}
        for name, is_one in (("chosen", self._good_N[rows]), ("rejected", ~self._good_N[rows])):
            if is_one.any():
                means[name] = self._beta * float(self._ratio_N[rows][is_one].mean())
        if len(means) < 2:
            return {**found, **means}
        right, pairs = self._right_I[items].sum(), self._pairs_I[items].sum()
        if not self._pairs_I.any():
            right, pairs = self._compared(rows)
        accuracy = {"accuracy": float(right / pairs)} if pairs else {}
        return {**found, **accuracy, "margin": means["chosen"] - means["rejected"], **means}

    def detail(self, rows: Sequence[Mapping[str, Any]]) -> Detail:
        """What the figures are made of: an item is a prompt with its answers."""
        kl = self._reference_point(np.arange(len(rows)))
        signed_N = np.where(self._good_N, 1, -1) * self._beta * (self._ratio_N - kl)
        # An answer that was cut off entirely says nothing; a prompt that has only such ones is no item.
        known = [item for item, some in enumerate(self._rows) if self._counts_N[some].any()]
        place = np.full(len(self._rows), -1)
        place[known] = np.arange(len(known))
        scores = [
            float(signed_N[self._rows[item]][self._counts_N[self._rows[item]]].mean()) for item in known
        ]
        lines = [
            {**self._line(rows, self._rows[item]), "score": score}
            for item, score in zip(known, scores, strict=True)
        ]
        which = np.array(known, dtype=int)
        return Detail(
            keys=[rows[self._rows[item][0]]["place"] for item in known],
            owner=place[self._owner_N].tolist(),
            figures=lambda items: self.figures(which[items]),
            lines=lines,
            errors=worst_first([-score for score in scores], [score <= 0 for score in scores]),
        )

    def _line(self, rows: Sequence[Mapping[str, Any]], some: Ints) -> dict[str, Any]:
        """A prompt, a good answer to it, the answer that is worth most, and a bad one."""
        best = some[int(np.argmax(self._ratio_N[some]))]
        good, bad = (
            next((_said(rows[number]) for number in some if self._good_N[number] == kind), None)
            for kind in (True, False)
        )
        line = {"input": rows[some[0]]["prompt"], "target": good, "prediction": _said(rows[best])}
        return line if bad is None else {**line, "rejected": bad}

    def _reference_point(self, rows: Ints) -> float:
        others = self._other_N[rows][self._has_other_N[rows]]
        return max(0.0, float(others.mean())) if len(others) else 0.0

    def _losses(self, rows: Ints, kl: float) -> Floats:
        above = self._beta * (self._ratio_N[rows] - kl)
        good = self._good_N[rows]
        weights = np.where(good, *self._weights)
        # sigmoid(-x) without overflow: of -x where the answer is good, of x where it is bad
        return np.asarray(weights * np.exp(-np.logaddexp(0.0, np.where(good, above, -above))))

    def _compared(self, rows: Ints) -> tuple[float, int]:
        """Of the pairs of a good and a bad answer among some rows: in how many the good one is worth more; how many."""
        rows = rows[self._counts_N[rows]]
        good = self._ratio_N[rows][self._good_N[rows]]
        bad = np.sort(self._ratio_N[rows][~self._good_N[rows]])
        below, up_to = (np.searchsorted(bad, good, side=side).sum() for side in ("left", "right"))
        return float(below + up_to) / 2, len(good) * len(bad)


def _said(row: Mapping[str, Any]) -> Any:
    return row["completion"][-1].get("content")
