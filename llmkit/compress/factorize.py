"""Linear layers made products of two smaller ones, by the singular values of their weights or of what they compute.

Shape suffixes: O outputs, I inputs of a linear layer, K rank.

**Source**: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
ICLR 2025, section 3.1 (truncation-aware data whitening); the plain form: Eckart and Young, "The approximation of one
matrix by another of lower rank", Psychometrika 1, 1936.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmkit.compress.calibrate import Read, linear_layers, walk
from llmkit.compress.given import Given, Made
from llmkit.compress.structure import check_plain, weight_of
from llmkit.errors import UsageError
from llmkit.models.lowrank import low_rank_of, mark_low_rank, sizes_of
from llmkit.recipe.compression import Step

_RIDGE = 1e-6
"""Added to a Hessian's diagonal, as a share of its mean, so that inputs which are always zero do no harm."""


def rank_for(outputs: int, inputs: int, share: float) -> int:
    """The largest rank at which the two factors have at most 1 - share of a matrix' numbers."""
    return int((1 - share) * outputs * inputs / (outputs + inputs))


def factors(
    weight_OI: torch.Tensor, rank: int, hessian_II: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The product of rank `rank` that is nearest to a matrix: up [O, K], down [K, I], and the square of its distance.

    Args:
        weight_OI: The matrix.
        rank: K.
        hessian_II: The sum over positions of the outer product of the layer's input with itself: the distance is then
            that of the outputs on these positions, in place of that of the weights.
    """
    wide_OI = weight_OI.double()
    if hessian_II is None:
        left_OK, values_K, right_KI = torch.linalg.svd(wide_OI, full_matrices=False)
    else:
        vectors_II, root_I = _root(hessian_II.double())
        left_OK, values_K, right_KI = torch.linalg.svd(wide_OI @ vectors_II * root_I, full_matrices=False)
        right_KI = (right_KI / root_I) @ vectors_II.T  # right S^-1
    half_K = values_K[:rank].sqrt()
    up_OK, down_KI = left_OK[:, :rank] * half_K, half_K[:, None] * right_KI[:rank]
    return up_OK, down_KI, float(values_K[rank:].square().sum())


def _root(hessian_II: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal V and r [I] with S = V diag(r) and S S^T = H, the ridge included.

    By eigenvalues, for those of a Hessian of fewer positions than inputs are zero to rounding, some below it.
    """
    ridge = _RIDGE * float(hessian_II.diagonal().mean()) or _RIDGE
    values_I, vectors_II = torch.linalg.eigh(hessian_II)
    return vectors_II, (values_I.clamp(min=0) + ridge).sqrt()


def apply(given: Given, step: Step) -> Made:
    """Make linear layers products of two smaller ones.

    Args:
        given: The model, and what it learned from.
        step: How much of their parameters goes.

    Raises:
        UsageError: The model's weights are no plain numbers, or so much goes that nothing is left of a layer.
    """
    check_plain(given.model)
    model, share = given.model, step.share or 0
    layers = linear_layers(model, step.keep or ())
    before = model.num_parameters()
    ranks = {name: _rank_of(name, layer, share) for name, layer in layers.items()}
    errors: dict[str, float] = {}

    def treat(reads: Mapping[str, Read | None]) -> None:
        for name, read in reads.items():
            layer = model.get_submodule(name)
            weight_OI = weight_of(layer)
            gram_II = read.gram_II if read is not None else None
            up_OK, down_KI, lost = factors(weight_OI, ranks[name], gram_II)
            errors[name] = lost / max(_energy(weight_OI.double(), gram_II), 1e-30)
            bias: Any = layer.bias
            model.set_submodule(name, low_rank_of(up_OK, down_KI, bias).to(weight_OI.device))

    warnings: list[str] = []
    if step.by == "weights":
        treat(dict.fromkeys(layers))
    else:
        warnings = walk(given.core, given.batches, layers, treat)
    mark_low_rank(model)
    after = model.num_parameters()
    facts = {
        "by": "weights" if step.by == "weights" else "activation",
        "ranks": {name: ranks[name] for name in errors},
        "errors": errors,
        "num_parameters": after,
        "num_parameters_before": before,
        "share_of_parameters": 1 - after / before,
    }
    return Made(model, facts, warnings=warnings, standard=False)


def _rank_of(name: str, layer: nn.Module, share: float) -> int:
    inputs, outputs = sizes_of(layer)
    rank = rank_for(outputs, inputs, share)
    if rank < 1:
        most = 1 - (outputs + inputs) / (outputs * inputs)
        raise UsageError(
            f"factorize: share: {share:.3g} leaves nothing of {name} ({outputs} x {inputs})",
            hint=f"at most {100 * most:.3g}%, or leave it as it is: `keep: [{name}]`",
        )
    return rank


def _energy(weight_OI: torch.Tensor, gram_II: torch.Tensor | None) -> float:
    """The square of a matrix, or of what it makes of the inputs."""
    if gram_II is None:
        return float(weight_OI.square().sum())
    return float(torch.einsum("oi,ij,oj->", weight_OI, gram_II, weight_OI))
