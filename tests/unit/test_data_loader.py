"""What the loader promises: a row is a function of (seed, position), and a step can be named."""

import threading

import numpy as np
import pytest
from loading import batches, masked, stream_of

from llmkit.data.loader import MicroBatches, Prefetcher, evaluation_rounds, evaluation_rows
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.seeds import held_out_seed, mix_seed, row_seed


def dealt(world_size, step, **options):
    """The step's examples by micro-batch, over all ranks."""
    found = {}
    for rank in range(world_size):
        found.update(batches(world_size=world_size, rank=rank, **options).of_step(step))
    return [found[k] for k in range(8)]


def test_a_seed_is_a_function_of_its_parts_on_every_machine():
    # Changing these changes the masks of every run that is to be resumed.
    assert mix_seed(42, 3, 1) == 8_783_482_461_843_417_109
    assert row_seed(42, 0) == 1_559_683_205_617_034_522
    assert held_out_seed(0) == 5_735_051_933_124_120_466
    seeds = {row_seed(seed, position) for seed in range(10) for position in range(1000)}
    seeds |= {held_out_seed(number) for number in range(1000)}
    seeds |= {mix_seed(seed, step, micro) for seed in range(10) for step in range(100) for micro in range(10)}
    assert len(seeds) == 10_000 + 1000 + 10_000


def test_rows_carry_the_seed_of_their_position():
    loader = batches(seed=5)
    for step in (0, 7):
        seeds = [int(row["seed"]) for _, micro in loader.of_step(step) for row in micro]
        assert seeds == [row_seed(5, position) for position in range(step * 16, step * 16 + 16)]
    row = loader.of_step(0)[0][1][0]
    assert row["seed"].dtype == np.int64
    assert row["seed"].shape == ()


def test_chance_in_encoding_is_the_same_on_any_number_of_ranks_and_asked_in_any_order():
    one = dealt(1, 40, encode=masked)
    hidden = [(example["input_ids"] == -1).sum() for micro in one for example in micro]
    assert 0 < sum(hidden) < 16 * 8
    assert len({example["input_ids"].tobytes() for micro in one for example in micro}) == 16
    for world_size in (2, 4):
        for micro, other in zip(one, dealt(world_size, 40, encode=masked), strict=True):
            for a, b in zip(micro, other, strict=True):
                assert np.array_equal(a["input_ids"], b["input_ids"])
    again = batches(encode=masked)
    again.of_step(3)
    assert np.array_equal(again.of_step(40)[0][1][0]["input_ids"], one[0][0]["input_ids"])
    assert not np.array_equal(
        batches(encode=masked, seed=10).of_step(40)[0][1][0]["input_ids"], one[0][0]["input_ids"]
    )


def test_the_same_row_read_again_in_another_epoch_gets_another_seed():
    rows = Rows([stream_of([32])], stride=4)  # 8 rows: an epoch
    loader = MicroBatches(rows, RowOrder(rows.sizes, None, 1), rows_per_step=8, micro_batch_size=8)
    first, second = (
        {row["ids"].tobytes(): int(row["seed"]) for row in loader.of_step(epoch)[0][1]} for epoch in (0, 1)
    )
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_held_out_rows_keep_their_seeds_whatever_else_is_measured():
    rows = Rows([stream_of([50, 60]), stream_of([200], seed=1)], stride=8, partial=True)

    def seeds(**options):
        found = evaluation_rows(rows, **options)
        return {row["ids"].tobytes(): int(row["seed"]) for micro in found for row in micro}

    whole = seeds(micro_batch_size=5)
    assert sorted(whole.values()) == sorted(map(held_out_seed, range(len(rows))))
    some = seeds(micro_batch_size=3, max_rows=7)
    assert len(some) == 7
    assert some.items() <= whole.items()
    ranks = [seeds(micro_batch_size=5, world_size=2, rank=rank) for rank in (0, 1)]
    assert {**ranks[0], **ranks[1]} == whole


@pytest.mark.parametrize(
    ("size", "world_size", "max_rows"), [(5, 3, None), (5, 2, 7), (1, 4, 5), (8, 1, None)]
)
def test_rounds_are_those_of_the_rank_with_most_batches(size, world_size, max_rows):
    rows = Rows([stream_of([50, 60]), stream_of([200], seed=1)], stride=8, partial=True)
    numbers = [
        len(
            list(
                evaluation_rows(
                    rows, micro_batch_size=size, max_rows=max_rows, world_size=world_size, rank=rank
                )
            )
        )
        for rank in range(world_size)
    ]
    rounds = evaluation_rounds(rows, micro_batch_size=size, max_rows=max_rows, world_size=world_size)
    assert max(numbers) == rounds
    assert min(numbers) >= rounds - 1
    empty = Rows([], stride=8, partial=True)
    assert evaluation_rounds(empty, micro_batch_size=size, max_rows=max_rows, world_size=world_size) == 0


def test_places_name_the_rows_that_a_step_reads():
    loader = batches(world_size=2, rank=1)
    for k, micro in loader.of_step(12):
        positions, sources, rows = loader.places(12, [k])
        assert positions.tolist() == [12 * 16 + 2 * k, 12 * 16 + 2 * k + 1]
        for source, number, row in zip(sources, rows, micro, strict=True):
            assert np.array_equal(loader.rows.take([source], [number])[0]["ids"], row["ids"])
    # Those of another rank as well: whoever reports an error can name them.
    _, sources, rows = loader.places(12, [0, 5])
    other = batches().of_step(12)
    expected = [row["ids"].tolist() for k in (0, 5) for row in other[k][1]]
    assert [row["ids"].tolist() for row in loader.rows.take(sources, rows)] == expected


def test_encoding_happens_in_the_prefetching_thread():
    threads = []

    def noting(row):
        threads.append(threading.current_thread().name)
        return row

    with Prefetcher(batches(encode=noting), 0, 2) as prefetched:
        assert len(list(prefetched)) == 2
    assert set(threads) == {"prefetch"}
    assert len(threads) == 32
