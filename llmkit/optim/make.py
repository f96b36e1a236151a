"""The optimizer that a recipe asks for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmkit.models.freezing import Pace
from llmkit.optim.average import keep_average
from llmkit.optim.each import EachParameter
from llmkit.optim.eight_bit import adamw8bit
from llmkit.optim.groups import parameter_groups
from llmkit.optim.joined import MuonWithAdamW
from llmkit.optim.kept import keep_zeros
from llmkit.optim.rules import adafactor, lion, schedule_free
from llmkit.recipe.schema import Optim

_ADAM_SETTINGS = ("lr", "betas", "eps")
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("lr", "momentum", "nesterov"),
    "adafactor": ("lr",),
    "lion": ("lr", "betas"),
    "muon": (*_ADAM_SETTINGS, "momentum", "nesterov", "muon_scale"),
}


def make_optimizer(
    model: nn.Module,
    spec: Optim,
    *,
    l1: float = 0.0,
    ema: float | None = None,
    paces: Mapping[int, Pace] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the recipe asks for; its learning rate is set by the loop at every step.

    Args:
        model: What is trained.
        spec: The recipe's `optim` block.
        l1: The recipe's `train.l1`.
        ema: The recipe's `train.ema`.
        paces: How parameters learn by their layers, as `paces_of` gives it; None: all alike.

    Raises:
        UsageError: A pattern of `optim.groups` matches no parameter.

    **Source**: AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2. Adam:
    Kingma and Ba, 2015, algorithm 1. Others: where they are written.
    """
    settings = {name: getattr(spec, name) for name in _SETTINGS.get(spec.name, _ADAM_SETTINGS)}
    own = {"l1": 0.0, "ema": ema}
    groups = [
        {**own, **settings, **group}
        for treated_alike in parameter_groups(model, spec, l1=l1, paces=paces)
        for group in _by_mesh(treated_alike)
    ]
    return with_hooks(_OPTIMIZERS[spec.name](groups))


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group in parts whose parameters are shared by the same processes: fused updates take no others together."""
    parts: dict[Any, list[nn.Parameter]] = {}
    for p in group["params"]:
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        parts.setdefault(mesh, []).append(p)
    return [{**group, "params": parameters} for parameters in parts.values()] or [group]


def like(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Another optimizer of the same kind for other groups, with the same steps before and after its own."""
    own: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    kind = partial(EachParameter, update=own.update) if isinstance(own, EachParameter) else type(own)
    return with_hooks(kind(groups))


def with_hooks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Have an optimizer also do what its groups ask for under `l1` and `ema`, and keep the zeros that are marked."""
    if any(group.get("l1") for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(_add_l1)
    keep_zeros(optimizer)
    if any(group.get("ema") for group in optimizer.param_groups):
        keep_average(optimizer)
    return optimizer


@torch.no_grad()
def _add_l1(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Add the gradient of `l1 * sum(|w|)` to that of the loss, after clipping, where Adam's and SGD's L2 is added."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["l1"] and p.grad is not None:
                p.grad.add_(p.sign(), alpha=group["l1"])


def _sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Torch's SGD; its fused form does not know of tensors that processes share."""
    shared = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    return torch.optim.SGD(groups, fused=not shared)


_OPTIMIZERS: Mapping[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": _sgd,
    "adafactor": partial(EachParameter, update=adafactor),
    "lion": partial(EachParameter, update=lion),
    "schedule_free": partial(EachParameter, update=schedule_free),
    "adamw8bit": partial(EachParameter, update=adamw8bit),
    "muon": MuonWithAdamW,
}
