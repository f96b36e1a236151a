"""Zeros that stay: weights that pruning has taken out stay out while the others learn."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_LEARNS = "_llmkit_learns"
"""Where a weight holds which of its numbers learn, in its own shape."""


def mark_zeros(model: PreTrainedModel) -> tuple[int, int]:
    """Mark the zeros of a model's linear layers; an optimizer made by `make_optimizer` then leaves them zero.

    To be called while the model has the weights that it starts from, before any of a checkpoint are loaded: so a run
    that goes on marks the same ones. The embeddings, and an output layer tied to them, are never marked.

    Args:
        model: Before it is wrapped.

    Returns:
        How many numbers are zero, and how many these layers have.
    """
    spared = {id(layer.weight) for layer in _embeddings(model)}
    zeros = whole = 0
    for weight in {id(weight): weight for weight in _linear_weights(model)}.values():
        if id(weight) in spared or not weight.requires_grad:
            continue
        learns = weight.detach() != 0
        missing = learns.numel() - int(learns.sum())
        zeros, whole = zeros + missing, whole + learns.numel()
        if missing:
            setattr(weight, _LEARNS, learns)
    return zeros, whole


def _embeddings(model: PreTrainedModel) -> Iterator[Any]:
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            yield layer


def _linear_weights(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield module.weight


@torch.no_grad()
def hold_zeros(optimizer: torch.optim.Optimizer) -> None:
    """Take away the gradients of marked zeros, so that neither clipping nor an optimizer's memory knows of them."""
    for p, learns in _marked(optimizer):
        if p.grad is not None:
            # Not a product: 0 times an infinite gradient is no number.
            p.grad.masked_fill_(~learns, 0.0)


def keep_zeros(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer leave marked zeros zero, whatever its step is made of: Muon's mixes whole matrices.

    Averages of the weights follow the weights, so this is to be called before an average is asked for.
    """
    if any(True for _ in _marked(optimizer)):
        optimizer.register_step_pre_hook(lambda own, *_: hold_zeros(own))  # noise has come after clipping
        optimizer.register_step_post_hook(_clear)


@torch.no_grad()
def _clear(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Marked numbers are zero again, in the weights and in what averages of them are made of."""
    for p, learns in _marked(optimizer):
        p.masked_fill_(~learns, 0.0)
        latest = optimizer.state.get(p, {}).get("z")  # of `schedule_free`
        if latest is not None:
            latest.masked_fill_(~learns, 0.0)


def _marked(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights with zeros to keep, and which of their numbers learn, on the same device."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            learns = getattr(p, _LEARNS, None)
            if learns is None:
                continue
            if learns.device != p.device:  # the model has been moved since
                learns = learns.to(p.device)
                setattr(p, _LEARNS, learns)
            yield p, learns
