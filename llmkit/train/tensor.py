"""Layers split over processes by heads and by the width of the feed-forward part: tensor parallelism.

Which layer is split how is what transformers says of an architecture (`base_model_tp_plan`). Embeddings and output
layer stay whole on each process, for the loss reads them in chunks. Processes that share a layer read the same rows and
compute the same loss. Weights are DTensors, so that checkpoints, clipping and `fully_shard` know what is where;
products are of local tensors, for torch's own styles look up anew how each length of a text is shared.

Dropout outside of the split is the same on all of these processes, whose hidden states must not part. Within it, such
as of attention weights, each process has other heads, and so draws other masks: see `_Draws`.

**Source**: Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from llmkit.errors import UsageError


def split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split a model's layers over the processes of `mesh`, in place.

    Args:
        model: Whole, and the same on every process.
        mesh: One axis.

    Raises:
        UsageError: The architecture has no such plan, its widths cannot be shared by so many, or a layer was replaced
            by something else, such as an adapter.
    """
    check_splits(model.config, mesh.size())
    base, drops = model.base_model, drops_something(model.config)
    draws: dict[str, _Draws] = {}
    for name, module, style in layers_of(base, _plan_of(model.config)):
        parent = name.rpartition(".")[0]
        if drops and parent not in draws:
            draws[parent] = _Draws(mesh.get_local_rank())
            leave = draws[parent].leave
            base.get_submodule(parent).register_forward_hook(
                lambda *_, leave=leave: leave(), always_call=True
            )
        _STYLES[style](module, mesh, draws.get(parent))


def layers_of(base: nn.Module, plan: Mapping[str, str]) -> list[tuple[str, nn.Module, str]]:
    """The layers that a plan is about: name, layer, and how it is split.

    Raises:
        UsageError: One is not what the plan takes it for.
    """
    found = []
    for pattern, style in plan.items():
        known = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        matching = [(name, module) for name, module in base.named_modules() if known.fullmatch(name)]
        for name, module in matching:
            if style in _LINEAR and type(module) is not nn.Linear:
                raise UsageError(
                    f"machine.parallel.tensor: {name} is a {type(module).__name__}, and only plain linear layers are "
                    "split: not those with an adapter, nor with rounded or 8-bit weights",
                    hint="machine.parallel={shard: N}",
                )
            found.append((name, module, style))
    return found


def drops_something(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration draws masks while it trains."""
    return any("drop" in name and isinstance(p, float) and p > 0 for name, p in config.to_dict().items())


def check_splits(config: PretrainedConfig, processes: int) -> None:
    """Whether a model of this configuration can be split over so many processes.

    Raises:
        UsageError: It cannot; the message says why and what would work.
    """
    kind, plan = config.model_type, _plan_of(config)
    if not plan:
        raise UsageError(
            f"machine.parallel.tensor: transformers has no plan by which {kind} is split",
            hint="machine.parallel={shard: N}, or an architecture that has one, such as llama, qwen3 or mistral",
        )
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    if unknown:
        raise UsageError(
            f"machine.parallel.tensor: {kind} is split by {', '.join(unknown)}, which is not built",
            hint="machine.parallel={shard: N}",
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        width = getattr(config, name, None)
        if isinstance(width, int) and width % processes:
            raise UsageError(
                f"machine.parallel.tensor: {processes} processes cannot share {name} {width}",
                hint=f"a divisor of {width}, or machine.parallel={{shard: N}}",
            )


def _plan_of(config: PretrainedConfig) -> Mapping[str, str]:
    plan: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    return plan


class _Draws:
    """Torch's generators while a part of a layer is computed that each process has other heads of.

    From the first layer that is split by columns to the one that is split by rows they are this process's own, seeded
    by what they would have drawn next and by the process's number; then they are put back. So what is drawn behind the
    part is the same on all processes, and the backward pass draws the same when it computes a block again.

    Args:
        rank: This process's number among those that share the layer.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._kept: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def enter(self, device: torch.device) -> None:
        """Draw for this process alone from now on."""
        if self._kept is not None:
            return
        seed = int(torch.randint(1 << 62, (1,)))  # on the host, which no device is waited for
        on_gpu = device.type == "cuda"
        self._kept = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        torch.manual_seed(seed + self._rank)

    def leave(self) -> None:
        """Draw as all others again."""
        if self._kept is None:
            return
        host, gpu = self._kept
        self._kept = None
        torch.set_rng_state(host)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


def _split_columns(module: nn.Module, mesh: DeviceMesh, draws: _Draws | None) -> None:
    """Leave a linear layer some of its outputs; all of its input reaches each process."""
    group = mesh.get_group()
    for name in ("weight", "bias"):
        cut(module, name, mesh, 0)

    def forward(features: torch.Tensor) -> torch.Tensor:
        if draws is not None and module.training:
            draws.enter(features.device)
        weight, bias = _own(module, "weight"), _own(module, "bias")
        assert weight is not None
        return functional.linear(sum_of_gradients(features, group), weight, bias)

    module.forward = forward


def _split_rows(module: nn.Module, mesh: DeviceMesh, draws: _Draws | None) -> None:
    """Leave a linear layer some of its inputs: the sum of what processes make of them, and the bias once."""
    group = mesh.get_group()
    cut(module, "weight", mesh, 1)

    def forward(features: torch.Tensor) -> torch.Tensor:
        if draws is not None:
            draws.leave()
        weight, bias = _own(module, "weight"), _own(module, "bias")
        assert weight is not None
        summed = sum_over(functional.linear(features, weight), group)
        return summed if bias is None else summed + bias

    module.forward = forward


def _share_norm(module: nn.Module, mesh: DeviceMesh, draws: _Draws | None) -> None:
    """Have a norm, which every process holds whole and computes for its own heads, learn from the heads of all."""
    plain, group = module.forward, mesh.get_group()

    def forward(*args: Any, **kwargs: Any) -> Any:
        held: dict[str, Any] = dict(module._parameters)
        summed: dict[str, Any] = {
            name: sum_of_gradients(p, group) for name, p in held.items() if p is not None
        }
        module._parameters.update(summed)
        try:
            return plain(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = forward


def cut(module: nn.Module, name: str, mesh: DeviceMesh, dimension: int) -> None:
    """Leave this process its share of a parameter. All have the same: each cuts out its own, and nothing is sent."""
    whole = module._parameters.get(name)
    if whole is not None:
        share = distribute_tensor(whole.detach(), mesh, [Shard(dimension)], src_data_rank=None)
        module._parameters[name] = nn.Parameter(share, requires_grad=whole.requires_grad)


def _own(module: nn.Module, name: str) -> torch.Tensor | None:
    parameter = module._parameters.get(name)
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def sum_of_gradients(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The same numbers; their gradient is added up over the processes of `group`."""
    found: torch.Tensor = _SumOfGradients.apply(tensor, group)
    return found


def sum_over(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Numbers added up over the processes of `group`, each of which goes on with the sum; the gradient is the sum's."""
    found: torch.Tensor = _Sum.apply(tensor, group)
    return found


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        summed = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


_LINEAR = ("colwise", "rowwise")
_STYLES: Mapping[str, Callable[[nn.Module, DeviceMesh, _Draws | None], None]] = {
    "colwise": _split_columns,
    "rowwise": _split_rows,
    "replicated_with_grad_allreduce": _share_norm,
}
