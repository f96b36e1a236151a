"""Weights, gradients and optimizer shared by processes: what `plan.layout` says, carried out by torch and proved.

The model is built on the host, whole and the same on every process; then each block is split by heads where the layout
has `tensor`, and sharded by `fully_shard` over the processes that read different rows. A block is moved to the device
just before it is sharded, so no device ever holds the model. Embeddings, output layer and what stands beside the blocks
are one more group, gathered while a step computes: the loss reads them outside of their own modules.

Gradients are shared out after every micro-batch, not once a step: kept whole until the last one they would fill the
memory that sharding is to save. Copies of a sharded model (`replicate`) meet once a step.

Under bf16 the blocks are gathered in bf16, which halves what is sent; gradients are added up in fp32, and what is
learned is fp32. A single process rounds the matrices alone, here norms and biases of the blocks are rounded with them:
the same to the rounding of bf16. What autocast would keep of a gathered matrix until the backward pass is not kept.

What comes out is trained by the same loop: accelerate does backward, clipping and reduction, and is not given the model
to wrap. Sums of rows are those of a single process; the order in which they are added up is not.

**Source**: Zhao et al., "PyTorch FSDP", 2023, and torch's `fully_shard`; for `tensor` Shoeybi et al., "Megatron-LM",
2019, section 3.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

from llmkit.errors import RunError
from llmkit.models.blocks import blocks_of
from llmkit.objectives.base import Loss, LossModule
from llmkit.plan import Plan
from llmkit.plan.parallel import Layout
from llmkit.train.checkpoint import model_tensors
from llmkit.train.experts import split_experts
from llmkit.train.tensor import split_layers

_AXES = ("replicate", "shard", "expert", "tensor")


def distribute(core: LossModule, plan: Plan, device: torch.device) -> None:
    """Split and shard what was built whole on the host, in place, over all processes.

    Args:
        core: Model and objective with all that is trained; the same on every process.
        plan: Its layout is sharded.
        device: Where this process computes.

    Raises:
        RunError: Processes have built different weights, or what was asked for is not what came out.
        UsageError: The model cannot be split so.
    """
    layout = plan.layout
    # It says on every process that two sums are not one; they are of single numbers, or of what is gathered to export.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    check_alike(core)
    sizes = (layout.replicate, layout.shard, layout.expert, layout.tensor)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=_AXES)
    if layout.expert > 1:
        split_experts(core.model, mesh["expert"])
    if layout.tensor > 1:
        split_layers(core.model, mesh["tensor"])
    if layout.data_size > 1:
        _shard(core, mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"], plan.offload)
    else:
        core.to(device)
    check_layout(core, layout)


def _shard(core: LossModule, mesh: DeviceMesh, offload: bool) -> None:
    _make_loss_known()
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    narrow = MixedPrecisionPolicy()
    if core.bf16:
        narrow = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(core):
        fully_shard(block, mesh=mesh, offload_policy=policy, mp_policy=narrow)
    fully_shard(core, mesh=mesh, offload_policy=policy)

    @contextmanager
    def no_sync() -> Iterator[None]:
        sharded: Any = core
        sharded.set_requires_all_reduce(False)
        try:
            yield
        finally:
            sharded.set_requires_all_reduce(True)

    core.no_sync = no_sync  # type: ignore[assignment]  # what accelerate asks for where gradients are accumulated


def _make_loss_known() -> None:
    """Let torch find the tensors in a `Loss`: it hangs what is to happen before the backward pass on them."""
    if Loss in _pytree.SUPPORTED_NODES:
        return
    names = [field.name for field in fields(Loss)]
    _pytree.register_pytree_node(
        Loss,
        lambda loss: ([getattr(loss, name) for name in names], None),
        lambda values, _: Loss(*values),
    )


@contextmanager
def readable(core: LossModule) -> Iterator[None]:
    """While this lasts the model's parts can be called one by one, by all processes together; for measuring only.

    Blocks gather themselves when they are called; the rest is gathered here, and let go of afterwards: else the next
    step would compute with these copies and not with what was learned since. Blocks that are gathered in bf16 compute
    with numbers in fp32 only where the device may choose: under autocast.
    """
    if not isinstance(core, FSDPModule):
        yield
        return
    core.unshard()
    try:
        with torch.autocast(core.model.device.type, torch.bfloat16, enabled=core.bf16):
            yield
    finally:
        core.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as every process can read it: of one that is shared, all of it; every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(core: LossModule, built: LossModule | None) -> None:
    """Bring what a sharded model has learned to one process, a tensor at a time; every process calls this.

    Args:
        core: The sharded one.
        built: On the process that takes it: the same model built anew on the host, which is filled; else None.

    Raises:
        RunError: The two have not the same tensors.
    """
    places = model_tensors(built.trained) if built is not None else None
    held = model_tensors(core.trained)
    if places is not None and places.keys() != held.keys():
        raise RunError(f"the model built anew has other tensors: {sorted(places.keys() ^ held.keys())[:5]}")
    for name in sorted(held):
        tensor = held[name]
        found = whole(tensor)
        if places is not None:
            places[name].copy_(found)


def check_alike(core: nn.Module) -> None:
    """Whether every process has built the same weights, to the last bit.

    Raises:
        RunError: They have not.
    """
    sums = torch.stack([_bits(tensor) for tensor in (*core.parameters(), *core.buffers())])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        names = [name for name, _ in (*core.named_parameters(), *core.named_buffers())]
        differing = [name for name, same in zip(names, (least == most).tolist(), strict=True) if not same]
        raise RunError(
            f"processes have built different weights: {', '.join(differing[:3])}",
            hint="do all machines read the same model folder, with the same versions of torch and transformers?",
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over a tensor's bits, on the host."""
    flat = tensor.detach().reshape(-1).contiguous()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(kind).sum(dtype=torch.int64).cpu()


def check_layout(core: nn.Module, layout: Layout) -> None:
    """Whether what was asked for is what stands there.

    Raises:
        RunError: A parameter is not shared as the layout says.
    """
    split = {"tensor": 0, "expert": 0}
    for name, parameter in core.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        axes: dict[str, int] = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)) if mesh else {}
        for axis in split:
            split[axis] += axis in axes
        wanted = {"replicate": layout.replicate, "shard": layout.shard} if layout.data_size > 1 else {}
        found = {axis: axes.get(axis, 1) for axis in wanted}
        if found != wanted or (wanted and mesh is None):
            raise RunError(f"{name} is shared by {axes or 'no processes'}, where {layout} was asked for")
    for axis, processes in (("tensor", layout.tensor), ("expert", layout.expert)):
        if processes > 1 and not split[axis]:
            raise RunError(f"no layer is split over {processes} processes, as was asked for")


def adding_up(
    reduce: Callable[[torch.Tensor], torch.Tensor], speaks: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`reduce` of sums over rows, where several processes read the same rows: only one of them counts."""
    return lambda sums: reduce(sums if speaks else torch.zeros_like(sums))
