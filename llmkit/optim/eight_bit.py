"""AdamW whose moments are kept in eight bits, in blocks of 256 numbers with a scale each.

A number is stored as the nearest of 256 values in -1..1 (0..1 for the second moment) that lie denser towards 0,
times the largest of its block. Blocks keep one outlier from spoiling all others.

Shape suffixes: N numbers of a parameter, K blocks, S numbers of a block.

**Source**: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, sections 1.3 and 2.
"""

from functools import cache
from typing import Any

import torch
from torch.nn import functional

from llmkit.optim.each import State

BLOCK = 256
SMALLEST = 4096
"""Parameters of fewer numbers keep moments in full: they take no room, and norms and biases suffer most."""
_DIGITS = 7
_TINY = 1e-12


def adamw8bit(p: torch.Tensor, grad: torch.Tensor, state: State, group: dict[str, Any]) -> None:
    """AdamW's update; between steps each moment is a byte a number and a scale a block."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            _put(state, name, torch.zeros_like(p))
    state["step"] += 1
    step = state["step"].item()  # on the host
    beta1, beta2 = group["betas"]
    mean = _take(state, "exp_avg", p).lerp_(grad, 1 - beta1)
    square = _take(state, "exp_avg_sq", p).lerp_(grad.square(), 1 - beta2)
    _put(state, "exp_avg", mean)
    _put(state, "exp_avg_sq", square)
    denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))


def _put(state: State, name: str, moment: torch.Tensor) -> None:
    if moment.numel() < SMALLEST:
        state[name] = moment.clone()
    else:
        signed = name == "exp_avg"
        state[f"{name}_codes"], state[f"{name}_scale"] = quantize(moment, signed=signed)


def _take(state: State, name: str, p: torch.Tensor) -> torch.Tensor:
    """The moment in full; what is done to it does not reach the state."""
    if name in state:
        return state[name].clone()
    values = dequantize(state[f"{name}_codes"], state[f"{name}_scale"], signed=name == "exp_avg")
    return values.view(p.shape).to(p.dtype)


def quantize(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N] of 8 bits and the blocks' scales [K], of N numbers in any shape."""
    flat_N = values.flatten().float()
    blocks_KS = functional.pad(flat_N, (0, -len(flat_N) % BLOCK)).view(-1, BLOCK)
    scale_K = blocks_KS.abs().amax(1).clamp_(min=_TINY)
    levels = _levels(signed, values.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes_KS = torch.bucketize(blocks_KS / scale_K.unsqueeze(1), between, right=True, out_int32=True)
    return codes_KS.to(torch.uint8).flatten()[: len(flat_N)], scale_K


def dequantize(codes_N: torch.Tensor, scale_K: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The N numbers, in float32, that codes and scales stand for."""
    levels = _levels(signed, codes_N.device)
    padded_N = functional.pad(codes_N, (0, -len(codes_N) % BLOCK))
    values_KS = levels[padded_N.int()].view(-1, BLOCK) * scale_K.float().unsqueeze(1)
    return values_KS.flatten()[: len(codes_N)]


@cache
def code_values(signed: bool) -> tuple[float, ...]:
    """The 256 values that a code stands for, ascending.

    For each power of ten from 1e-6 to 1, numbers spread evenly over 0.1 to 1 times it, twice as many for each next
    power (with a sign: half of them on either side); and 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(_DIGITS):
        count = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        middles = (10.0 ** (power - _DIGITS + 1) * ((edges[1:] + edges[:-1]) / 2)).tolist()
        values += [*middles, *(-value for value in middles)] if signed else middles
    return tuple(sorted(values))


@cache
def _levels(signed: bool, device: torch.device) -> torch.Tensor:
    """`code_values` on a device, sent there once: a GPU would be waited for each time."""
    return torch.tensor(code_values(signed), device=device)
