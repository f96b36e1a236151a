"""What follows from measurements: how models compare, and whether what must hold does. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from llmkit.errors import UsageError
from llmkit.evaluate.measurement import FEW_DOCUMENTS, FEWEST, Measurement
from llmkit.metrics.bootstrap import Comparison, mcnemar, wilson
from llmkit.recipe.evaluation import Gate
from llmkit.registry import FIGURES, nearest

ANY_TOKENS = ("bits_per_byte", "char_perplexity")
"""Figures of text that compare whatever the models' vocabularies."""
_SHARES = ("accuracy", "exact_match", "recall_at_1")
"""Figures that are the share of items answered rightly, where items are right or wrong."""
SMALL = 0.05
"""Below this p a difference is said to be one."""


@dataclass(frozen=True)
class Difference:
    """A figure of one model beside that of another.

    Attributes:
        subject: The model.
        baseline: The other one.
        metric: The figure.
        value: The model's.
        other: The other one's.
        difference: `value` less `other`.
        low: The lower end of the difference's 95% interval; None: it has none.
        high: The upper end.
        p: How often chance alone makes a difference of this size; None: it is not known.
        mcnemar: The exact p of McNemar's test, of a figure that is the share of items answered rightly.
        direction: Whether the figure is better as it rises or falls, where that is known.
        why: Why there is no p.
    """

    subject: str
    baseline: str
    metric: str
    value: float
    other: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    mcnemar: float | None = None
    direction: Literal["higher", "lower"] | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or that the two cannot be told apart."""
        p = self.p if self.mcnemar is None else self.mcnemar
        if p is None:
            return "not tested"
        if p >= SMALL or not self.difference:
            return "no difference seen"
        if self.direction is None:
            return "differs"
        return "better" if (self.difference < 0) == (self.direction == "lower") else "worse"

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Held:
    """Whether a gate held.

    Attributes:
        subject: The model.
        metric: The figure.
        value: Its value.
        limit: The worst that is good enough.
        held: Whether it is.
        said: What was asked for, in words.
    """

    subject: str
    metric: str
    value: float
    limit: float
    held: bool
    said: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def differences(
    measured: Measurement, baseline: Measurement, *, seed: int, resamples: int
) -> tuple[list[Difference], str]:
    """Every figure that both have, and why they could not be paired; empty where they were.

    Args:
        measured: The model.
        baseline: The one to compare it with.
        seed: The draws follow from it.
        resamples: How many draws.
    """
    why = _unpaired(measured, baseline)
    if not why and not resamples:
        why = "no draws were asked for (eval.resamples)"
    found = {} if why else baseline.compare(measured, seed=seed, resamples=resamples)
    names = [name for name in _shown(measured) if name in baseline.figures]
    return [_difference(name, measured, baseline, found.get(name), why) for name in names], why


def _shown(measured: Measurement) -> list[str]:
    """The figures in the order in which they are shown; counts are none."""
    first = [name for name in measured.shown if name in measured.figures]
    rest = [name for name in measured.figures if name not in first and not name.startswith("num_")]
    return first + rest


def _unpaired(measured: Measurement, baseline: Measurement) -> str:
    if measured.task != baseline.task:
        return f"{measured.subject} was asked {measured.task}, {baseline.subject} {baseline.task}"
    if measured.items is None or baseline.items is None:
        return "these figures are not made of items that could be compared one by one"
    if measured.data != baseline.data and _same_text_in_windows(measured, baseline):
        return (
            f"the text has fewer than {FEW_DOCUMENTS} documents, so windows stand in for them, and windows of two "
            f"vocabularies hold different text ({FEW_DOCUMENTS} documents at least)"
        )
    if measured.data != baseline.data or list(measured.items.keys) != list(baseline.items.keys):
        return f"{measured.subject} and {baseline.subject} were not measured on the same data"
    if len(measured.items.keys) < FEWEST:
        return f"{len(measured.items.keys)} items are too few to tell models apart ({FEWEST} at least)"
    return ""


def _same_text_in_windows(measured: Measurement, baseline: Measurement) -> bool:
    """Whether two models were asked one text in windows of tokens of their own."""
    both = (measured, baseline)
    return (
        measured.task == baseline.task == "text"
        and len({one.settings.get("text") for one in both}) == 1
        and len({one.settings.get("tokenizer") for one in both}) > 1
        and all(one.items is not None and one.items.keys[0].startswith("window ") for one in both)
    )


def _other_tokens(name: str, measured: Measurement, baseline: Measurement) -> str:
    """Why a figure a token does not compare; empty where it does."""
    tokenizers = {one.settings.get("tokenizer") for one in (measured, baseline)}
    if measured.task == baseline.task == "text" and name not in ANY_TOKENS and len(tokenizers) > 1:
        return f"{name} is per token, and these models' tokens differ: compare {' or '.join(ANY_TOKENS)}"
    return ""


def _difference(
    name: str, measured: Measurement, baseline: Measurement, found: Comparison | None, why: str
) -> Difference:
    value, other = measured.figures[name], baseline.figures[name]
    why = why or _other_tokens(name, measured, baseline)
    base = Difference(
        measured.subject,
        baseline.subject,
        name,
        value,
        other,
        value - other,
        direction=measured.direction(name),
        why=why,
    )
    if found is None or why:
        return base
    ends = found.difference
    return replace(base, low=ends.low, high=ends.high, p=found.p, mcnemar=_tested(name, measured, baseline))


def _tested(name: str, measured: Measurement, baseline: Measurement) -> float | None:
    """McNemar's p of a figure that is the share of items answered rightly; None of any other."""
    if measured.items is None or baseline.items is None:
        return None
    ours, theirs = measured.items.right, baseline.items.right
    if ours is None or theirs is None:
        return None
    for figures, right in ((measured.figures, ours), (baseline.figures, theirs)):
        share = float(np.mean(np.asarray(right, dtype=float)))
        if not any(math.isclose(figures[name], scale * share, abs_tol=1e-9) for scale in (1, 100)):
            return None
    return mcnemar(np.asarray(theirs), np.asarray(ours))


def check_gates(gate: Gate, measured: Measurement, baseline: Measurement | None) -> list[Held]:
    """What must hold of a model, and whether it does.

    Args:
        gate: What must.
        measured: The model.
        baseline: The one that `max_drop` compares with.

    Raises:
        UsageError: A figure is asked for that was not measured.
    """
    found = [_at_least(name, limit, measured) for name, limit in gate.fail_under.items()]
    if gate.max_drop is not None and baseline is not None:
        found.append(_no_drop(gate.metric or measured.best, gate.max_drop, measured, baseline))
    return found


def _value(name: str, measured: Measurement, asked_by: str) -> float:
    if name not in measured.figures:
        known = [one for one in measured.figures if not one.startswith("num_")]
        guess = nearest(name, known)
        hint = f"did you mean `{guess}`? " if guess else ""
        raise UsageError(
            f"{asked_by}: `{name}` {'does not fit' if name in FIGURES else 'is no figure of'} {measured.task} of "
            f"{measured.subject}",
            hint=f"{hint}it has {', '.join(known)}",
        )
    return measured.figures[name]


def check_names(names: Sequence[str], measured: Measurement) -> None:
    """Refuse figures that are asked for and were not measured.

    Raises:
        UsageError: Names those that were.
    """
    for name in names:
        _value(name, measured, "eval.metrics")


def _direction(name: str, measured: Measurement, asked_by: str) -> str:
    found = measured.direction(name)
    if found is None:
        raise UsageError(
            f"{asked_by}: nothing says whether a model gets better as `{name}` rises or falls",
            hint=f"choose another figure, such as `{measured.best}`",
        )
    return found


def _at_least(name: str, limit: float, measured: Measurement) -> Held:
    asked_by = "eval.gate.fail_under"
    value = _value(name, measured, asked_by)
    lower = _direction(name, measured, asked_by) == "lower"
    held = value <= limit if lower else value >= limit
    return Held(measured.subject, name, value, limit, held, f"at {'most' if lower else 'least'} {limit:g}")


def _no_drop(name: str, max_drop: float, measured: Measurement, baseline: Measurement) -> Held:
    asked_by = "eval.gate.max_drop"
    value, other = (_value(name, one, asked_by) for one in (measured, baseline))
    lower = _direction(name, measured, asked_by) == "lower"
    why = _other_tokens(name, measured, baseline) or _other_data(name, measured, baseline)
    if why:
        raise UsageError(f"{asked_by}: {why}", hint="give data that both can be measured on: --data FILES")
    room = abs(other) * max_drop
    limit = other + room if lower else other - room
    held = math.isclose(value, limit) or (value < limit if lower else value > limit)
    said = f"at most {100 * max_drop:.3g}% worse than the {other:.4g} of {baseline.subject}"
    return Held(measured.subject, name, value, limit, held, said)


def _other_data(name: str, measured: Measurement, baseline: Measurement) -> str:
    """Why a figure of one says nothing beside that of the other; empty where it does."""
    if measured.task != baseline.task:
        return f"{measured.subject} was asked {measured.task}, {baseline.subject} {baseline.task}"
    texts = {one.settings.get("text") for one in (measured, baseline)}
    # Windows of other tokens hold other text; all of them together hold the same.
    same_text = measured.task == "text" and name in ANY_TOKENS and len(texts) == 1
    if measured.data != baseline.data and not same_text:
        return f"{measured.subject} and {baseline.subject} were not measured on the same data"
    return ""


def intervals_of(measured: Measurement, *, seed: int, resamples: int) -> Mapping[str, tuple[float, float]]:
    """Each figure's 95% interval, where it has one.

    Draws of rows that are all right, or all wrong, are all alike: then a share of items has the interval of Wilson.
    """
    found = measured.intervals(seed=seed, resamples=resamples)
    return {name: _alike(name, measured) or (one.low, one.high) for name, one in found.items()}


def _alike(name: str, measured: Measurement) -> tuple[float, float] | None:
    """Wilson's interval of a share of items answered rightly, where all or none of them were; else None."""
    right = measured.items.right if measured.items is not None else None
    if name not in _SHARES or right is None or any(right) != all(right):
        return None
    low, high = wilson(sum(right), len(right))
    scale = 100 if name == "exact_match" and measured.task != "cls" else 1
    is_share = math.isclose(measured.figures[name], scale * all(right), abs_tol=1e-9)
    return (scale * low, scale * high) if is_share else None


def few_items(measured: Measurement, resamples: int) -> list[str]:
    """Why figures have no intervals, where there are too few items to draw from."""
    if measured.items is None or not resamples or len(measured.items.keys) >= FEWEST:
        return []
    num = len(measured.items.keys)
    return [f"{num} item{'' if num == 1 else 's'}: too few for an interval ({FEWEST} at least)"]
