"""Labelled rows: kept, read back, dealt to steps, micro-batches and ranks."""

import pickle
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from llmkit.data.order import RowOrder
from llmkit.data.sample_batches import SampleBatches, held_out_batches
from llmkit.data.samples import Measured, RowsHeld, Samples, write_samples
from llmkit.errors import DataError

ROWS, STEP = 40, 10


def measured(count=ROWS):
    rows = [
        {"text": "字" * (number % 7 + 1), "label": str(number), "place": f"x.csv:{number}"}
        for number in range(count)
    ]
    return Measured(
        rows,
        [number % 7 + 1 for number in range(count)],
        [1] * count,
        [number % 5 == 0 for number in range(count)],
        range(count),
    )


@pytest.fixture
def folder(tmp_path):
    write_samples(tmp_path / "rows", {"train": measured(), "held_out": measured(7)}, {"kind": "rows"})
    return tmp_path / "rows"


def encode(row):
    return {
        "input_ids": np.full(len(row["text"]), int(row["label"])),
        "targets": np.array([row["seed"] % 1000]),
    }


def batches(rows, **changes):
    settings = {
        "rows_per_step": STEP,
        "tokens": 20,
        "packed": False,
        "world_size": 1,
        "rank": 0,
        "encode": encode,
    }
    return SampleBatches(rows, RowOrder([len(rows)], None, 3), **{**settings, **changes})


def labels(step_examples):
    return sorted(int(one["input_ids"][0]) for _, micro in step_examples for one in micro)


def test_rows_come_back_as_they_were_kept(folder):
    rows = Samples(folder, "train")
    assert [rows[number] for number in range(len(rows))] == list(measured().rows)
    assert rows.lengths.tolist() == list(measured().lengths)
    assert rows.facts == {
        "num_rows": 40, "num_tokens": sum(measured().lengths), "num_targets": 40, "longest": 7, "num_idle": 0,
        "num_cut": 8, "tokens_cut": 8, "num_passed_over": 0,
    }  # fmt: skip
    again = pickle.loads(pickle.dumps(rows))
    assert again[17] == rows[17]
    with pytest.raises(IndexError):
        rows[40]


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(DataError, match="no row is left"):
        write_samples(tmp_path / "rows", {"train": measured(0), "held_out": measured(2)}, {})


def test_each_row_comes_once_an_epoch_and_another_epoch_has_another_order(folder):
    found = batches(Samples(folder, "train"))
    epochs = [[labels(found.of_step(step)) for step in range(4 * epoch, 4 * epoch + 4)] for epoch in range(2)]
    assert [sorted(chain(*epoch)) for epoch in epochs] == [list(range(ROWS))] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [7, 20, 1000])
def test_a_step_has_the_same_rows_whatever_the_micro_batches_and_ranks(folder, tokens, packed):
    rows = Samples(folder, "train")
    whole = labels(batches(rows).of_step(2))
    for world_size in (1, 2, 3):
        ranks = [
            batches(rows, tokens=tokens, packed=packed, world_size=world_size, rank=rank).of_step(2)
            for rank in range(world_size)
        ]
        assert sorted(chain(*(labels(rank) for rank in ranks))) == whole
        assert len({len(rank) for rank in ranks}) == 1
        assert sorted(number for rank in ranks for number, _ in rank) == list(
            range(world_size * len(ranks[0]))
        )
        for _, micro in chain(*ranks):
            lengths = [len(one["input_ids"]) for one in micro]
            cost = sum(lengths) if packed else max(lengths) * len(lengths)
            assert cost <= tokens or len(micro) == 1


def test_a_rows_chance_follows_from_its_position_not_from_its_micro_batch(folder):
    rows = Samples(folder, "train")

    def seeds(**changes):
        found = batches(rows, draws=True, **changes).of_step(1)
        return {int(one["input_ids"][0]): int(one["targets"][0]) for _, micro in found for one in micro}

    assert seeds(tokens=7) == seeds(tokens=1000)
    assert len(set(seeds().values())) > 1


def test_rows_without_chance_are_made_once_and_others_each_time(folder):
    made = []

    def counting(row):
        made.append(row["label"])
        return encode(row)

    for draws, times in ((False, 1), (True, 2)):
        made.clear()
        found = batches(Samples(folder, "train"), encode=counting, draws=draws)
        for step in range(8):
            found.of_step(step)
        assert len(made) == times * ROWS


def test_more_ranks_than_rows_get_a_row_that_teaches_nothing(folder):
    rows = Samples(folder, "train")
    found = [batches(rows, rows_per_step=2, world_size=3, rank=rank).of_step(0)[0][1] for rank in range(3)]
    learned = [int(one["targets"][0]) for micro in found for one in micro]
    assert learned.count(-100) == 1
    assert len(learned) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_rows_come_once_and_every_rank_has_as_many_rounds(world_size):
    rows = RowsHeld(measured(23))
    ranks = [
        list(held_out_batches(rows, tokens=14, max_rows=None, world_size=world_size, rank=rank))
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    numbers = [number for rank in ranks for batch in rank if batch is not None for number, _ in batch]
    assert sorted(numbers) == list(range(23))
    for batch in (batch for rank in ranks for batch in rank if batch):
        lengths = [len(row["text"]) for _, row in batch]
        assert max(lengths) * len(lengths) <= 14
    few = list(held_out_batches(rows, tokens=14, max_rows=5, world_size=1, rank=0))
    assert sorted(number for batch in few for number, _ in batch) == [0, 4, 9, 13, 18]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_of_held_out_rows_whole_groups_are_chosen(tmp_path, world_size, kept):
    """Six texts of 1, 4, 2, 1, 5 and 3 windows; three of them are the first, the third and the fifth."""
    groups = [number for number, count in enumerate((1, 4, 2, 1, 5, 3)) for _ in range(count)]
    made = replace(measured(len(groups)), groups=groups)
    write_samples(tmp_path / "rows", {"train": measured(), "held_out": made}, {})
    rows = Samples(tmp_path / "rows", "held_out") if kept else RowsHeld(made)
    numbers = [
        number
        for rank in range(world_size)
        for batch in held_out_batches(rows, tokens=14, max_rows=3, world_size=world_size, rank=rank)
        for number, _ in batch or ()
    ]
    assert sorted(numbers) == [0, 5, 6, 8, 9, 10, 11, 12]


def test_places_name_the_rows_of_a_step(folder):
    found = batches(Samples(folder, "train"))
    step = found.of_step(3)
    expected = sorted((micro, int(one["input_ids"][0])) for micro, examples in step for one in examples)
    assert sorted(found.places(3)) == expected
    assert sorted(found.places(3, [0])) == [pair for pair in expected if pair[0] == 0]
