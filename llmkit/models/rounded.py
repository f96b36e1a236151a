"""Linear layers that compute with rounded weights, while the weights themselves stay as fine as they are.

A layer's class changes and nothing else: its parameters, their names and its place in the model stay. So optimizers,
checkpoints and exports do not know of it, and what is exported are the fine weights.

Shape suffixes: O outputs, I inputs of a linear layer.

**Source**: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, section 3; gradients as if nothing were rounded: Bengio et al., "Estimating or Propagating
Gradients Through Stochastic Neurons for Conditional Computation", 2013, section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmkit.errors import UsageError
from llmkit.models.grid import Grid, group_size, round_inputs
from llmkit.models.layers import block_lists
from llmkit.models.names import matches, near_names
from llmkit.recipe.training import Rounded

_MOST_NAMED = 3


@dataclass(frozen=True)
class Rounding:
    """What a layer rounds.

    Attributes:
        grid: What its weights are rounded to; None: they are used as they are.
        inputs: Whether what it reads is rounded to 8 bits, each position with a scale of its own.
        float8: Whether those are floats.
    """

    grid: Grid | None
    inputs: bool = False
    float8: bool = False


class RoundedLinear(nn.Linear):
    """A linear layer that computes with its weights, or what it reads, rounded; gradients are as if nothing were."""

    rounding: Rounding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        weight_OI: torch.Tensor = self.weight
        if self.rounding.grid is not None:
            weight_OI = _straight(weight_OI, self.rounding.grid.nearest(weight_OI.detach()))
        if self.rounding.inputs:
            rounded = round_inputs(input.detach(), float8=self.rounding.float8)
            input = _straight(input, rounded)
        return F.linear(input, weight_OI, self.bias)


def _straight(fine: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The rounded numbers, to the bit, with the gradient of the fine ones."""
    return rounded.to(fine.dtype) + (fine - fine.detach())


def round_weights(model: PreTrainedModel, settings: Rounded) -> dict[str, Grid]:
    """Have the linear layers in the model's blocks compute with rounded weights, from now on and in place.

    Call it before the model is wrapped or compiled; parameters, their names and their values stay.

    Args:
        model: The model, plain.
        settings: The recipe's `train.quantized`.

    Returns:
        Name of each such layer -> what its weights are rounded to.

    Raises:
        UsageError: A layer cannot be rounded, or a pattern of `keep` means nothing.
    """
    layers = _layers(model, settings.keep or ())
    widths = {name: layer.in_features for name, layer in layers.items()}
    columns = group_size(widths, settings.bits, settings.group)
    grid = Grid(settings.bits, columns, settings.symmetric, settings.float8)
    for layer in layers.values():
        set_rounding(layer, Rounding(grid, settings.activations, settings.float8))
    return dict.fromkeys(layers, grid)


def set_rounding(layer: nn.Linear, rounding: Rounding) -> None:
    """Have one layer compute so from now on."""
    layer.__class__ = RoundedLinear
    layer.rounding = rounding  # type: ignore[assignment]


def plain(model: nn.Module) -> None:
    """Have all layers compute as they did, with the fine weights, in place."""
    for layer in model.modules():
        if isinstance(layer, RoundedLinear):
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            del layer.rounding


def roundings(model: nn.Module) -> dict[str, Rounding]:
    """Name of each layer that rounds -> what."""
    return {name: layer.rounding for name, layer in model.named_modules() if isinstance(layer, RoundedLinear)}


def _layers(model: PreTrainedModel, keep: Sequence[str]) -> dict[str, nn.Linear]:
    names = {module: name for name, module in model.named_modules()}
    inside = {
        names[module]: module
        for blocks in block_lists(model)
        for block in blocks
        for module in block.modules()
        if any(weight.ndim >= 2 for weight in module.parameters(recurse=False))
        and not isinstance(module, nn.Embedding)
    }
    for pattern in keep:
        if not any(_meant([pattern], name) for name in names.values()):
            raise UsageError(
                f"train.quantized.keep: {pattern!r} matches no layer",
                hint=f"near names: {', '.join(near_names(pattern, inside))}",
            )
    treated = {name: module for name, module in inside.items() if not _meant(keep, name)}
    check_linear(treated)
    if not treated:
        raise UsageError(
            f"{model.config.model_type}: no linear layer is left to be rounded",
            hint="fewer patterns in `keep`",
        )
    return {name: module for name, module in treated.items() if isinstance(module, nn.Linear)}


def _meant(patterns: Sequence[str], name: str) -> bool:
    return any(matches(pattern, f"{name}.weight") for pattern in patterns)


def check_linear(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that cannot be rounded, by name.

    Raises:
        UsageError: There are some.
    """
    others = {n: type(m).__name__ for n, m in layers.items() if type(m) not in (nn.Linear, RoundedLinear)}
    if others:
        first = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:_MOST_NAMED])
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        kinds = sorted({name.rpartition(".")[2] for name in others})
        raise UsageError(
            f"{first}{more}: no plain linear layer, and few bits can be stored of those alone",
            hint=f"leave these as they are: keep: {kinds}; or export: --method 'export to=gguf type=q8_0'",
        )
