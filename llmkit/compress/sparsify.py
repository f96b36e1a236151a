"""Pruning of single weights: they become zero, and the model stays as large as it was.

Shape suffixes: O outputs, I inputs of a linear layer.

**Source**: see `solvers`: `magnitude`, `wanda`, `sparsegpt`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from llmkit.compress.calibrate import Read, linear_layers, walk
from llmkit.compress.given import Given, Made
from llmkit.compress.solvers import check_pattern, magnitude, output_error, sparsegpt, wanda
from llmkit.compress.structure import Linear, check_plain, weight_of
from llmkit.errors import UsageError
from llmkit.recipe.compression import Step

_PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
_HALF = 0.5


def apply(given: Given, step: Step) -> Made:
    """Set the weights to zero that matter least.

    What is zero already counts to the share, and stays zero with `magnitude` and `wanda`.

    Args:
        given: The model, and what it learned from; the model is changed.
        step: How many weights, and how they are chosen.

    Raises:
        UsageError: The model is quantised, a setting does not fit another, or a layer does not fit the pattern.
    """
    check_plain(given.model)
    by, share = "sparsegpt" if step.by in (None, "auto") else str(step.by), float(step.share or 0)
    pattern = _PATTERNS.get(step.pattern or "free")
    _check(step, by, share)
    layers = linear_layers(given.model, step.keep or ())
    if pattern is not None:
        for name, layer in layers.items():
            check_pattern(weight_of(layer), pattern, name)
    lost: dict[str, float] = {}
    warnings: list[str] = []
    if by == "magnitude":
        _by_magnitude(layers, share, pattern, everywhere=step.scope == "global")
    else:
        warnings = _by_inputs(given, layers, share, pattern, by=by, damping=step.damping or 0.01, lost=lost)
    facts = {
        "what": "weights",
        "by": by,
        "pattern": step.pattern or "free",
        **({"scope": step.scope or "layer"} if by == "magnitude" else {}),
        **_shares(layers),
        **({"errors": lost} if lost else {}),
    }
    given.told(f"{facts['num_zeros']:,} of {facts['num_weights']:,} weights are zero ({facts['share']:.2%})")
    return Made(given.model, facts, warnings=warnings)


def _check(step: Step, by: str, share: float) -> None:
    if (step.pattern or "free") != "free" and share != _HALF:
        raise UsageError(
            f"prune: share: {share:.3g}, and with the pattern {step.pattern} half of the weights become zero",
            hint="share: 50%, or pattern: free",
        )
    if step.scope == "global" and (by != "magnitude" or (step.pattern or "free") != "free"):
        other = f"by: {by}" if by != "magnitude" else f"pattern: {step.pattern}"
        raise UsageError(
            f"prune: scope: global does not go with {other}: sizes in one layer say nothing of those in another",
            hint="scope: layer, or by: magnitude and pattern: free",
        )


@torch.no_grad()
def _by_magnitude(
    layers: Mapping[str, Linear], share: float, pattern: tuple[int, int] | None, *, everywhere: bool
) -> None:
    weights = [weight_of(layer) for layer in layers.values()]
    if not everywhere:
        for weight_OI in weights:
            weight_OI.copy_(magnitude(weight_OI, share, pattern))
        return
    line = magnitude(torch.cat([weight_OI.flatten() for weight_OI in weights])[None], share)[0]
    for weight_OI, part in zip(weights, line.split([w.numel() for w in weights]), strict=True):
        weight_OI.copy_(part.view_as(weight_OI))


def _by_inputs(
    given: Given,
    layers: Mapping[str, Linear],
    share: float,
    pattern: tuple[int, int] | None,
    *,
    by: str,
    damping: float,
    lost: dict[str, float],
) -> list[str]:
    """Block after block, by what each layer reads; `lost` takes how much of each layer's output is lost."""

    def treat(reads: Mapping[str, Read]) -> None:
        for name, read in reads.items():
            weight_OI = weight_of(layers[name])
            gram_II, before_OI = read.gram_II.to(weight_OI.device), weight_OI.clone()
            if by == "wanda":
                weight_OI.copy_(wanda(before_OI, read.squares_I.to(weight_OI.device), share, pattern))
            else:
                weight_OI.copy_(sparsegpt(before_OI, gram_II, share, pattern, damping=damping))
            whole = output_error(torch.zeros_like(before_OI), before_OI, gram_II)
            lost[name] = output_error(weight_OI, before_OI, gram_II) / whole if whole else 0.0
        given.told(f"pruned: {', '.join(reads)}")

    warnings = walk(given.core, given.batches, layers, treat)
    short = [line for line in warnings if "inputs" in line]
    return [line for line in warnings if by != "wanda" or line not in short]


def _shares(layers: Mapping[str, Linear]) -> dict[str, Any]:
    """How many of the weights are zero, per layer and in all."""
    zeros = {name: int((weight_of(layer) == 0).sum()) for name, layer in layers.items()}
    sizes = {name: weight_of(layer).numel() for name, layer in layers.items()}
    total, num_zeros = sum(sizes.values()), sum(zeros.values())
    return {
        "share": num_zeros / total,
        "num_zeros": num_zeros,
        "num_weights": total,
        "layers": {name: zeros[name] / sizes[name] for name in layers},
    }
