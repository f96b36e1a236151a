"""Optimizers, which parameters decay, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from llmkit.recipe.schema import Optim


def make_optimizer(model: nn.Module, spec: Optim) -> torch.optim.Optimizer:
    """The optimizer that the recipe asks for; its learning rate is set by the loop at every step.

    **Source**: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    groups = parameter_groups(model, spec.weight_decay)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices decay; norms, biases and embeddings do not.

    An embedding tied to the output head counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    spared = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [(decays, weight_decay), (spared, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in the order of its state dict's integer keys."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in _parameters(optimizer)]


def lr_at(step: int, spec: Optim, *, num_steps: int, warmup_steps: int) -> float:
    """The learning rate of the update that leads from `step` to `step + 1`.

    It rises linearly over `warmup_steps` updates, the last of which has the peak, and then follows the
    schedule down to `min_lr_ratio * lr`, which the run's last update has exactly.

    Args:
        step: Updates made so far, 0 to `num_steps - 1`.
        spec: The recipe's `optim` block.
        num_steps: Updates of the whole run.
        warmup_steps: Updates of the warm-up.

    **Source**: cosine: Loshchilov and Hutter, "SGDR", 2017, eq. 5. WSD: Hu et al., "MiniCPM", 2024, sec. 4.
    """
    if step < warmup_steps:
        return spec.lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / max(1, num_steps - warmup_steps))
    return spec.lr * _shape(spec, progress, num_steps, warmup_steps)


def _shape(spec: Optim, progress: float, num_steps: int, warmup_steps: int) -> float:
    low = spec.min_lr_ratio
    match spec.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - low) * progress
        case "cosine":
            return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "exponential":
            # An exponential never reaches 0: with `min_lr_ratio: 0` it ends at a thousandth.
            return float(max(low, 1e-3) ** progress)
        case "wsd":
            share = min(1.0, spec.decay * num_steps / max(1, num_steps - warmup_steps))
            falling = (progress - (1.0 - share)) / share if share > 0 else 0.0
            return 1.0 - (1.0 - low) * min(1.0, max(0.0, falling))


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
