"""Measure a model that was trained for a task on labelled rows, by the code that training's own evaluation uses.

Shape suffixes: R rows that were measured, B rows of a batch, N targets in a line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.data.sample_batches import held_out_batches
from llmkit.data.samples import LabelledRow, RowStore
from llmkit.data.tokenizers import load_tokenizer
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.evaluate.judge import judge
from llmkit.evaluate.sharing import ALONE, Share
from llmkit.metrics.inputs import Floats
from llmkit.models.adapter_files import CONFIG as ADAPTER
from llmkit.models.adapters import load_adapter
from llmkit.models.growing import grow_vocabulary
from llmkit.models.heads import choose_heads
from llmkit.models.runtimes import load_runtime, runtime_of
from llmkit.models.tasks import build_task_model
from llmkit.objectives.base import TARGETS, Example, Judges, LossModule, Material, Objective, Refers
from llmkit.objectives.detail import Packs, Recording
from llmkit.objectives.make import make_task
from llmkit.objectives.texts import pad_id
from llmkit.recipe.schema import Finetune
from llmkit.registry import kind_for


def load_task(
    place: Path, section: Finetune, material: Material, *, base: str, device: str, bf16: bool = False
) -> LossModule:
    """A model that was trained for a task, and the task, to be measured or asked.

    Args:
        place: The model's folder, or that of an adapter that was not merged.
        section: The `finetune` section that it was trained by.
        material: What the task is made of.
        base: The folder or name of the model that its training began with.
        device: `cpu`, `cuda` or `mps`.
        bf16: Matrix products in bfloat16.

    Raises:
        UsageError: The folder holds no model that was trained for the task.
    """
    kind, adapter = kind_for(section.task, material.facts), (place / ADAPTER).is_file()
    if runtime_of(place) is not None:
        exported = load_runtime(place).eval()
        choose_heads(exported, kind)  # it answers as a transformers model does
        return LossModule(exported, make_task(section, material), bf16=False).eval()
    model, new = build_task_model(
        base if adapter else str(place),
        kind,
        labels=material.labels,
        number=section.task == "regression",
        pad_token_id=pad_id(material.tokenizer),
        trusted=section.model.trust_remote_code,
    )
    if adapter:  # it holds the head, too
        load_adapter(model, place)
    elif new:
        raise UsageError(
            f"{place}: the model has no head for {section.task}: {', '.join(new)} are missing",
            hint="measure the run that trained it, or name a model with such a head",
        )
    choose_heads(model, kind)
    core = LossModule(model, make_task(section, material), bf16=bf16).to(device)
    core.eval()
    return core


def refer_to(
    core: LossModule, base: str, material: Material, *, device: str, trusted: bool, seed: int
) -> None:
    """Give a task that compares the model with what it was when training began that model.

    Args:
        core: From `load_task`.
        base: The folder or name of that model.
        material: As there.
        device: As there.
        trusted: Code that comes with it may run.
        seed: The recipe's; what was new in the model at first follows from it.

    Raises:
        MissingError: That model is gone.
    """
    assert isinstance(core.objective, Refers)
    try:
        reference, _ = build_task_model(
            base, "causal", pad_token_id=pad_id(material.tokenizer), trusted=trusted
        )
    except MissingError as error:
        raise MissingError(
            f"{base}: the model that training began with is gone, and this task compares with it",
            hint="put it back where it was",
        ) from error
    added = len(material.tokenizer) - len(load_tokenizer(base))
    if added > 0:
        grow_vocabulary(reference, len(material.tokenizer), added, seed=seed)
    choose_heads(reference, "causal")
    core.objective.refer(reference.requires_grad_(False).to(device).eval())


@dataclass(frozen=True)
class RowLosses:
    """What each row that was measured adds to the loss.

    Attributes:
        total_R: The sum of its targets' losses in nats.
        targets_R: How many targets it has.
        hits_R: How many of them were the likeliest token, where that is counted.
    """

    total_R: Floats
    targets_R: Floats
    hits_R: Floats | None


@dataclass(frozen=True)
class Findings:
    """What came of measuring a task on rows.

    Attributes:
        figures: Loss and metrics, as training's own evaluation has them.
        numbers: The numbers of the rows that were measured, rising.
        found: What the model says of each of them; empty where it says nothing of single rows.
        losses: What each adds to the loss; None where the loss is not made of rows.
        num_tokens: Tokens that the model read.
        num_unknown: How many of them the tokenizer did not know.
        unknown_row: The number of the row with the most unknown tokens.
    """

    figures: Mapping[str, float]
    numbers: Sequence[int]
    found: Sequence[Any]
    losses: RowLosses | None
    num_tokens: int
    num_unknown: int
    unknown_row: int


@dataclass(frozen=True)
class _Part:
    """What came of a batch."""

    sums: Mapping[str, float]
    numbers: Sequence[int]
    found: Sequence[Any]
    losses: Sequence[tuple[float, int, int]]
    tokens: Sequence[tuple[int, int]]


def evaluate_task(
    core: LossModule,
    rows: RowStore,
    *,
    device: str,
    tokens: int,
    max_rows: int | None = None,
    keep: Callable[[int, Any], None] | None = None,
) -> dict[str, float]:
    """Loss and metrics over rows; see `measure_rows`.

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
    made = measure_rows(core, rows, device=device, tokens=tokens, max_rows=max_rows)
    for number, one in zip(made.numbers, made.found, strict=False) if keep is not None else ():
        keep(number, one)  # type: ignore[misc]
    return dict(made.figures)


def measure_rows(
    core: LossModule,
    rows: RowStore,
    *,
    device: str,
    tokens: int,
    max_rows: int | None = None,
    unknown: int | None = None,
    share: Share = ALONE,
) -> Findings:
    """Loss and metrics over rows, and what each row says.

    Batches are the same whatever the number of processes, and what comes of them is put together in their order: so is
    the result, to the last bit.

    Args:
        core: Model and task.
        rows: What to measure on.
        device: Where the model is.
        tokens: Tokens computed together, padding counted.
        max_rows: At most so many rows, evenly spaced, each with all its windows; None takes all.
        unknown: The token that stands for what the tokenizer does not know.
        share: This process's part of the work.

    Raises:
        DataError: There is nothing to measure on.
    """
    if not len(rows):
        raise DataError("no rows to measure on: nothing was held out", hint="give other rows: --data FILES")
    batches = held_out_batches(
        rows, tokens=tokens, max_rows=max_rows, world_size=share.world_size, rank=share.rank
    )
    parts = {
        share.rank + turn * share.world_size: _of_batch(core, some, device, unknown)
        for turn, some in enumerate(batches)
        if some is not None
    }
    return _joined(core, rows, [part for _, part in sorted(share.gather(parts).items())])


def _of_batch(
    core: LossModule, some: Sequence[tuple[int, LabelledRow]], device: str, unknown: int | None
) -> _Part:
    examples = [core.objective.encode(row) for _, row in some]
    batch = {name: tensor.to(device) for name, tensor in core.objective.collate(examples).items()}
    each = Recording(hits=isinstance(core.objective, Packs))
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, core.bf16):
        loss = core.objective.loss(core.model, batch, each)
    counts = {name: count for name, count in batch.items() if name.startswith("num_")}
    sums = {**loss.sums, "total": loss.totals[TARGETS], **counts}
    return _Part(
        {name: float(value.cpu().double()) for name, value in sums.items()},
        [number for number, _ in some],
        list(loss.found),
        _by_row(core.objective, each, examples),
        [_tokens(example, unknown) for example in examples],
    )


def _by_row(
    objective: Objective, each: Recording, examples: Sequence[Example]
) -> list[tuple[float, int, int]]:
    """Loss, targets and hits of each row; empty where the loss was not made of rows' targets."""
    size = len(examples)
    if not each.seen:
        return []
    if isinstance(objective, Packs):
        ((nll_N, is_target_N, hit_N),) = each.seen
        owner_N = np.where(is_target_N.numpy(), objective.owners(examples), -1)
        columns = [
            np.bincount(owner_N + 1, weights=column_N.numpy(), minlength=size + 1)[1:]
            for column_N in (nll_N, is_target_N, hit_N)
        ]
        return list(zip(*(column.tolist() for column in columns), strict=True))
    if any(len(nll_N) % size for nll_N, _, _ in each.seen):
        return []
    # Of a loss that is the mean of several, such as that of an answer's two ends, the mean.
    totals_B = sum(nll_N.view(size, -1).sum(1) for nll_N, _, _ in each.seen) / len(each.seen)
    assert isinstance(totals_B, torch.Tensor)
    _, is_target_N, hit_N = each.seen[0]
    counts = (is_target_N.view(size, -1).sum(1).tolist(), hit_N.view(size, -1).sum(1).tolist())
    return list(zip(totals_B.tolist(), *counts, strict=True))


def _tokens(example: Example, unknown: int | None) -> tuple[int, int]:
    """How many tokens an example has, and how many of them are unknown."""
    ids = [array for name, array in example.items() if name == "input_ids" or name.startswith("ids_")]
    total = sum(len(some) for some in ids)
    return total, 0 if unknown is None else int(sum((some == unknown).sum() for some in ids))


def _joined(core: LossModule, rows: RowStore, parts: Sequence[_Part]) -> Findings:
    """All batches together, their sums added in their order, their rows in that of the rows."""
    sums = dict.fromkeys(("total", TARGETS, *core.objective.sums), 0.0)
    for part in parts:
        for name, value in part.sums.items():
            sums[name] += value
    numbers = [number for part in parts for number in part.numbers]
    order = np.argsort(numbers, kind="stable").tolist()
    found = [one for part in parts for one in part.found]
    known = dict(zip(numbers, found, strict=True)) if found else {}
    losses = [one for part in parts for one in part.losses]
    tokens = [one for part in parts for one in part.tokens]
    figures = core.objective.summarise(sums)
    if isinstance(core.objective, Judges):
        figures |= judge(core.objective, rows, known)
    worst = max(range(len(tokens)), key=lambda place: tokens[place][1])
    return Findings(
        figures,
        [numbers[place] for place in order],
        [found[place] for place in order] if found else [],
        _losses([losses[place] for place in order], core.objective) if losses else None,
        sum(total for total, _ in tokens),
        sum(some for _, some in tokens),
        numbers[worst],
    )


def _losses(losses: Sequence[tuple[float, int, int]], objective: Objective) -> RowLosses:
    total_R, targets_R, hits_R = np.array(losses, dtype=np.float64).T
    return RowLosses(total_R, targets_R, hits_R if isinstance(objective, Packs) else None)
