import threading

import numpy as np
import pytest
from loading import Memory, stream_of

from llmkit.data.loader import MicroBatches, Prefetcher, evaluation_rows, evenly_spaced
from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.errors import DataError
from llmkit.objectives.clm import CausalLM


def collated(rows):
    """Rows as the causal objective makes a batch of them."""
    objective = CausalLM()
    batch = objective.collate([objective.encode(row) for row in rows])
    assert batch.pop("num_targets") == (batch["targets"] != -100).sum()
    return {key: tensor.numpy() for key, tensor in batch.items()}


def evaluation_batches(rows, **options):
    return [collated(micro) for micro in evaluation_rows(rows, **options)]


def test_rows_overlap_by_one_token_so_each_is_predicted_once():
    rows = Rows([Memory(range(1, 12))], stride=3)
    assert rows.sizes == [3]
    batch = collated(rows.take([0, 0, 0], [0, 2, 1]))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 8, 9], [4, 5, 6]]
    assert batch["targets"].tolist() == [[2, 3, 4], [8, 9, 10], [5, 6, 7]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 7, 8, 9, 100])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(num_tokens):
    rows = Rows([Memory(range(1, num_tokens + 1))], stride=4, partial=True)
    batches = list(evaluation_batches(rows, micro_batch_size=3))
    targets = [t for batch in batches for t in batch["targets"].reshape(-1).tolist() if t != -100]
    assert targets == list(range(2, num_tokens + 1))
    for batch in batches:
        learned = batch["targets"] != -100
        assert (batch["targets"][learned] == batch["input_ids"][learned] + 1).all()
        assert (batch["input_ids"][~learned] == 0).all()


def test_evaluation_is_dealt_to_ranks_and_can_be_limited():
    rows = Rows([stream_of([50, 60]), stream_of([200])], stride=8, partial=True)
    whole = [row["ids"].tolist() for micro in evaluation_rows(rows, micro_batch_size=5) for row in micro]
    assert len(whole) == len(rows)
    ranks = [list(evaluation_rows(rows, micro_batch_size=5, world_size=3, rank=rank)) for rank in range(3)]
    dealt = [ranks[i % 3][i // 3] for i in range(sum(map(len, ranks)))]
    assert [row["ids"].tolist() for micro in dealt for row in micro] == whole
    some = [row for micro in evaluation_rows(rows, micro_batch_size=5, max_rows=7) for row in micro]
    assert [row["ids"].tolist() for row in some] == [whole[i] for i in evenly_spaced(len(rows), 7)]
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, None).tolist() == [0, 1, 2]


def test_isolation_equals_a_brute_force():
    stream = stream_of([3, 1, 9, 0, 20, 2, 2, 40], seed=4)
    rows = Rows([stream], stride=8, partial=True)
    batch = collated(rows.take([0] * len(rows), range(len(rows)), isolate=True))
    starts = set(stream.starts.tolist())
    for row in range(len(rows)):
        position = 0
        for column in range(8):
            at = row * 8 + column
            position = 0 if at in starts or column == 0 else position + 1
            has_target = at + 1 < stream.num_tokens and at + 1 not in starts
            if at + 1 < stream.num_tokens:
                assert batch["position_ids"][row, column] == position
            expected = stream.tokens[at + 1] if has_target else -100
            assert batch["targets"][row, column] == expected
    plain = collated(rows.take([0] * len(rows), range(len(rows))))
    assert np.array_equal(plain["input_ids"], batch["input_ids"])
    assert (plain["targets"] != -100).sum() - (batch["targets"] != -100).sum() == len(starts) - 1


def test_context_longer_than_the_text_says_what_fits():
    with pytest.raises(DataError, match=r"'books' has 100 tokens.*a row needs 101") as caught:
        Rows([Memory(range(100), "books")], stride=100)
    assert "`context: 99` would fit" in str(caught.value)
    assert Rows([Memory(range(100), "books")], stride=99).sizes == [1]


def global_batch(world_size, step, **options):
    rows = Rows([stream_of([30] * 20), stream_of([11] * 30)], stride=7)
    order = RowOrder(rows.sizes, options.pop("weights", None), seed=9)
    dealt = {}
    for rank in range(world_size):
        batches = MicroBatches(
            rows, order, rows_per_step=16, micro_batch_size=2, world_size=world_size, rank=rank, **options
        )
        for number, micro in batches.of_step(step):
            batch = collated(micro)
            assert number % world_size == rank
            dealt[number] = batch
    assert sorted(dealt) == list(range(8))
    return {key: np.concatenate([dealt[i][key] for i in range(8)]) for key in dealt[0]}


@pytest.mark.parametrize("options", [{}, {"weights": [1, 2], "isolate": True}])
def test_any_number_of_ranks_gives_the_same_global_batch(options):
    for step in (0, 3, 70):
        one = global_batch(1, step, **options)
        for world_size in (2, 4):
            many = global_batch(world_size, step, **options)
            assert all(np.array_equal(one[key], many[key]) for key in one)
    assert not np.array_equal(
        global_batch(1, 0, **options)["input_ids"], global_batch(1, 1, **options)["input_ids"]
    )


def test_one_epoch_of_steps_covers_every_row_once():
    rows = Rows([Memory(range(1, 66))], stride=4)  # 16 rows
    batches = MicroBatches(rows, RowOrder(rows.sizes, None, 1), rows_per_step=4, micro_batch_size=2)
    seen = [collated(micro)["targets"] for step in range(4) for _, micro in batches.of_step(step)]
    assert sorted(np.concatenate(seen).reshape(-1).tolist()) == list(range(2, 66))


def test_uneven_sharing_is_refused():
    rows = Rows([stream_of([300])], stride=7)
    with pytest.raises(ValueError, match="6 rows cannot be shared by 4 ranks"):
        MicroBatches(rows, RowOrder(rows.sizes, None, 1), rows_per_step=6, micro_batch_size=1, world_size=4)


def small_batches():
    rows = Rows([stream_of([300])], stride=7)
    return MicroBatches(rows, RowOrder(rows.sizes, None, 1), rows_per_step=4, micro_batch_size=2)


def test_prefetching_changes_nothing_and_ends():
    batches = small_batches()
    before = threading.active_count()
    with Prefetcher(batches, 5, 12) as prefetched:
        got = list(prefetched)
    assert [step for step, _ in got] == list(range(5, 12))
    for step, micro in got:
        for (k, batch), (k_, batch_) in zip(micro, batches.of_step(step), strict=True):
            assert k == k_
            assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(batch, batch_, strict=True))
    assert threading.active_count() == before


def test_prefetching_can_be_left_early_and_passes_errors_on():
    before = threading.active_count()
    with Prefetcher(small_batches(), 0) as prefetched:
        for step, _ in prefetched:
            if step == 3:
                break
    assert threading.active_count() == before
    broken = small_batches()
    broken.rows.streams[0].read = lambda start, stop: 1 // 0
    with pytest.raises(ZeroDivisionError), Prefetcher(broken, 0) as prefetched:
        list(prefetched)
    assert threading.active_count() == before


def test_the_other_row_is_drawn_from_all_that_share_no_document():
    """Against a brute force: every row whose tokens are of other documents, each as likely as the others."""
    lengths = [5, 30, 3, 3, 40, 9]
    rows = Rows([stream_of(lengths), stream_of([20])], stride=8)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(rows.sizes[0]):
        mine = set(documents[row * 8 : row * 8 + 9])
        elsewhere = [n for n in range(rows.sizes[0]) if not mine & set(documents[n * 8 : n * 8 + 9])]
        expected = {tuple(one["ids"]) for one in rows.take([0] * len(elsewhere), elsewhere)}
        expected |= {tuple(one["ids"]) for one in rows.take([1] * rows.sizes[1], range(rows.sizes[1]))}
        found = {tuple(rows.take_other(0, row, seed)["ids"]) for seed in range(200)}
        assert found == expected


def test_text_of_one_document_has_no_other():
    rows = Rows([stream_of([100])], stride=8)
    assert rows.find_other(0, 3, 1) is None
    with pytest.raises(DataError, match="no text of another document"):
        rows.take_other(0, 3, 1)
