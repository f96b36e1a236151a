"""The contract of an objective: rows in, loss out. A loss is a sum and a count, never a mean.

Shape suffixes: B rows of a micro-batch, T positions of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

Example = Mapping[str, npt.NDArray[np.int64]]
Batch = Mapping[str, torch.Tensor]

NOT_LEARNED = -100
"""The target of a position that is not in the loss."""


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch.

    Attributes:
        total: Scalar, the sum over all targets, in nats; what backward runs on.
        sums: Further scalar sums to add up over micro-batches, devices and steps.
    """

    total: torch.Tensor
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Four methods; no state that changes."""

    def encode(self, row: Any) -> Example:
        """One row of the source -> one example; numpy only, no tensors; in a thread or a process of the loader.

        A function of the row alone: chance comes from `np.random.default_rng(int(row["seed"]))`, never from a
        generator that lives on.
        """
        ...

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Examples -> a micro-batch, with `num_targets`: how many terms its loss sum has."""
        ...

    def loss(self, model: "PreTrainedModel", batch: Batch) -> Loss:
        """The loss of a micro-batch under `model`."""
        ...

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over a whole split -> metrics by name, without the `eval/` in front."""
        ...


class LossModule(nn.Module):
    """A model and its objective as one module, so that what wraps modules (DDP, compile) wraps the loss too.

    Args:
        model: The network.
        objective: What it learns.
        bf16: Compute matrix products in bfloat16; weights and the loss stay in float32.
    """

    def __init__(self, model: "PreTrainedModel", objective: Objective, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.bf16 = bf16

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch; see `Objective.loss`."""
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            return self.objective.loss(self.model, batch)
