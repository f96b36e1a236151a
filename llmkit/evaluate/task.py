"""Measure a model that was trained for a task on labelled rows, by the code that training's own evaluation uses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmkit.data.sample_batches import held_out_batches
from llmkit.data.samples import RowStore
from llmkit.errors import DataError, UsageError
from llmkit.evaluate.judge import judge
from llmkit.evaluate.split import ROW_NUMBERS, sum_over
from llmkit.models.heads import choose_heads
from llmkit.models.tasks import build_task_model
from llmkit.objectives.base import Batch, Judges, LossModule, Material
from llmkit.objectives.make import make_task
from llmkit.objectives.texts import pad_id
from llmkit.recipe.schema import Finetune
from llmkit.registry import TASKS


def load_task(
    place: Path, section: Finetune, material: Material, *, device: str, bf16: bool = False
) -> LossModule:
    """A model that was trained for a task, and the task, to be measured or asked.

    Args:
        place: The model's folder.
        section: The `finetune` section that it was trained by.
        material: What the task is made of.
        device: `cpu`, `cuda` or `mps`.
        bf16: Matrix products in bfloat16.

    Raises:
        UsageError: The folder holds no model that was trained for the task.
    """
    kind = TASKS[section.task].model
    model, new = build_task_model(
        str(place),
        kind,
        labels=material.labels,
        number=section.task == "regression",
        pad_token_id=pad_id(material.tokenizer),
        trusted=section.model.trust_remote_code,
    )
    if new:
        raise UsageError(
            f"{place}: the model has no head for {section.task}: {', '.join(new)} are missing",
            hint="measure the run that trained it",
        )
    choose_heads(model, kind)
    core = LossModule(model, make_task(section, material), bf16=bf16).to(device)
    core.eval()
    return core


def evaluate_task(
    core: LossModule,
    rows: RowStore,
    *,
    device: str,
    tokens: int,
    max_rows: int | None = None,
    keep: Callable[[int, Any], None] | None = None,
) -> dict[str, float]:
    """Loss and metrics over rows.

    Args:
        core: Model and task.
        rows: What to measure on.
        device: Where the model is.
        tokens: Tokens computed together, padding counted.
        max_rows: At most so many rows, evenly spaced, each with all its windows; None takes all.
        keep: Given each row's number and what the model says of it, in the rows' order.

    Raises:
        DataError: There is nothing to measure on.
    """
    if not len(rows):
        raise DataError("no rows to measure on: nothing was held out", hint="give other rows: --data FILES")
    found: dict[int, Any] = {}
    batches = _batches(core, rows, device=device, tokens=tokens, max_rows=max_rows)
    figures = core.objective.summarise(sum_over(core, batches, found=found))
    if isinstance(core.objective, Judges):
        figures |= judge(core.objective, rows, found)
    for number in sorted(found) if keep is not None else ():
        keep(number, found[number])  # type: ignore[misc]
    return figures


def _batches(
    core: LossModule, rows: RowStore, *, device: str, tokens: int, max_rows: int | None
) -> Iterator[Batch | None]:
    for some in held_out_batches(rows, tokens=tokens, max_rows=max_rows, world_size=1, rank=0):
        assert some is not None
        batch = core.objective.collate([core.objective.encode(row) for _, row in some])
        numbers = torch.tensor([number for number, _ in some])
        yield {**{name: tensor.to(device) for name, tensor in batch.items()}, ROW_NUMBERS: numbers}
