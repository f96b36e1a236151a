"""How far a figure can be trusted: intervals by resampling rows, and whether two models differ.

All chance is a function of the seed. Shape suffix: N rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from llmkit.metrics.inputs import Floats, Integers, check_rows

Metric = Callable[[Integers], float]
"""Numbers of rows, some of them several times -> the metric over them."""

Figures = Callable[[Integers], Mapping[str, float]]
"""The same, several metrics by name."""


@dataclass(frozen=True)
class Interval:
    """A figure and where it may lie.

    Attributes:
        value: Over all rows.
        low: The lower end.
        high: The upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A second model's figure less the first one's.

    Attributes:
        difference: Over all rows, with its interval.
        p: How often chance alone makes a difference of at least this size, in either direction.
    """

    difference: Interval
    p: float


def wilson(num_right: int, num_rows: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share: of all right or all wrong rows, too, of which every draw is like the other.

    Args:
        num_right: Rows that were answered rightly.
        num_rows: How many there are.
        z: The normal quantile; that of 95%.

    **Source**: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    share, weight = num_right / num_rows, z * z / num_rows
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * np.sqrt((share * (1 - share) + weight / 4) / num_rows)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def resampled(metric: Metric, num_rows: int, *, seed: int, resamples: int = 1000) -> Floats:
    """The metric over `resamples` draws of as many rows, with replacement.

    Args:
        metric: From numbers of rows.
        num_rows: How many there are.
        seed: The draws are a function of this.
        resamples: How many.
    """
    chance = np.random.default_rng(seed)
    return np.array([metric(chance.integers(num_rows, size=num_rows)) for _ in range(resamples)])


def interval(
    metric: Metric, num_rows: int, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """The percentile interval of a metric.

    Args:
        metric: From numbers of rows.
        num_rows: How many there are.
        seed: The draws are a function of this.
        resamples: How many.
        level: Share of the draws that the interval holds.

    Raises:
        DataError: There are no rows.

    **Source**: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    rows = np.arange(num_rows)
    check_rows(rows, rows)
    return _interval(metric(rows), resampled(metric, num_rows, seed=seed, resamples=resamples), level)


def _interval(value: float, draws: Floats, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def compare(
    first: Metric, second: Metric, num_rows: int, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Comparison:
    """Whether the second model is better than the first on the same rows: both see the same draws.

    The differences of the draws scatter about the one that was found as it would about 0 were there none, so p is the
    share of them that lie at least as far from it as it does from 0; one is added to both counts, so p is never 0.

    Args:
        first: The first model's metric, from numbers of rows.
        second: The second one's.
        num_rows: How many rows there are.
        seed: The draws are a function of this.
        resamples: How many.
        level: Share of the draws that the interval holds.

    Raises:
        DataError: There are no rows.

    **Source**: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004, section 4; the shift
    to 0 as in Riezler and Maxwell 2005.
    """
    rows = np.arange(num_rows)
    check_rows(rows, rows)
    value = second(rows) - first(rows)
    draws = resampled(lambda some: second(some) - first(some), num_rows, seed=seed, resamples=resamples)
    return _comparison(value, draws, level)


def _comparison(value: float, draws: Floats, level: float) -> Comparison:
    # A hair of tolerance: a draw of the same rows in another order adds up to another last bit.
    extreme = int((np.abs(draws - value) >= abs(value) * (1 - 1e-12)).sum())
    return Comparison(_interval(value, draws, level), (1 + extreme) / (1 + len(draws)))


def intervals(
    figures: Figures, num_rows: int, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, Interval]:
    """The percentile interval of each of several metrics, all from the same draws.

    Args:
        figures: From numbers of rows, metrics by name.
        num_rows: How many rows there are.
        seed: The draws are a function of this.
        resamples: How many.
        level: Share of the draws that the interval holds.

    Raises:
        DataError: There are no rows.
    """
    rows = np.arange(num_rows)
    check_rows(rows, rows)
    drawn = _drawn(figures, num_rows, seed=seed, resamples=resamples)
    return {
        name: _interval(value, np.array([one[name] for one in drawn]), level)
        for name, value in figures(rows).items()
        if all(name in one for one in drawn)
    }


def compare_all(
    first: Figures, second: Figures, num_rows: int, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, Comparison]:
    """Each metric that both have, of the second model less the first one's; see `compare`.

    Raises:
        DataError: There are no rows.
    """
    rows = np.arange(num_rows)
    check_rows(rows, rows)
    pairs = [
        _drawn(figures, num_rows, seed=seed, resamples=resamples) for figures in (first, second)
    ]  # of the same rows: the draws follow from the seed
    before, after = first(rows), second(rows)
    found = {}
    for name in before:
        if name in after and all(name in one for drawn in pairs for one in drawn):
            draws = np.array([b[name] - a[name] for a, b in zip(*pairs, strict=True)])
            found[name] = _comparison(after[name] - before[name], draws, level)
    return found


def _drawn(figures: Figures, num_rows: int, *, seed: int, resamples: int) -> list[Mapping[str, float]]:
    chance = np.random.default_rng(seed)
    return [figures(chance.integers(num_rows, size=num_rows)) for _ in range(resamples)]


def mcnemar(first_right_N: Any, second_right_N: Any) -> float:
    """The exact two-sided p of McNemar's test: whether two models are right equally often.

    Only rows on which one is right and the other wrong count; 1 where there are none.

    Args:
        first_right_N: Whether the first model was right.
        second_right_N: Whether the second was.

    Raises:
        DataError: There are no rows.

    **Source**: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    1947, in the exact binomial form.
    """
    check_rows(first_right_N, second_right_N)
    first_N, second_N = np.asarray(first_right_N, dtype=bool), np.asarray(second_right_N, dtype=bool)
    only_first, only_second = int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())
    differing = only_first + only_second
    if only_first == only_second:
        return 1.0
    tail = sum(comb(differing, hits) for hits in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**differing)
