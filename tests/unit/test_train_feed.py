"""The feed of one process: rounds of evaluation that ranks can agree in, and the rows behind a step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loading import Memory, batches, stream_of

from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.objectives.clm import CausalLM
from llmkit.plan.parallel import Layout
from llmkit.train.build import Data, Feed


class Letters:
    """Decodes an id to a word, and one to something that would spoil a line."""

    def decode(self, ids):
        assert all(isinstance(number, int) for number in ids)
        return " ".join("\x1b[31m\n" if number == 0 else f"w{number}" for number in ids)


def feed(world_size=1, rank=0, objective=None, streams=None, held_out=(), rows=16, size=2, isolate=True):
    train = Rows(streams or batches().rows.streams, 7)
    data = Data(Letters(), train, Rows(list(held_out), 7, partial=True), 1.0)
    plan = SimpleNamespace(
        context=7,
        vocab_size=900,
        rows_per_step=rows,
        micro_batch_size=size,
        world_size=world_size,
        layout=Layout(replicate=world_size),
    )
    accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
    section = SimpleNamespace(isolate_documents=isolate, objective="clm", model=SimpleNamespace(context=7))
    return Feed(data, objective or CausalLM(), plan, section, accelerator)


def order(found):
    return RowOrder(found._data.train.sizes, [1, 2], 9)


def test_every_rank_has_the_same_number_of_rounds_and_together_all_rows():
    held_out = [stream_of([50, 60])]  # 16 rows: 6 batches of 3, so ranks of 4 have 2, 2, 1 and 1
    whole = list(feed(size=3, held_out=held_out).held_out(None))
    assert None not in whole
    assert len(whole) == 6
    ranks = [list(feed(4, rank, rows=12, size=3, held_out=held_out).held_out(None)) for rank in range(4)]
    assert [len(found) for found in ranks] == [2, 2, 2, 2]
    assert [found[1] is None for found in ranks] == [False, False, True, True]
    dealt = [ranks[i % 4][i // 4] for i in range(6)]
    for batch, expected in zip(dealt, whole, strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert list(feed(size=3).held_out(None)) == []  # nothing held out: no round on any rank


def test_a_feed_encodes_what_its_ranks_read():
    found = feed(2, 1)
    with found.steps(order(found), 3, 5) as steps:
        micro = found.in_order(steps)(3)
    expected = batches(world_size=2, rank=1, isolate=True, encode=CausalLM().encode).of_step(3)
    assert [index for index, _ in micro] == [1, 3, 5, 7]
    for (_, batch), (_, examples) in zip(micro, expected, strict=True):
        assert np.array_equal(batch["input_ids"].numpy(), [example["input_ids"] for example in examples])
        assert np.array_equal(batch["targets"].numpy(), [example["targets"] for example in examples])


def test_a_step_is_described_by_source_row_and_first_words():
    streams = [Memory([*range(1, 300)], "books"), Memory([*range(300, 600)], "web")]
    found = feed(streams=streams)
    with found.steps(order(found), 0, 1):
        lines = found.describe(30, [0, 5])
        _, sources, rows = found._batches.places(30, [0, 5])
    first = [300 * source + 7 * row + (source == 0) for source, row in zip(sources, rows, strict=True)]
    assert lines == [
        f"micro-batch {micro}: {['books', 'web'][source]!r} row {row:,}: "
        f'"{" ".join(f"w{word + i}" for i in range(8))}"'
        for micro, source, row, word in zip([0, 0, 5, 5], sources, rows, first, strict=True)
    ]


def test_a_long_description_is_cut_and_stays_on_its_line():
    found = feed(rows=64)
    with found.steps(order(found), 0, 1):
        lines = found.describe(2)
        assert found.describe(2, [1]) == lines[2:4]
    assert len(lines) == 5
    assert lines[-1] == "and 60 more rows"
    assert not any(letter in line for line in lines for letter in "\n\x1b")


@pytest.mark.parametrize("isolate", [False, True])
def test_the_largest_batch_passes_an_encoding_with_chance_in_it(isolate):
    class Seeing(CausalLM):
        def encode(self, row):
            assert row["seed"].shape == ()
            assert ("positions" in row) is isolate
            return super().encode(row)

    batch = feed(objective=Seeing(), isolate=isolate).largest()
    assert batch["input_ids"].shape == (2, 7)
