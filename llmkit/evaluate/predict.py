"""What a model that was trained for a task says of rows without labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmkit.objectives.base import LossModule, Predicts

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
                for row, found in zip(some, _found(core, some), strict=True)
            ]
    finally:
        core.train(training)
    return said


@torch.inference_mode()
def _found(core: LossModule, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    batch = core.objective.collate([core.objective.encode(row) for row in rows])
    device = core.model.device
    return core.forward({name: tensor.to(device) for name, tensor in batch.items()}).found
