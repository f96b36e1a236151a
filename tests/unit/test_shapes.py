"""What is compiled once stays compiled: every step of an objective has the shapes of the first."""

from functools import cache

import objectives
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import set_seed

from llmkit import registry
from llmkit.models import kernels
from llmkit.models.attention import use_attention
from llmkit.models.build import build_model
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import HasParts, LossModule
from llmkit.recipe.schema import Model

ROWS, MICRO_BATCHES = 4, 8


def batches(objective, made):
    rows = [made.encode(row) for row in objectives.rows(objective, ROWS * MICRO_BATCHES)]
    return [made.collate(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]


@pytest.mark.parametrize("objective", list(registry.OBJECTIVES))
def test_each_objective_keeps_its_shapes(objective):
    shapes = {
        tuple(sorted((name, tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()))
        for batch in batches(objective, objectives.make(objective))
    }
    assert len(shapes) == 1, shapes


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(registry.OBJECTIVES))
def test_nothing_is_compiled_after_the_second_step(objective, monkeypatch):
    """Forward and backward of the compiled blocks; torch's own guards decide what is another form."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = cache(lambda function: torch.compile(function, dynamic=False, backend=counter))
    monkeypatch.setattr(kernels, "_compiled", compiled)
    goal, made = registry.goal_of(objective), objectives.make(objective)
    set_seed(1)
    spec = Model(config=objectives.TINY[goal.model], context=objectives.CONTEXT)
    model = build_model(
        spec, goal.model, vocab_size=objectives.VOCAB_SIZE, special_ids={"pad_token_id": 0}, seed=1
    )
    choose_heads(model, goal.model)
    use_attention(model, "sdpa", isolate=False)
    core = LossModule(model, made, bf16=False, parts=made.parts(model) if isinstance(made, HasParts) else {})
    core.train()
    assert kernels.compile_module(core)
    counts = []
    for batch in batches(objective, made):
        core(batch).total.backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1] > 0
    assert counts[2:] == [counts[1]] * (MICRO_BATCHES - 2)
