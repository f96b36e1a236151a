"""How likely a model holds answers to be, and held them when training began.

Shape suffixes: B rows, T positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from llmkit.models.heads import causal_scores

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel


def sequence_log_probs(model: "PreTrainedModel", batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B]: the sum of log p(target | all before it) of each row of `input_ids` and `targets` [B, T], in nats."""
    targets_BT = batch["targets"]
    scores = causal_scores(model, batch["input_ids"])
    return scores.log_probs(targets_BT.flatten()).view(targets_BT.shape).sum(1)


def log_probs_at_first(
    kept: "Sequence[PreTrainedModel]", model: "PreTrainedModel", batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The same [B] under the model as it was when training began: a copy, or the model without its adapter.

    Args:
        kept: That copy; none where an adapter learns.
        model: The model as it is.
        batch: As there.
    """
    if kept:
        with torch.no_grad():
            return sequence_log_probs(kept[0], batch)
    from llmkit.models.adapters import using_adapter

    with torch.no_grad(), without_dropout(model), using_adapter(model, None):
        return sequence_log_probs(model, batch)


@contextmanager
def without_dropout(model: "PreTrainedModel") -> Iterator[None]:
    """While this lasts, the model is in evaluation mode; afterwards each of its modules is in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
