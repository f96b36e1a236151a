import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.order import Permutation, RowOrder, capped_weights, common_weights, slots_per_block
from llmkit.errors import DataError, RecipeError


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, 65_537])
def test_permutation_is_a_bijection(n):
    for key in ((0,), (1, "epoch", 2)):
        assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))


def test_small_permutations_are_all_about_equally_likely():
    counts = Counter(tuple(Permutation(4, (key,))(np.arange(4))) for key in range(4800))
    assert len(counts) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001; the keys are fixed, so this never flickers


def test_permutation_mixes_well():
    n = 10_000
    images = Permutation(n, (7,))(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert np.count_nonzero(images == np.arange(n)) < 8  # 1 is expected
    other = Permutation(n, (8,))(np.arange(n))
    assert np.count_nonzero(images == other) < 8


def test_permutation_of_the_largest_domain_and_its_limits():
    n = 2**48
    index = np.array([0, 1, n - 1])
    images = Permutation(n, (1,))(index)
    assert len(set(images.tolist())) == 3
    assert images.min() >= 0
    assert images.max() < n
    assert Permutation(n, (1,))(index.reshape(3, 1)).tolist() == images.reshape(3, 1).tolist()
    with pytest.raises(ValueError, match="2\\*\\*48"):
        Permutation(n + 1, (1,))
    with pytest.raises(IndexError, match=r"0\.\.6"):
        Permutation(7, (1,))([7])


def test_permutation_is_the_same_on_every_machine():
    # Changing these changes the data order of every run that is to be resumed.
    assert Permutation(100, (42, "epoch", 0))([0, 1, 2, 3, 99]).tolist() == [29, 83, 49, 67, 80]


def test_each_row_comes_once_an_epoch_and_epochs_differ():
    order = RowOrder([5, 0, 7], None, seed=3)
    epochs = []
    for epoch in range(3):
        source, row = order.locate(np.arange(epoch * 12, epoch * 12 + 12))
        epochs.append(list(zip(source.tolist(), row.tolist(), strict=True)))
        assert sorted(epochs[-1]) == [(0, i) for i in range(5)] + [(2, i) for i in range(7)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_seeds_differ_and_positions_can_be_asked_in_any_order_and_any_number():
    order, other = RowOrder([1000], None, seed=1), RowOrder([1000], None, seed=2)
    positions = np.array([1999, 3, 1000, 999, 3])
    assert order.locate(positions)[1].tolist() == [int(order.locate([p])[1][0]) for p in positions]
    assert order.locate(np.arange(50))[1].tolist() != other.locate(np.arange(50))[1].tolist()


def test_weights_hold_in_every_block_and_each_source_walks_through_all_its_rows():
    order = RowOrder([10, 300], [0.7, 0.3], seed=5)
    assert order.num_rows == 310
    assert order.counts == [717, 307]
    first, rows = order.locate(np.arange(1024))
    assert np.bincount(first).tolist() == [717, 307]
    assert len(set(rows[first == 1].tolist())) == 300  # all 300 once, then 7 of them again
    counts = np.bincount(rows[first == 0])
    assert (counts.min(), counts.max()) == (71, 72)
    assert np.bincount(order.locate(np.arange(1024, 2048))[0]).tolist() == [717, 307]


def test_sources_are_spread_within_a_block():
    source, _ = RowOrder([10, 10], [1, 1], seed=0).locate(np.arange(1024))
    assert all(20 < np.count_nonzero(source[start : start + 64]) < 44 for start in range(0, 1024, 64))


def test_weighted_order_does_not_depend_on_how_it_is_asked():
    order = RowOrder([10, 30, 5], [2, 1, 1], seed=5)
    together = np.stack(order.locate(np.arange(3000)))
    apart = np.concatenate([np.stack(order.locate(np.arange(i, i + 7))) for i in range(0, 2996, 7)], axis=1)
    assert np.array_equal(together[:, : apart.shape[1]], apart)


def test_slots_by_largest_remainder():
    assert slots_per_block([1, 1, 1]) == [342, 341, 341]
    assert slots_per_block([1, 3]) == [256, 768]
    tiny = slots_per_block([1, 999])
    assert sum(tiny) == 16_384
    assert tiny[0] == 16
    with pytest.raises(RecipeError, match="1/65536"):
        slots_per_block([1, 1e9])


def test_a_jump_far_ahead_costs_no_more_than_the_start():
    order = RowOrder([10**8, 10**7], [0.9, 0.1], seed=1)
    began = time.process_time()
    for step in range(5_000_000, 5_000_020):
        order.locate(np.arange(step * 64, step * 64 + 64))
    assert time.process_time() - began < 1.0  # 20 steps; a shuffled list of 1e8 rows alone takes over 10 s


def test_nothing_to_order():
    with pytest.raises(DataError, match="no rows"):
        RowOrder([0], None, seed=1)
    with pytest.raises(DataError, match="no rows"):
        RowOrder([3, 0], [1, 1], seed=1)


def test_weights_for_all_or_for_none():
    assert common_weights([None, None]) is None
    assert common_weights([0.5, 2]) == [0.5, 2]
    with pytest.raises(RecipeError, match="1 of 2 sources"):
        common_weights([0.5, None])


def test_a_capped_source_gives_its_surplus_to_the_others_by_their_weights():
    assert capped_weights([100, 100], [1, 1], [None, None], 10_000) == [0.5, 0.5]
    # 100 rows twice over are 200 of 1,000; the other two share the remaining 800 as 3 to 1.
    assert capped_weights([100, 900, 900], [4, 3, 1], [2, None, None], 1000) == pytest.approx([0.2, 0.6, 0.2])
    # The surplus of the first brings the second to its cap as well.
    assert capped_weights([100, 100, 900], [5, 4, 1], [2, 5, None], 1000) == pytest.approx([0.2, 0.5, 0.3])
    # A cap that is not reached changes nothing.
    assert capped_weights([100, 900], [1, 9], [4, 4], 1000) == pytest.approx([0.1, 0.9])
    assert capped_weights([10, 20], [1, 1], [1, 1], 30) == pytest.approx([1 / 3, 2 / 3])
    assert capped_weights([10, 20], [1, 3], [0.5, None], 100) == pytest.approx([0.05, 0.95])


def test_caps_that_leave_too_few_rows():
    with pytest.raises(
        RecipeError, match="the sources have 250 rows to read, and the run takes 1,000"
    ) as caught:
        capped_weights([100, 50], [1, 1], [1.5, 2], 1000)
    assert "shorten the run to 250 rows, raise `max_epochs` by 4 times" in caught.value.hint
    with pytest.raises(DataError, match="no rows"):
        capped_weights([100, 0], [1, 1], [None, None], 10)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**9), st.floats(1e-3, 1e3), st.none() | st.floats(0.1, 50)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 10**10),
)
def test_caps_hold_and_the_rest_keep_their_proportions(sources, num_rows):
    sizes, weights, caps = (list(column) for column in zip(*sources, strict=True))
    most = [float("inf") if cap is None else cap * size for cap, size in zip(caps, sizes, strict=True)]
    if sum(most) < num_rows:
        return
    shares = capped_weights(sizes, weights, caps, num_rows)
    assert sum(shares) == pytest.approx(1)
    assert all(share * num_rows <= limit * (1 + 1e-6) for share, limit in zip(shares, most, strict=True))
    free = [i for i in range(len(sizes)) if shares[i] * num_rows < most[i] * (1 - 1e-6)]
    ratios = [shares[i] / weights[i] for i in free]
    assert ratios == pytest.approx([ratios[0]] * len(ratios) if ratios else [])
    # A capped source never gets more for its weight than those that are not.
    assert all(shares[i] / weights[i] <= ratios[0] * (1 + 1e-6) for i in range(len(sizes)) if ratios)
