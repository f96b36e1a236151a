"""Measure a saved model on token streams, by the code that training's own evaluation uses."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmkit import registry
from llmkit.data.loader import evaluation_rows
from llmkit.data.rows import Rows
from llmkit.data.shards import TokenStream
from llmkit.errors import DataError, MissingError
from llmkit.evaluate.split import sum_over
from llmkit.models.attention import use_attention
from llmkit.models.build import load_causal_lm
from llmkit.objectives.base import LossModule, Objective


def load_model(folder: Path, *, trusted: bool = False) -> PreTrainedModel:
    """A model from a folder, in float32 on CPU, for measuring or generating.

    Args:
        folder: The model folder.
        trusted: Code that comes with it may run.

    Raises:
        MissingError: The folder holds no model that can be loaded.
        UsageError: It brings code or pickles, or its weights do not belong to its configuration.
    """
    try:
        return load_causal_lm(str(folder), trusted=trusted)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{folder}: no model that can be loaded ({str(error).splitlines()[0]})",
            hint="give a run, its folder, or a folder with config.json and model.safetensors",
        ) from error


def evaluate_model(
    model: PreTrainedModel,
    streams: Sequence[TokenStream],
    *,
    objective: str,
    context: int,
    device: str,
    bf16: bool = False,
    isolate: bool = False,
    batch_size: int = 8,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Loss and what follows from it, over every token of `streams` but the first of each.

    Windowing: consecutive rows of `context` tokens, each predicted from those before it in its row.

    Args:
        model: A causal language model.
        streams: The text as tokens of the model's own tokenizer.
        objective: The registered objective whose loss is measured.
        context: Tokens in a row.
        device: `cpu`, `cuda` or `mps`.
        bf16: Matrix products in bfloat16.
        isolate: Documents in a row do not see each other.
        batch_size: Rows computed together.
        max_rows: At most so many rows, evenly spaced; None takes all.

    Raises:
        DataError: There is nothing to measure on.
    """
    goal: Objective = registry.load(registry.OBJECTIVES, objective, "objective")()
    use_attention(model, "sdpa", isolate=isolate)
    core = LossModule(model, goal, bf16=bf16).to(device)
    rows = Rows(streams, context, partial=True)
    if len(rows) == 0:
        raise DataError("no text to measure on: nothing was held out", hint="give other text: --data FILES")
    batches = (
        {name: tensor.to(device) for name, tensor in goal.collate(list(map(goal.encode, micro))).items()}
        for micro in evaluation_rows(rows, micro_batch_size=batch_size, max_rows=max_rows, isolate=isolate)
    )
    started = time.perf_counter()
    sums = sum_over(core, batches)
    seconds = time.perf_counter() - started
    num_bytes = sum(stream.num_bytes for stream in streams)
    num_tokens = sum(stream.num_tokens for stream in streams)
    sums["num_bytes"] = sums["num_targets"] * num_bytes / num_tokens
    return {**goal.summarise(sums), "tokens_per_s": sums["num_targets"] / seconds}
