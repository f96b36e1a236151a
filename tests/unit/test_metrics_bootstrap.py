"""Intervals and tests: against known distributions and SciPy."""

import numpy as np
import pytest
from scipy import stats

from llmkit.errors import DataError
from llmkit.metrics.bootstrap import compare, interval, mcnemar


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = interval(lambda rows: values[rows].mean(), 400, seed=1, resamples=2000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.value == values.mean()
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.02)


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20.0)
    one, again, other = (
        interval(lambda rows: values[rows].mean(), 20, seed=s, resamples=50) for s in (1, 1, 2)
    )
    assert one == again != other


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 200 samples, 90 % intervals of the mean hold 0 in 165 to 193: four standard deviations."""
    chance = np.random.default_rng(3)
    holds = 0
    for seed in range(200):
        values = chance.normal(size=60)
        found = interval(lambda rows, v=values: v[rows].mean(), 60, seed=seed, resamples=200, level=0.9)
        holds += found.low <= 0 <= found.high
    assert 165 <= holds <= 193


def test_two_models_that_differ_and_two_that_do_not():
    chance = np.random.default_rng(5)
    first = chance.random(500) < 0.7
    better = first | (chance.random(500) < 0.3)
    noise = np.where(chance.random(500) < 0.1, chance.random(500) < 0.7, first)
    found = compare(lambda r: first[r].mean(), lambda r: better[r].mean(), 500, seed=1, resamples=500)
    assert found.difference.low > 0
    assert found.p == 1 / 501
    same = compare(lambda r: first[r].mean(), lambda r: noise[r].mean(), 500, seed=1, resamples=500)
    assert same.difference.low < 0 < same.difference.high
    assert same.p > 0.1
    equal = compare(lambda r: first[r].mean(), lambda r: first[r].mean(), 500, seed=1, resamples=20)
    assert (equal.difference.value, equal.p) == (0, 1)


def test_the_p_of_paired_differences_is_that_of_the_t_test():
    chance = np.random.default_rng(7)
    first = chance.normal(size=200)
    second = first + chance.normal(0.13, 1, size=200)
    found = compare(lambda r: first[r].mean(), lambda r: second[r].mean(), 200, seed=2, resamples=4000)
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)


@pytest.mark.parametrize("counts", [(0, 0), (3, 3), (5, 1), (0, 8), (30, 12), (12, 30)])
def test_mcnemar_equals_the_binomial_test(counts):
    only_first, only_second = counts
    first = np.array([True] * only_first + [False] * only_second + [True] * 5 + [False] * 5)
    second = np.array([False] * only_first + [True] * only_second + [True] * 5 + [False] * 5)
    expected = stats.binomtest(only_first, sum(counts)).pvalue if sum(counts) else 1
    assert mcnemar(first, second) == pytest.approx(expected)


def test_no_rows_are_an_error():
    for measure in (lambda: interval(lambda r: 0.0, 0, seed=1), lambda: mcnemar([], [])):
        with pytest.raises(DataError, match="no rows"):
            measure()
