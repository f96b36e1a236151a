"""Measure a saved model on token streams, by the code that training's own evaluation uses."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmkit.data.loader import evaluation_rows
from llmkit.data.rows import Rows
from llmkit.data.shards import TokenStream
from llmkit.errors import DataError, MissingError
from llmkit.evaluate.split import sum_over
from llmkit.models.attention import use_attention
from llmkit.models.build import kind_of, load_weights
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import HasParts, LossModule, Objective
from llmkit.objectives.make import make_objective
from llmkit.plan import layout_of
from llmkit.recipe.schema import Pretrain
from llmkit.registry import goal_of


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
        return load_weights(str(folder), kind_of(str(folder)), trusted=trusted)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{folder}: no model that can be loaded ({str(error).splitlines()[0]})",
            hint="give a run, its folder, or a folder with config.json and model.safetensors",
        ) from error


def evaluate_model(
    model: PreTrainedModel,
    streams: Sequence[TokenStream],
    *,
    section: Pretrain,
    tokenizer: Any,
    device: str,
    folder: Path | None = None,
    bf16: bool = False,
    batch_size: int = 8,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Loss and what follows from it, over all rows of `streams`.

    Windowing: consecutive rows of the section's context. A model that predicts the next token predicts every token of a
    stream but its first, each from those before it in its row.

    Args:
        model: A model of the objective's kind.
        streams: The text as tokens of the model's own tokenizer.
        section: What was learned, and in which rows: a recipe's `pretrain` section.
        tokenizer: The model's.
        device: `cpu`, `cuda` or `mps`.
        folder: The model's; what was trained beside it lies beside it.
        bf16: Matrix products in bfloat16.
        batch_size: Rows computed together.
        max_rows: At most so many rows, evenly spaced; None takes all.

    Raises:
        DataError: There is nothing to measure on.
        MissingError: What was trained beside the model is not there.
    """
    goal, layout, isolate = goal_of(section.objective), layout_of(section), section.isolate_documents
    objective = make_objective(section, tokenizer)
    use_attention(model, "sdpa", isolate=isolate)
    choose_heads(model, goal.model)
    parts = _load_parts(objective, model, folder)
    core = LossModule(model, objective, bf16=bf16, parts=parts).to(device)
    rows = Rows(streams, layout.stride, overlap=layout.overlap, partial=True)
    if len(rows) == 0:
        raise DataError("no text to measure on: nothing was held out", hint="give other text: --data FILES")
    found = evaluation_rows(
        rows,
        micro_batch_size=batch_size,
        max_rows=max_rows,
        isolate=isolate or goal.positions,
        other=goal.other,
    )
    batches = (
        {
            name: tensor.to(device)
            for name, tensor in objective.collate(list(map(objective.encode, micro))).items()
        }
        for micro in found
    )
    started = time.perf_counter()
    sums = sum_over(core, batches)
    seconds = time.perf_counter() - started
    if "bits_per_byte" in goal.metrics:
        num_bytes = sum(stream.num_bytes for stream in streams)
        num_tokens = sum(stream.num_tokens for stream in streams)
        sums["num_bytes"] = sums["num_targets"] * num_bytes / num_tokens
    return {**objective.summarise(sums), "tokens_per_s": sums["num_targets"] / seconds}


def _load_parts(objective: Objective, model: PreTrainedModel, folder: Path | None) -> Mapping[str, nn.Module]:
    """What was trained beside a model, from the folders of the export beside the model's."""
    parts = objective.parts(model) if isinstance(objective, HasParts) else {}
    for name, part in parts.items():
        place = (folder or Path()).parent / name
        if folder is None or not (place / "config.json").is_file():
            raise MissingError(
                f"this objective measures a model with its {name}, which is not beside it ({place})",
                hint="measure the run that trained it",
            )
        part.load_state_dict(load_weights(str(place), kind_of(str(place)), trusted=False).state_dict())
    return parts
