"""Experts dealt out to processes: each of a group has some of every layer's, and reads the same rows as the others.

A process computes what its own experts make of the tokens that are sent to them; the sum over the group is the layer's
output. Everything else (attention, the router, embeddings) each of them holds and computes whole: what is saved is the
memory of the experts, which of such models are nearly all weights, and their share of the work.

Which parameters are experts' is what transformers says of an architecture (`base_model_ep_plan`), and how tokens of
other processes' experts are passed over is its own code.

**Source**: Lepikhin et al., "GShard", 2020, section 3.1, with the rows of a group kept together: no token travels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from llmkit.errors import UsageError
from llmkit.train.tensor import cut, layers_of, sum_of_gradients, sum_over

_LAYER, _PARAMETER = "ep_dispatch_experts", "grouped_gemm"
_HINT = "machine.parallel={shard: N}"


def split_experts(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Deal out a model's experts over the processes of `mesh`, in place.

    Args:
        model: Whole, and the same on every process.
        mesh: One axis.

    Raises:
        UsageError: The architecture has no such plan, or its experts cannot be dealt out equally.
    """
    plan = _plan_of(model.config)
    layers = layers_of(model.base_model, {name: style for name, style in plan.items() if style == _LAYER})
    if not layers:
        raise UsageError(
            f"machine.parallel.expert: transformers has no plan by which experts of {model.config.model_type} are "
            "dealt out",
            hint=f"{_HINT}, or an architecture that has one, such as mixtral or qwen3_moe",
        )
    for name, layer, _ in layers:
        _check(name, layer, mesh.size())
        _deal_out(layer, mesh)


def _plan_of(config: PretrainedConfig) -> Mapping[str, str]:
    """The part of an architecture's plan that is about experts.

    Raises:
        UsageError: It asks for something else too.
    """
    plan: Mapping[str, str] = getattr(config, "base_model_ep_plan", None) or {}
    about = {name: style for name, style in plan.items() if ".experts" in name}
    unknown = sorted(set(about.values()) - {_LAYER, _PARAMETER})
    if unknown:
        raise UsageError(
            f"machine.parallel.expert: experts of {config.model_type} are dealt out by {', '.join(unknown)}, which is "
            "not built",
            hint=_HINT,
        )
    return about


def _check(name: str, layer: nn.Module, processes: int) -> None:
    experts = getattr(layer, "num_experts", None)
    own = dict(layer.named_parameters(recurse=False))
    apart = len(list(layer.parameters())) > len(own)
    shaped = bool(own) and all(parameter.shape[0] == experts for parameter in own.values())
    if not hasattr(layer, "_is_expert_parallel") or not isinstance(experts, int) or apart or not shaped:
        raise UsageError(
            f"machine.parallel.expert: {name} is a {type(layer).__name__}, whose experts are not in tensors that hold "
            "all of them, as transformers has them",
            hint=_HINT,
        )
    if experts % processes:
        raise UsageError(
            f"machine.parallel.expert: {processes} processes cannot share {experts} experts equally",
            hint=f"a divisor of {experts}, or {_HINT}",
        )


def _deal_out(layer: Any, mesh: DeviceMesh) -> None:
    """Leave this process its experts, and have the layer add up what all processes make of the tokens."""
    number = layer.num_experts // mesh.size()
    first, group, plain = number * mesh.get_local_rank(), mesh.get_group(), layer.forward
    for name in dict(layer.named_parameters(recurse=False)):
        cut(layer, name, mesh, 0)
    # What transformers' code asks: from this number on, experts are others'.
    layer.num_experts, layer._is_expert_parallel = number, True

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        mine = chosen - first
        is_mine = (mine >= 0) & (mine < number)
        shares = sum_of_gradients(weights, group) * is_mine
        held = dict(layer._parameters)
        layer._parameters.update({name: p.to_local() for name, p in held.items() if isinstance(p, DTensor)})
        try:
            made = plain(sum_of_gradients(hidden, group), mine.masked_fill(~is_mine, number), shares)
        finally:
            layer._parameters.update(held)
        return sum_over(made, group)

    layer.forward = forward
