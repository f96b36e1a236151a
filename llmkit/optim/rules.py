"""Lion, Muon, Adafactor and schedule-free AdamW, each as the update of one parameter.

No number is fetched from the device, so a step is queued on a GPU without waiting.
"""

import math
from typing import Any

import torch

from llmkit.optim.each import State

ORTHOGONALISED_IN = {"cpu": torch.float32}
"""The type that Muon's matrix products are in, by device, where it is not bfloat16 as published: without bfloat16
units, a processor is about five times faster in float32 (measured: 5.0 to 5.7 times, one core with AVX-512, matrices of
128 to 768)."""

_QUINTIC = (3.4445, -4.7750, 2.0315)
_QUINTIC_STEPS = 5
_SMALLEST_NORM = 1e-7
_ADAFACTOR_EPS = (1e-30, 1e-3)
_ADAFACTOR_CLIP = 1.0
_ADAFACTOR_DECAY = -0.8


def lion(p: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """Move every number by the learning rate, in the direction that gradient and momentum agree on.

    **Source**: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2.
    """
    if not state:
        state["exp_avg"] = torch.zeros_like(p)
    beta1, beta2 = group["betas"]
    momentum = state["exp_avg"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(momentum.lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
    momentum.lerp_(grad, 1 - beta2)


def muon(p: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """Move a matrix along its momentum, all of whose singular values are first made about 1.

    `muon_scale` says how far: `rms` as far as AdamW goes, `original` by the root of rows over columns where there are
    more rows. Rows are outputs, as torch's linear layers have them; a group that says `transposed` has them as columns.

    **Source**: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; `rms`: Liu et al., "Muon
    is Scalable for LLM Training", 2025, section 2.2.
    """
    if not state:
        state["momentum_buffer"] = torch.zeros_like(p)
    momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
    direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    rows, columns = reversed(p.shape) if group.get("transposed") else p.shape
    by_rms = group["muon_scale"] == "rms"
    scale = 0.2 * math.sqrt(max(rows, columns)) if by_rms else math.sqrt(max(1.0, rows / columns))
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(_orthogonalised(direction), alpha=-group["lr"] * scale)


def _orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The same singular vectors, each singular value between about 0.7 and 1.2: a Newton-Schulz iteration."""
    dtype = ORTHOGONALISED_IN.get(matrix.device.type, torch.bfloat16)
    x = matrix.to(torch.promote_types(dtype, matrix.dtype) if dtype == torch.float32 else dtype)
    x = x if matrix.shape[0] <= matrix.shape[1] else x.T
    x = x / x.norm().clamp_(min=_SMALLEST_NORM)
    a, b, c = _QUINTIC
    for _ in range(_QUINTIC_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)


def adafactor(p: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """Adam's second moment as a row and a column instead of a matrix; steps relative to the parameter's size.

    The learning rate is the algorithm's relative step size rho_t, so a step moves a parameter by about that share of
    its root mean square. No first moment. Weight decay is decoupled.

    **Source**: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, algorithms 4
    and 5, with the constants of section 9: decay 1 - t^-0.8, clipping at 1, epsilons 1e-30 and 1e-3.
    """
    factored = p.ndim >= 2
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        forms = {"row_var": p[..., :1], "col_var": p[..., :1, :]} if factored else {"variance": p}
        state.update({name: torch.zeros_like(like) for name, like in forms.items()})
    state["step"] += 1
    share = state["step"].item() ** _ADAFACTOR_DECAY  # of the new gradient; `step` is on the host
    tiny, least = _ADAFACTOR_EPS
    square = grad.square().add_(tiny)
    if factored:
        row = state["row_var"].lerp_(square.mean(-1, keepdim=True), share)
        column = state["col_var"].lerp_(square.mean(-2, keepdim=True), share)
        update = grad * (row / row.mean(-2, keepdim=True)).rsqrt_() * column.rsqrt()
    else:
        update = grad * state["variance"].lerp_(square, share).rsqrt()
    update.div_((_rms(update) / _ADAFACTOR_CLIP).clamp_(min=1.0))
    step_size = group["lr"] * _rms(p).clamp_(min=least)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(update.mul_(step_size))


def schedule_free(p: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """AdamW whose gradients are taken between a fast point `z` and the average `x` of where it has been.

    The parameter itself is that point between, `y = (1 - beta1) z + beta1 x`. `x` is what the model is judged by and
    exported as: see `schedule_free_average`. Points count in the average by the square of the largest learning rate
    so far, so those of the warm-up count little.

    **Source**: Defazio et al., "The Road Less Scheduled", 2024, algorithm 1 and section 4.1 (weights of the warm-up).
    """
    beta1, beta2 = group["betas"]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["z"] = p.clone()
        state["exp_avg_sq"] = torch.zeros_like(p)
        state["lr_max"] = p.new_zeros(())
        state["weight_sum"] = p.new_zeros(())
    state["step"] += 1
    lr, z = group["lr"], state["z"]
    weight = state["lr_max"].clamp_(min=lr).square()
    # 0 / 0 is no share at all: a group whose learning rate was 0 up to now.
    share = (weight / state["weight_sum"].add_(weight)).nan_to_num_(nan=0.0)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = square.div(1 - beta2 ** state["step"].item()).sqrt_().add_(group["eps"])
    direction = (grad / denominator).add_(p, alpha=group["weight_decay"])
    p.lerp_(z, share)
    p.add_(direction * (beta1 * (1 - share) - 1), alpha=lr)
    z.sub_(direction, alpha=lr)


def schedule_free_average(p: torch.Tensor, state: State, group: dict[str, Any]) -> torch.Tensor:
    """The average `x`, from `y` (the parameter) and `z`."""
    beta1 = group["betas"][0]
    return p.lerp(state["z"], 1 - 1 / beta1) if beta1 > 0 else p.clone()


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt_()
