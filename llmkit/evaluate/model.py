"""Measure a saved model on token streams, by the code that training's own evaluation uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from llmkit.data.loader import evenly_spaced
from llmkit.data.rows import Rows
from llmkit.data.shards import TokenStream
from llmkit.errors import MissingError
from llmkit.evaluate.sharing import ALONE, Share
from llmkit.evaluate.text import Found, measure_rows, measure_windows, windows_of
from llmkit.models.attention import use_attention
from llmkit.models.build import kind_of, load_weights
from llmkit.models.heads import choose_heads
from llmkit.models.runtimes import load_runtime, runtime_of
from llmkit.objectives.base import HasParts, LossModule, Objective
from llmkit.objectives.make import make_objective
from llmkit.plan import layout_of
from llmkit.recipe.schema import Pretrain
from llmkit.registry import ModelKind, goal_of


def load_model(folder: Path, *, trusted: bool = False, kind: ModelKind | None = None) -> PreTrainedModel:
    """A model from a folder, in float32 on CPU, for measuring or generating; an exported one in its own runtime.

    Args:
        folder: The model folder.
        trusted: Code that comes with it may run.
        kind: What it is loaded as; None: as its configuration says.

    Raises:
        MissingError: The folder holds no model that can be loaded.
        UsageError: It brings code or pickles, or its weights do not belong to its configuration.
    """
    if runtime_of(folder) is not None:
        return cast("PreTrainedModel", load_runtime(folder).eval())  # it answers as one
    try:
        return load_weights(str(folder), kind or kind_of(str(folder)), trusted=trusted)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{folder}: no model that can be loaded ({str(error).splitlines()[0]})",
            hint="give a run, its folder, or a folder with config.json and model.safetensors",
        ) from error


def core_of(
    model: PreTrainedModel,
    section: Pretrain,
    tokenizer: Any,
    *,
    device: str,
    folder: Path | None = None,
    bf16: bool = False,
) -> LossModule:
    """A model and what it learned, ready to be measured.

    Args:
        model: A model of the objective's kind.
        section: What was learned, and in which rows: a recipe's `pretrain` section.
        tokenizer: The model's.
        device: `cpu`, `cuda` or `mps`.
        folder: The model's; what was trained beside it lies beside it.
        bf16: Matrix products in bfloat16.

    Raises:
        MissingError: What was trained beside the model is not there.
    """
    objective = make_objective(section, tokenizer)
    if isinstance(model, PreTrainedModel):
        use_attention(model, "sdpa", isolate=section.isolate_documents)
    choose_heads(model, goal_of(section.objective).model)
    core = LossModule(model, objective, bf16=bf16, parts=_load_parts(objective, model, folder)).to(device)
    core.eval()
    return core


def measure_streams(
    core: LossModule,
    streams: Sequence[TokenStream],
    section: Pretrain,
    *,
    device: str,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_rows: int | None = None,
    share: Share = ALONE,
) -> Found:
    """The losses of all targets in a text.

    Args:
        core: From `core_of`.
        streams: The text as tokens of the model's own tokenizer.
        section: What was learned.
        device: Where the model is.
        context: Tokens that the model sees at once; by default the section's. Only of the next token's prediction.
        stride: See `text.windows_of`. Likewise.
        batch_size: Rows computed together.
        max_rows: At most so many rows, evenly spaced; None takes all.
        share: This process's part of the work.

    Raises:
        DataError: There is nothing to measure on.
    """
    goal, layout, isolate = goal_of(section.objective), layout_of(section), section.isolate_documents
    if section.objective == "clm":
        windows = windows_of(streams, context or layout.stride, stride)
        chosen = [windows[number] for number in evenly_spaced(len(windows), max_rows).tolist()]
        return measure_windows(
            core, streams, chosen, device=device, batch_size=batch_size, isolate=isolate, share=share
        )
    rows = Rows(streams, layout.stride, overlap=layout.overlap, partial=True)
    return measure_rows(
        core,
        rows,
        goal,
        device=device,
        batch_size=batch_size,
        isolate=isolate,
        max_rows=max_rows,
        share=share,
    )


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
) -> dict[str, float]:
    """Loss and what follows from it, over all rows of `streams`; see `core_of` and `measure_streams`.

    Raises:
        DataError: There is nothing to measure on.
        MissingError: What was trained beside the model is not there.
    """
    core = core_of(model, section, tokenizer, device=device, folder=folder, bf16=bf16)
    found = measure_streams(core, streams, section, device=device, batch_size=batch_size)
    return summarise(core, section, streams, found.sums)


def summarise(
    core: LossModule, section: Pretrain, streams: Sequence[TokenStream], sums: Mapping[str, float]
) -> dict[str, float]:
    """Metrics of a text, bits per byte among them where the objective predicts all of it."""
    totals = dict(sums)
    if "bits_per_byte" in goal_of(section.objective).metrics:
        num_bytes = sum(stream.num_bytes for stream in streams)
        num_tokens = sum(stream.num_tokens for stream in streams)
        totals["num_bytes"] = totals["num_targets"] * num_bytes / num_tokens
    return core.objective.summarise(totals)


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
