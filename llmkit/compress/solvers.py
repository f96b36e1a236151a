"""How the weights of one linear layer are rounded, scaled or set to zero so that what it computes changes least.

Pure functions of a weight matrix and of what the layer read; what numbers can be stored is up to a `Grid`.

Shape suffixes: O outputs, I inputs of a linear layer, G groups of inputs with a scale of their own, J inputs of one
group, C the columns at hand, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llmkit.errors import UsageError

_BLOCK = 128
"""Columns after which what they lost is made up for in all that follow."""
_ALPHAS = 20
_CLIPS = 20
_CLIP_MOST = 0.5


class Grid(Protocol):
    """The numbers that can be stored."""

    @property
    def columns(self) -> int | None:
        """Inputs in a line that share a scale; None: a whole row."""
        ...

    def fit(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale, and zero point where there is one, of each group of each row [O, G]."""
        ...

    def rounded(
        self, weight_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None
    ) -> torch.Tensor:
        """The nearest numbers that can be stored; the inputs fall into G groups of one size."""
        ...


@dataclass(frozen=True)
class Rounded:
    """A weight as it will be stored.

    Attributes:
        weight_OI: The rounded numbers.
        scale_OG: The scale of each group.
        zero_OG: Its zero point, if there is one.
    """

    weight_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_OG: torch.Tensor | None


def output_error(changed_OI: torch.Tensor, weight_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    """The square of how far the layer's outputs change, summed over all that it read."""
    gap_OI = changed_OI.double() - weight_OI.double()
    return float(((gap_OI @ gram_II.double()) * gap_OI).sum())


def round_nearest(weight_OI: torch.Tensor, grid: Grid) -> Rounded:
    """Each number to the nearest."""
    scale_OG, zero_OG = grid.fit(weight_OI)
    return Rounded(grid.rounded(weight_OI, scale_OG, zero_OG), scale_OG, zero_OG)


def gptq(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> Rounded:
    """Round input after input; those that follow make up for what each lost.

    A group's scales are fitted when its first input's turn comes. With `act_order` they are fitted before, since inputs
    of one group then have their turns at different times.

    Args:
        weight_OI: The weight, in float32.
        gram_II: The sum of the outer product of the layer's input with itself.
        grid: What can be stored.
        damping: Added to the diagonal of `gram_II`, as a share of its mean.
        act_order: Inputs with the largest activations first.

    **Source**: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    ICLR 2023, section 3.3 and algorithm 1; groups and order by activations: its published code.
    """
    num_inputs = weight_OI.shape[1]
    order_I = torch.arange(num_inputs)
    if act_order:
        order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    factor_II = _inverse_factor(gram_II[order_I][:, order_I], damping).to(weight_OI.dtype)
    size = grid.columns or num_inputs
    static = act_order or grid.columns is None
    scale_OG, zero_OG = grid.fit(weight_OI)
    left_OI, rounded_OI = weight_OI[:, order_I].clone(), torch.empty_like(weight_OI)
    step = size * max(1, _BLOCK // size) if not static else _BLOCK
    for start in range(0, num_inputs, step):
        stop = min(start + step, num_inputs)
        block_OC, errors_OC = left_OI[:, start:stop].clone(), left_OI.new_zeros(len(left_OI), stop - start)
        for c in range(stop - start):
            group = int(order_I[start + c]) // size
            if not static and (start + c) % size == 0:
                own_O1, zero_O1 = grid.fit(block_OC[:, c : c + size])
                scale_OG[:, group : group + 1] = own_O1
                if zero_OG is not None and zero_O1 is not None:
                    zero_OG[:, group : group + 1] = zero_O1
            zero = None if zero_OG is None else zero_OG[:, group : group + 1]
            nearest_O1 = grid.rounded(block_OC[:, c : c + 1], scale_OG[:, group : group + 1], zero)
            rounded_OI[:, order_I[start + c]] = nearest_O1[:, 0]
            row_C = factor_II[start + c, start:stop]
            error_O = (block_OC[:, c] - nearest_O1[:, 0]) / row_C[c]
            block_OC[:, c:] -= error_O[:, None] * row_C[c:]
            errors_OC[:, c] = error_O
        left_OI[:, stop:] -= errors_OC @ factor_II[start:stop, stop:]
    return Rounded(rounded_OI, scale_OG, zero_OG)


def _inverse_factor(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U^T U the inverse of the damped Hessian, in float64.

    Row i of U, over its diagonal, is how the inputs after i make up for what input i lost, once those before it are
    fixed. An input that always was zero goes with no other.
    """
    hessian_II = gram_II.double().clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1
    diagonal_I += damping * diagonal_I.mean()
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II)
    if failed or not lower_II.isfinite().all():
        finite = bool(gram_II.isfinite().all())
        raise UsageError(
            f"what a layer of {len(gram_II):,} inputs reads cannot be made up for: "
            + (f"damping: {damping:g} is too little" if finite else "it holds numbers that are not finite"),
            hint="damping: 0.01, or more" if finite else "look at the model with `llmkit eval` first",
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)


@dataclass(frozen=True)
class Scaled:
    """By what the inputs of layers that read the same are divided, and their weights multiplied.

    Attributes:
        scale_I: The factors.
        alpha: How much they follow the activations: 0, not at all.
        error: The square of how far the outputs change when the scaled weights are rounded, over all layers.
        error_unscaled: And when they are rounded as they are.
    """

    scale_I: torch.Tensor
    alpha: float
    error: float
    error_unscaled: float


def awq_scales(
    weights_OI: Sequence[torch.Tensor], mean_abs_I: torch.Tensor, gram_II: torch.Tensor, grid: Grid
) -> Scaled:
    """The scales of inputs with which rounding to the nearest changes the outputs least.

    Args:
        weights_OI: The weights of all layers that read the same.
        mean_abs_I: The mean of their input without the sign.
        gram_II: The sum of the outer product of their input with itself.
        grid: What can be stored.

    **Source**: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys
    2024, section 3.2, equations 4 and 5; 20 steps of alpha and the scales' middle at 1: its published code.
    """
    weights_OI = [weight.float() for weight in weights_OI]
    found = []
    for step in range(_ALPHAS):
        alpha = step / _ALPHAS
        scale_I = mean_abs_I.float().pow(alpha).clamp(min=1e-4)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        errors = [
            output_error(round_nearest(weight * scale_I, grid).weight_OI / scale_I, weight, gram_II)
            for weight in weights_OI
        ]
        found.append((sum(errors), alpha, scale_I))
    error, alpha, scale_I = min(found, key=lambda one: one[0])
    return Scaled(scale_I, alpha, error, found[0][0])


def awq_clipped(weight_OI: torch.Tensor, gram_II: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight with the largest numbers of each group cut off, as far as that makes its outputs' error smaller.

    Args:
        weight_OI: The weight.
        gram_II: The sum of the outer product of its input with itself.
        grid: What can be stored.

    **Source**: as `awq_scales`; that weights are clipped, and to what, is in its published code.
    """
    size = grid.columns or weight_OI.shape[1]
    weight_OGJ = weight_OI.unflatten(1, (-1, size))
    number_G = torch.arange(weight_OGJ.shape[1])
    gram_GJJ = gram_II.double().unflatten(0, (-1, size)).unflatten(2, (-1, size))[number_G, :, number_G, :]
    most_OG1 = weight_OGJ.abs().amax(2, keepdim=True)
    least_OG1 = torch.full_like(most_OG1, torch.inf, dtype=torch.float64)
    best_OGJ = weight_OGJ.clone()
    for step in range(int(_CLIP_MOST * _CLIPS)):
        limit_OG1 = most_OG1 * (1 - step / _CLIPS)
        cut_OGJ = weight_OGJ.clamp(-limit_OG1, limit_OG1)
        gap_OGJ = (
            round_nearest(cut_OGJ.flatten(1), grid).weight_OI.view_as(weight_OGJ) - weight_OGJ
        ).double()
        error_OG1 = torch.einsum("ogj,gjk,ogk->og", gap_OGJ, gram_GJJ, gap_OGJ)[..., None]
        is_better_OG1 = error_OG1 < least_OG1
        least_OG1 = torch.where(is_better_OG1, error_OG1, least_OG1)
        best_OGJ = torch.where(is_better_OG1, cut_OGJ, best_OGJ)
    return best_OGJ.flatten(1)


def smooth_scales(largest_I: torch.Tensor, weight_most_I: torch.Tensor, alpha: float) -> torch.Tensor:
    """By what to divide inputs, and to multiply weights, so that both can be rounded well.

    Args:
        largest_I: The largest input without the sign.
        weight_most_I: The largest weight of each input without the sign, over all layers that read it.
        alpha: How much of the inputs' range is moved into the weights.

    **Source**: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    ICML 2023, section 4, equation 4.
    """
    weight_most_I = weight_most_I.float().clamp(min=1e-5)
    scale_I = largest_I.float().pow(alpha) / weight_most_I.pow(1 - alpha)
    # An input that never was anything but zero says nothing of what it can be.
    return torch.where(largest_I.float() > 0, scale_I.clamp(min=1e-5), torch.ones_like(scale_I))


def magnitude(weight_OI: torch.Tensor, share: float, pattern: tuple[int, int] | None = None) -> torch.Tensor:
    """The smallest weights become zero: the share of the whole matrix, or so many of each few in a row.

    **Source**: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
    section 3.
    """
    size_OI = weight_OI.abs()
    if pattern is not None:
        return weight_OI.masked_fill(_least_of_each(size_OI, pattern), 0)
    return weight_OI.masked_fill(_least(size_OI.flatten()[None], share).view_as(size_OI), 0)


def wanda(
    weight_OI: torch.Tensor, squares_I: torch.Tensor, share: float, pattern: tuple[int, int] | None = None
) -> torch.Tensor:
    """In each row the weights become zero that, times the norm of their input, are smallest.

    Args:
        weight_OI: The weight.
        squares_I: The sum of the squares of the layer's input.
        share: How many become zero.
        pattern: (n, m): n of each m in a row do.

    **Source**: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, section 3,
    equation 1.
    """
    score_OI = weight_OI.abs().double() * squares_I.double().sqrt()
    gone_OI = _least(score_OI, share) if pattern is None else _least_of_each(score_OI, pattern)
    return weight_OI.masked_fill(gone_OI, 0)


def sparsegpt(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    share: float,
    pattern: tuple[int, int] | None = None,
    *,
    damping: float = 0.01,
) -> torch.Tensor:
    """Weights become zero input after input; those that follow make up for what each lost.

    What becomes zero is chosen for 128 inputs at a time, or with a pattern for each few: what costs the outputs least.

    Args:
        weight_OI: The weight, in float32.
        gram_II: The sum of the outer product of the layer's input with itself.
        share: How many become zero.
        pattern: (n, m): n of each m in a row do.
        damping: Added to the diagonal of `gram_II`, as a share of its mean.

    **Source**: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML
    2023, section 3, algorithm 1.
    """
    factor_II = _inverse_factor(gram_II, damping).to(weight_OI.dtype)
    left_OI, num_inputs, num_gone = weight_OI.clone(), weight_OI.shape[1], 0
    for start in range(0, num_inputs, _BLOCK):
        stop = min(start + _BLOCK, num_inputs)
        block_OC, errors_OC = left_OI[:, start:stop].clone(), left_OI.new_zeros(len(left_OI), stop - start)
        cost_C = factor_II.diagonal()[start:stop].square()
        gone_OC = torch.zeros_like(block_OC, dtype=torch.bool)
        if pattern is None:
            number = round(share * len(left_OI) * stop) - num_gone
            gone_OC = _first(block_OC.square() / cost_C, number)
            num_gone += number
        for c in range(stop - start):
            if pattern is not None and c % pattern[1] == 0:
                few = slice(c, c + pattern[1])
                gone_OC[:, few] = _least_of_each(block_OC[:, few].square() / cost_C[few], pattern)
            row_C = factor_II[start + c, start:stop]
            error_O = block_OC[:, c] * gone_OC[:, c] / row_C[c]
            block_OC[:, c:] -= error_O[:, None] * row_C[c:]
            errors_OC[:, c] = error_O
        left_OI[:, start:stop] = block_OC.masked_fill(gone_OC, 0)
        left_OI[:, stop:] -= errors_OC @ factor_II[start:stop, stop:]
    return left_OI


def check_pattern(weight_OI: torch.Tensor, pattern: tuple[int, int], name: str) -> None:
    """Refuse a layer whose inputs do not fall into groups of the pattern.

    Raises:
        UsageError: They do not.
    """
    if weight_OI.shape[1] % pattern[1]:
        raise UsageError(
            f"{name} has {weight_OI.shape[1]:,} inputs, which the pattern {pattern[0]}:{pattern[1]} does not divide",
            hint=f"keep: [{name.rpartition('.')[2]}], or pattern: free",
        )


def _least(score_RI: torch.Tensor, share: float) -> torch.Tensor:
    """Which are the least of each row: this share, to the nearest whole number; of equals those that stand first."""
    number = round(share * score_RI.shape[1])
    return torch.zeros_like(score_RI, dtype=torch.bool).scatter_(
        1, score_RI.argsort(dim=1, stable=True)[:, :number], True
    )


def _first(score_OC: torch.Tensor, number: int) -> torch.Tensor:
    """Which are the `number` least of all."""
    gone = torch.zeros(score_OC.numel(), dtype=torch.bool, device=score_OC.device)
    gone[score_OC.flatten().argsort(stable=True)[:number]] = True
    return gone.view_as(score_OC)


def _least_of_each(score_OI: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """Which are the n least of each m in a row."""
    zeros, few = pattern
    score_OGJ = score_OI.unflatten(1, (-1, few))
    least_OGn = score_OGJ.argsort(dim=2, stable=True)[..., :zeros]
    return torch.zeros_like(score_OGJ, dtype=torch.bool).scatter_(2, least_OGn, True).flatten(1)
