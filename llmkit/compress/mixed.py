"""Which layers get 4 bits and which 8, by how much each loses.

Shape suffixes: N positions, O outputs, I inputs of a linear layer.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from llmkit.compress.calibrate import check_any, on_device
from llmkit.errors import UsageError
from llmkit.models.grid import Grid
from llmkit.objectives.base import Batch, LossModule


@dataclass
class Unit:
    """Layers that read the same, and so get the same bits: other runtimes compute them as one.

    Attributes:
        layers: Their names.
        num_weights: How many weights they have in all.
        loss: By how much the loss grows, for each grid: an estimate, in nats over all that was looked at.
    """

    layers: list[str] = field(default_factory=list)
    num_weights: int = 0
    loss: dict[Grid, float] = field(default_factory=dict)


@dataclass
class _Felt:
    """Collects how much each unit loses."""

    changes: Mapping[str, Mapping[Grid, torch.Tensor]]
    units: list[Unit] = field(default_factory=list)
    _unit_of: dict[str, Unit] = field(default_factory=dict)
    _last: tuple[torch.Tensor, Unit] | None = None

    def ran(
        self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor, *, name: str
    ) -> torch.Tensor:
        """A layer gave its output; its gradient will say how much a change of it costs."""
        states: torch.Tensor = args[0]
        unit = self._unit(name, states, layer)
        states_NI = states.detach().reshape(-1, states.shape[-1])
        # An output that nothing that is learned went into is where the gradients begin.
        felt = output if output.requires_grad else output.detach().requires_grad_()

        def add(gradient: torch.Tensor) -> None:
            gradient_NO = gradient.reshape(-1, gradient.shape[-1])
            for grid, change_OI in self.changes[name].items():
                by_first_order_N = ((states_NI @ change_OI.T) * gradient_NO).sum(1)
                unit.loss[grid] += float(by_first_order_N.double().square().sum()) / 2

        felt.register_hook(add)
        return felt

    def _unit(self, name: str, states: torch.Tensor, layer: nn.Module) -> Unit:
        if name not in self._unit_of:
            if self._last is None or self._last[0] is not states:
                self._last = states, Unit(loss=dict.fromkeys(self.changes[name], 0.0))
                self.units.append(self._last[1])
            unit = self._last[1]
            unit.layers.append(name)
            unit.num_weights += layer.weight.numel()  # type: ignore[operator]
            self._unit_of[name] = unit
        return self._unit_of[name]


def sensitivities(
    core: LossModule, batches: Sequence[Batch], layers: Mapping[str, nn.Linear], grids: Sequence[Grid]
) -> list[Unit]:
    """How much the loss grows when only the layers of one unit are rounded, for each unit and grid.

    That is half the sum over positions of the square of what the change of the layer's output changes the loss by to
    first order. Its gradient was computed in one backward pass, so all layers together cost little more than one.

    Args:
        core: The model and what it learned, in evaluation mode.
        batches: What it learned from.
        layers: The linear layers.
        grids: What their weights may be rounded to.

    **Source**: the square of the gradient as the curvature: LeCun et al., "Optimal Brain Damage", NeurIPS 1989,
    section 2; bits by it: Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", ICCV
    2019, section 3.
    """
    check_any(batches)
    changes = {
        name: {grid: grid.nearest(layer.weight.detach()) - layer.weight.detach() for grid in grids}
        for name, layer in layers.items()
    }
    felt, flags = _Felt(changes), {p: p.requires_grad for p in core.model.parameters()}
    core.model.requires_grad_(False)
    try:
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(partial(felt.ran, name=name)).remove)
            for batch in batches:
                with torch.enable_grad():
                    core.objective.loss(core.model, on_device(batch, core.model.device)).total.backward()
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return felt.units


def assigned(units: Sequence[Unit], few: Grid, many: Grid, bits: float) -> dict[str, Grid]:
    """What each layer is rounded to, so that all together lose least and have so many bits in the mean.

    Units get few bits in the order of what a bit saved costs; then those that still fit get many again, those that
    lose most first. That is the knapsack's usual approximation: at most one unit from the best.

    Args:
        units: What each loses.
        few: The grid of few bits.
        many: That of many.
        bits: The mean over all weights that may not be exceeded.

    Raises:
        UsageError: So few bits are not to be had.
    """
    total = sum(unit.num_weights for unit in units)
    if bits < few.bits:
        raise UsageError(f"bits: {bits:g} are fewer than {few.bits}", hint=f"bits: {few.bits}, or more")

    def cost(unit: Unit) -> float:
        return (unit.loss[few] - unit.loss[many]) / unit.num_weights

    saved, wanted = 0, (many.bits - bits) * total
    chosen: list[Unit] = []
    for unit in sorted(units, key=cost):
        if saved >= wanted:
            break
        chosen.append(unit)
        saved += (many.bits - few.bits) * unit.num_weights
    for unit in sorted(chosen, key=cost, reverse=True):
        weight = (many.bits - few.bits) * unit.num_weights
        if saved - weight >= wanted:
            chosen.remove(unit)
            saved -= weight
    rounded = {name for unit in chosen for name in unit.layers}
    return {name: few if name in rounded else many for unit in units for name in unit.layers}
