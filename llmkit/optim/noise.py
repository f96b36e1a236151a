"""Noise on gradients, a pure function of (seed, step, parameter)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmkit.data.seeds import mix_seed

_POWER = 0.55 / 2
_NOISE = 1 << 44  # keeps these seeds apart from those of dropout and of samples


def add_noise(model: nn.Module, sigma: float, *, seed: int, step: int) -> None:
    """Add Gaussian noise to every gradient, of standard deviation `sigma / (1 + step) ** 0.275`.

    It is drawn anew for each parameter from its name, so it is the same on any number of processes. With a `sigma` of 0
    nothing happens.

    Args:
        model: What is trained; its gradients are clipped, and the same on all processes, or shards of such.
        sigma: The standard deviation at the first step.
        seed: The run's.
        step: Steps made so far.

    **Source**: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, section 3,
    where `sigma` is the root of eta and gamma is 0.55.
    """
    if sigma == 0:
        return
    scale = float(sigma / (1 + step) ** _POWER)
    for name, p in model.named_parameters():
        if p.grad is not None:
            chance = torch.Generator(p.device).manual_seed(mix_seed(seed, _NOISE, step, *name.encode()))
            noise = torch.randn(p.shape, generator=chance, device=p.device, dtype=p.grad.dtype)
            if isinstance(p.grad, DTensor):  # each has drawn all of it, and takes its own share
                noise = distribute_tensor(noise, p.grad.device_mesh, p.grad.placements, src_data_rank=None)
            p.grad.add_(noise, alpha=scale)
