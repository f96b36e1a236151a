"""Micro-batches of a step: nothing lost, nothing over the budget, and little more than the best there is."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.packing import Groups, cost, micro_batches


def _all_groupings(rows: list[int]) -> Iterator[Groups]:
    """Every way to put rows into groups."""
    if not rows:
        yield []
        return
    for rest in _all_groupings(rows[1:]):
        yield [[rows[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [rows[0], *group], *rest[i + 1 :]]


def _allowed(lengths: list[int], groups: Groups, budget: int, world_size: int, packed: bool) -> bool:
    def fits(group: Groups) -> bool:
        return len(group) == 1 or cost(lengths, [group], packed=packed) <= budget

    return len(groups) % world_size == 0 and all(fits(group) for group in groups)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SHORT = st.lists(st.integers(1, 12), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 120), st.integers(1, 5), st.booleans(), st.integers(0, 50))
def test_each_row_is_there_once_within_the_budget(
    lengths: list[int], budget: int, world_size: int, packed: bool, overhead: int
) -> None:
    groups = micro_batches(lengths, budget=budget, world_size=world_size, packed=packed, overhead=overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert len(groups) % world_size == 0
    for group in groups:
        assert len(group) <= 1 or cost(lengths, [group], packed=packed) <= budget
    again = micro_batches(
        np.array(lengths), budget=budget, world_size=world_size, packed=packed, overhead=overhead
    )
    assert groups == again
    assert cost(lengths, groups[:1], packed=packed) == max(
        cost(lengths, [group], packed=packed) for group in groups if group
    )


@settings(max_examples=100, deadline=None)
@given(SHORT, st.integers(6, 30), st.integers(1, 3), st.integers(0, 20))
def test_padded_costs_what_the_best_of_all_groupings_costs(
    lengths: list[int], budget: int, world_size: int, overhead: int
) -> None:
    """Exactly so on one process; on more, an added cut is the best one, which may not be the best of all."""
    allowed = [
        g
        for g in _all_groupings(list(range(len(lengths))))
        if _allowed(lengths, g, budget, world_size, False)
    ]
    groups = micro_batches(lengths, budget=budget, world_size=world_size, packed=False, overhead=overhead)
    if not allowed:
        assert [] in groups
        return
    assert [] not in groups
    best = min(cost(lengths, g, packed=False) + overhead * len(g) for g in allowed)
    ours = cost(lengths, groups, packed=False) + overhead * len(groups)
    if world_size == 1:
        assert ours == best
    assert ours <= 1.25 * best + world_size * overhead


@settings(max_examples=100, deadline=None)
@given(SHORT, st.integers(6, 30), st.integers(1, 3))
def test_packed_needs_hardly_more_bins_than_the_best_and_fills_them_evenly(
    lengths: list[int], budget: int, world_size: int
) -> None:
    allowed = [
        g for g in _all_groupings(list(range(len(lengths)))) if _allowed(lengths, g, budget, world_size, True)
    ]
    groups = micro_batches(lengths, budget=budget, world_size=world_size, packed=True)
    if not allowed:
        assert [] in groups
        return
    assert [] not in groups
    fewest = min(len(g) for g in allowed)
    assert fewest <= len(groups) <= fewest + world_size
    if len(groups) == fewest:
        fullest = min(max(cost(lengths, [x], packed=True) for x in g) for g in allowed if len(g) == fewest)
        assert max(cost(lengths, [x], packed=True) for x in groups) <= max(
            fullest * 4 / 3, budget * (fullest > budget * 3 / 4)
        )


def test_a_worked_example_of_both() -> None:
    lengths = [3, 9, 4, 8, 3, 3]
    padded = micro_batches(lengths, budget=18, world_size=1, packed=False, overhead=5)
    assert padded == [[1, 3], [2, 0, 4, 5]]  # 2 x 9 and 4 x 4 tokens; three groups would save 3 and cost 5
    assert cost(lengths, padded, packed=False) == 34
    packed = micro_batches(lengths, budget=16, world_size=2, packed=True)
    assert [sum(lengths[i] for i in group) for group in packed] == [15, 15]
    assert cost(lengths, packed, packed=True) == 30


def test_bins_that_only_fit_tightly_are_found() -> None:
    """Even filling would put 14 into one bin; the longest rows together fill another."""
    assert micro_batches([6, 4, 6, 4, 4], budget=12, world_size=1, packed=True) == [[0, 2], [1, 3, 4]]


def test_a_further_cut_is_where_it_saves_most() -> None:
    """Two groups are cheapest; of the third that is needed, 10 and 2 apart save 8 tokens, 20 and 19 one."""
    lengths = [20, 19, 10, 2]
    assert micro_batches(lengths, budget=40, world_size=1, packed=False, overhead=50) == [[0, 1], [2, 3]]
    assert micro_batches(lengths, budget=40, world_size=3, packed=False, overhead=50) == [[0, 1], [2], [3]]


def test_more_overhead_makes_fewer_groups() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 64)
    counts = [
        len(micro_batches(lengths, budget=16384, world_size=1, packed=False, overhead=o))
        for o in (0, 100, 1000, 10**6)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 2


def test_processes_have_about_as_much_to_do() -> None:
    lengths = np.random.default_rng(1).lognormal(4, 0.8, 512).astype(int) + 1
    for packed, uneven in ((True, 1.01), (False, 1.1)):
        groups = micro_batches(lengths, budget=2048, world_size=4, packed=packed)
        loads = [cost(lengths, groups[rank::4], packed=packed) for rank in range(4)]
        assert max(loads) <= uneven * min(loads)


def test_rows_that_do_not_reach_for_all_processes_leave_empty_ones_last() -> None:
    for packed in (False, True):
        assert micro_batches([5, 7, 6], budget=100, world_size=4, packed=packed) == [[1], [2], [0], []]
        assert micro_batches([9, 9, 9, 9, 9], budget=9, world_size=2, packed=packed)[-1] == []


def test_a_step_of_4096_rows_is_within_a_few_percent_of_what_cannot_be_beaten() -> None:
    """Packed: the fewest bins that hold the tokens. Padded: hardly any padding."""
    lengths = np.minimum(np.random.default_rng(2).lognormal(5, 0.7, 4096).astype(int) + 1, 2048)
    packed = micro_batches(lengths, budget=8192, world_size=1, packed=True)
    assert len(packed) == -(-int(lengths.sum()) // 8192)
    padded = micro_batches(lengths, budget=8192, world_size=8, packed=False)
    assert cost(lengths, padded, packed=False) < 1.05 * lengths.sum()


@pytest.mark.parametrize(
    ("lengths", "budget", "world_size", "said"),
    [
        ([], 8, 1, "no rows"),
        ([3, 0], 8, 1, "row 1 has 0 tokens"),
        ([3], 0, 1, "budget 0"),
        ([3], 8, 0, "world_size 0"),
    ],
)
def test_what_makes_no_sense_is_refused(lengths: list[int], budget: int, world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        micro_batches(lengths, budget=budget, world_size=world_size, packed=False)
