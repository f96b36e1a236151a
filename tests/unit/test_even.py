"""Fine-tuning a compiled model: micro-batches of one shape, no new form after the second step, and the same learned."""

import json
from functools import cache
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training
import tuning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from llmkit.models import kernels
from llmkit.train import even, loop
from llmkit.train.even import EvenLines

QUICK = ("regression",)
EACH = [
    pytest.param(task, marks=() if task in QUICK else pytest.mark.slow)
    for task in (*tuning.TASKS, *tuning.VARIANTS, "sft-packed")
]


@pytest.fixture
def forms(monkeypatch):
    """What was compiled after each step; torch traces as ever, and computes the traced operations as they are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = cache(lambda function: torch.compile(function, dynamic=False, backend=counter))
    monkeypatch.setattr(kernels, "_compiled", compiled)
    found, step = [], loop.train_step

    def train_step(run, number, micro_batches, *args):
        shapes = {tuple((k, tuple(v.shape)) for k, v in sorted(batch.items())) for _, batch in micro_batches}
        outcome = step(run, number, micro_batches, *args)
        found.append((counter.frame_count, shapes))
        return outcome

    monkeypatch.setattr(loop, "train_step", train_step)
    yield found
    torch._dynamo.reset()


def changes_of(task):
    """No dropout, for masks depend on shapes; more than one micro-batch a step, and rows of a mask."""
    packed = task == "sft-packed"
    more = {"finetune__sft": {"pack": packed}} if task.startswith("sft") else {}
    # In lines, rows of a mask are fewer.
    return {"finetune__model__dropout": 0.0, "machine__micro_batch": 2 if packed else 4, **more}


@pytest.mark.parametrize("task", EACH)
def test_a_compiled_task_has_one_shape_and_learns_the_same(task, tmp_path, forms):
    changes = changes_of(task)
    task = task.removesuffix("-packed")
    plain = tuning.finetune(tmp_path, task, "plain", **changes)
    many = set().union(*(shapes for _, shapes in forms))
    assert len(many) > 1, "nothing to make alike"
    forms.clear()
    made = tuning.finetune(tmp_path, task, "compiled", machine__compile=True, **changes)
    assert len(set().union(*(shapes for _, shapes in forms))) == 1
    counts = [count for count, _ in forms]
    assert counts[0] > 0
    assert set(counts[2:]) == {counts[1]}, counts
    found, expected = training.losses(made), training.losses(plain)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) < 2e-5
    found, expected = (training.losses(each, "eval/loss") for each in (made, plain))
    assert max(abs(found[step] - expected[step]) for step in expected) < 2e-4


@pytest.mark.slow
def test_rows_with_other_numbers_of_texts_keep_their_shapes(tmp_path, forms):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [
        {
            "anchor": f"where is {n}?",
            "positive": f"{n}: in Rome",
            "negatives": [f"in {n}" for _ in range(1 + n % 2)],
        }
        for n in range(60)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {**changes_of("embed"), "finetune__data": {"files": str(folder / "texts.jsonl")}}
    made = tuning.finetune(tmp_path, "embed", "compiled", machine__compile=True, **changes)
    assert len(set().union(*(shapes for _, shapes in forms))) > 1
    assert len(training.losses(made)) == tuning.STEPS


class InLines:
    """Stands for a task: a line is the lengths of what is in it."""

    def line(self, examples, width):
        used = sum(len(example["input_ids"]) for example in examples)
        assert used < width, "a place is left in each line"
        return {"lengths": [len(example["input_ids"]) for example in examples]}


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    tokens=st.integers(1, 1200),
    world_size=st.integers(1, 4),
    line=st.sampled_from([128, 256, 4096]),
)
def test_packed_rows_stand_in_as_many_lines_of_one_width_whatever_they_are(lengths, tokens, world_size, line):
    rows = SimpleNamespace(lengths=np.array(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(even, "LINE", line)
        made = EvenLines.of(InLines(), rows, tokens)
    assert made.width > max(lengths)
    assert made.width % 64 == 0
    assert made.width * made.lines <= max(tokens, made.width)
    shares = made.share(rows.lengths, world_size)
    assert sorted(chain(*shares)) == list(range(len(lengths))), "each row once"
    assert len(shares) % world_size == 0
    for share in shares:
        examples = [{"input_ids": np.zeros(lengths[number])} for number in share or [0]]
        lines = made.filled(examples)
        assert len(lines) == made.lines
        assert sum(len(line["lengths"]) for line in lines) == len(examples)
    longest = [{"input_ids": np.zeros(max(lengths))}] * made.rows
    assert len(made.filled(longest)) == made.lines
