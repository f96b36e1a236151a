"""Fine-tuning a compiled model: micro-batches of one shape, no new form after the second step, and the same learned."""

from functools import cache

import pytest
import torch
import training
import tuning
from torch._dynamo.testing import CompileCounterWithBackend

from llmkit.models import kernels
from llmkit.train import loop

NOT_EVEN = ("embed", "kto", "mixup")
"""Tasks and losses whose micro-batches keep many shapes: they compare rows, or mix them."""
QUICK = ("regression",)
EACH = [
    pytest.param(task, marks=() if task in QUICK else pytest.mark.slow)
    for task in (*tuning.TASKS, *tuning.VARIANTS)
    if task not in NOT_EVEN
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
    more = {"finetune__sft": {"pack": False}} if task == "sft" else {}
    return {"finetune__model__dropout": 0.0, "machine__micro_batch": 4, **more}


@pytest.mark.parametrize("task", EACH)
def test_a_compiled_task_has_one_shape_and_learns_the_same(task, tmp_path, forms):
    changes = changes_of(task)
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
def test_rows_that_are_compared_with_all_others_keep_their_shapes(tmp_path, forms):
    tuning.finetune(tmp_path, "embed", "compiled", machine__compile=True, **changes_of("embed"))
    assert len(set().union(*(shapes for _, shapes in forms))) > 1
