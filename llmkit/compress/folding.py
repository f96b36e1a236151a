"""Scales that move from what layers read into their weights, so that the model computes the same.

The inputs of layers are divided by a factor per channel where they are made: in the weights of the norm before them, or
of the layer whose output is multiplied to what they read; their weights are multiplied by it. Which norms and layers
can take the factors in is not known by name: the model is watched while it runs, and a norm whose output goes anywhere
else, as into a residual stream, cannot.

Shape suffixes: B rows, T positions, O outputs, I inputs of a linear layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmkit.compress.calibrate import on_device
from llmkit.compress.structure import block_names
from llmkit.objectives.base import Batch, LossModule

_GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
"""Feed-forward layers in which the second's output is multiplied to the first's, and the third reads the product."""
_PROBE = 2.0
_CLOSE = 1e-5
_READS = frozenset(
    {"__get__", "size", "dim", "stride", "is_floating_point", "numel", "__len__", "is_contiguous"}
)


@dataclass(frozen=True)
class Fold:
    """Factors that can move.

    Attributes:
        source: The module whose weights are divided.
        layers: The linear layers that read what it gives, whose weights are multiplied.
        offset: What the source adds to its weights before they count: 1 in some norms.
    """

    source: str
    layers: tuple[str, ...]
    offset: float = 0.0


@dataclass
class _Watched:
    """Outputs of norms, and where they went.

    Attributes:
        outputs: Norm -> what it gave in the block at hand.
        readers: Norm -> the linear layers that read it.
        spoiled: Norms whose output went elsewhere, too.
        offsets: Norm -> the offset of its weights; norms that have none that is known are not in it.
        inside: How many modules that may read anything are running.
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)
    offsets: dict[str, float] = field(default_factory=dict)
    inside: int = 0

    def of(self, value: object) -> str | None:
        """The norm that gave this very tensor."""
        return next((name for name, one in self.outputs.items() if one is value), None)

    def gave(self, norm: nn.Module, args: tuple[Any, ...], output: Any, *, name: str) -> None:
        """A norm was called."""
        if name in self.outputs:  # used in several places
            self.spoiled.add(name)
            return
        self.inside += 1
        offset = _offset_of(norm, args, output) if isinstance(output, torch.Tensor) else None
        self.inside -= 1
        if offset is not None:
            self.outputs[name], self.offsets[name] = output, offset

    def begin(self, _: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        """A linear layer is called."""
        norm = self.of(args[0])
        if norm is not None:
            self.readers.setdefault(norm, []).append(name)
        self.inside += 1

    def end(self, *_: Any) -> None:
        """It is done."""
        self.inside -= 1


class _Watch(TorchFunctionMode):
    """Takes down what reads a norm's output besides the linear layers."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.watched.inside and getattr(func, "__name__", "") not in _READS and found is not None:
            for value in _tensors([*args, *(kwargs or {}).values()]):
                name = self.watched.of(value)
                if name is not None and found is not value:
                    self.watched.spoiled.add(name)
        return found


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@torch.no_grad()
def find_folds(core: LossModule, batch: Batch, layers: Mapping[str, nn.Module]) -> list[Fold]:
    """Where factors can move, of the inputs of these layers.

    Args:
        core: The model and what it learned, in evaluation mode.
        batch: What the model is watched on.
        layers: The linear layers that can take factors in, by name.
    """
    model, watched = core.model, _Watched()
    inside = tuple(f"{name}." for side in block_names(model) for name in side)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                if name in layers:
                    begin = partial(watched.begin, name=name)
                    stack.callback(module.register_forward_pre_hook(begin).remove)
                    stack.callback(module.register_forward_hook(watched.end).remove)
            elif name.startswith(inside) and _is_norm(module):
                stack.callback(module.register_forward_hook(partial(watched.gave, name=name)).remove)
        stack.enter_context(_Watch(watched))
        core.objective.loss(model, on_device(batch, model.device))
    norms = [
        Fold(name, tuple(readers), watched.offsets[name])
        for name, readers in watched.readers.items()
        if name not in watched.spoiled
    ]
    return norms + _gated(layers)


def _gated(layers: Mapping[str, nn.Module]) -> list[Fold]:
    """Feed-forward layers whose last reads a product with the output of another."""
    return [
        Fold(f"{place}{up}", (f"{place}{down}",))
        for gate, up, down in _GATED
        for place in (name.removesuffix(down) for name in layers if name.rpartition(".")[2] == down)
        if f"{place}{gate}" in layers and f"{place}{up}" in layers
    ]


def _is_norm(module: nn.Module) -> bool:
    """Whether it has a vector of weights, and perhaps one of biases, and nothing else."""
    own = dict(module.named_parameters())
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())


def _offset_of(norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> float | None:
    """What it adds to its weights: found by trying, as norms differ; None: it does something else with them."""
    weight: Any = norm.weight
    kept = {name: value.clone() for name, value in norm.named_parameters()}
    try:
        for offset in (0.0, 1.0):
            weight.copy_((kept["weight"] + offset) * _PROBE - offset)
            if "bias" in kept:
                norm.get_parameter("bias").copy_(kept["bias"] * _PROBE)
            again = norm.forward(*args)
            if torch.allclose(again, output * _PROBE, rtol=_CLOSE, atol=_CLOSE):
                return offset
    finally:
        for name, value in kept.items():
            norm.get_parameter(name).copy_(value)
    return None


@torch.no_grad()
def move(model: nn.Module, fold: Fold, scale_I: torch.Tensor, dtype: torch.dtype) -> None:
    """Divide what layers read by factors, and multiply their weights by them.

    Args:
        model: The model; it is changed.
        fold: Where.
        scale_I: The factors.
        dtype: The type that a norm's weights will be stored in: they are rounded to it.
    """
    source: Any = model.get_submodule(fold.source)
    factor_I = scale_I.to(source.weight.device, source.weight.dtype)
    if isinstance(source, nn.Linear):
        source.weight.div_(factor_I[:, None])
    else:
        exact_I = (source.weight + fold.offset) / factor_I - fold.offset
        source.weight.copy_(exact_I.to(dtype))
    if getattr(source, "bias", None) is not None:
        source.bias.copy_((source.bias / factor_I).to(dtype))
    for name in fold.layers:
        layer: Any = model.get_submodule(name)
        layer.weight.mul_(factor_I)
