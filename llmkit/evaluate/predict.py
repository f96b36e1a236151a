"""What a model that was trained for a task says of rows without labels."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from llmkit.objectives.base import Joins, LossModule, Predicts

_ROWS_AT_ONCE = 16


def predict(core: LossModule, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the model says of each row, as JSON; nothing where the task says nothing of single rows.

    Args:
        core: Model and task.
        rows: In the task's form, without what is asked for.
    """
    if not isinstance(core.objective, Predicts):
        return []
    training = core.training
    core.eval()
    said: list[dict[str, Any]] = []
    try:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = [{**row, "seed": 0} for row in rows[start : start + _ROWS_AT_ONCE]]
            said += [
                core.objective.predict(row, found)
                for row, found in zip(some, _of_rows(core, some), strict=True)
            ]
    finally:
        core.train(training)
    return said


def _of_rows(core: LossModule, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    """What is found of each row; a text that is read in windows is read to its end."""
    objective = core.objective
    if not isinstance(objective, Joins):
        return _found(core, rows)
    parts = [objective.expand(row) for row in rows]
    line = [part for some in parts for part in some]
    found = [
        one
        for start in range(0, len(line), _ROWS_AT_ONCE)
        for one in _found(core, line[start : start + _ROWS_AT_ONCE])
    ]
    ends = list(accumulate(map(len, parts), initial=0))
    return [objective.join(found[start:end]) for start, end in pairwise(ends)]


@torch.inference_mode()
def _found(core: LossModule, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    batch = core.objective.collate([core.objective.encode(row) for row in rows])
    device = core.model.device
    return core.forward({name: tensor.to(device) for name, tensor in batch.items()}).found
