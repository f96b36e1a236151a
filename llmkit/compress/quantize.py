"""Weights in few bits: what they are rounded to, how, and where they are stored.

What is not quantised (embeddings, norms, biases, the output layer) is stored in 16 bits. The model that is made
computes what the files say, to the bit, in float32.

Shape suffixes: O outputs, I inputs of a linear layer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkit.compress.calibrate import Read, check_any, linear_layers, reads_of, walk
from llmkit.compress.folding import Fold, find_folds, move
from llmkit.compress.given import Given, Made
from llmkit.compress.mixed import assigned, sensitivities
from llmkit.compress.packed import Stored, takes_packed, write_packed
from llmkit.compress.solvers import (
    Rounded,
    awq_clipped,
    awq_scales,
    gptq,
    output_error,
    round_nearest,
    smooth_scales,
)
from llmkit.compress.structure import check_plain
from llmkit.errors import UsageError
from llmkit.models.grid import Grid, group_size
from llmkit.models.rounded import Rounding, check_linear, set_rounding
from llmkit.models.unpacked import check_package, is_packed
from llmkit.recipe.compression import Step

_FEW, _MANY = 4, 8
_MIXED_BITS = 5.0
_WITH_INPUTS = ("w8a8", "fp8")
_MATCHED = ("q_proj", "k_proj", "query", "key", "q", "k", "q_lin", "k_lin", "Wqkv")
"""Layers whose outputs are multiplied with each other: AWQ's clipping harms them."""
_DAMPING = 0.01
_MOST_NAMED = 3


def apply(given: Given, step: Step) -> Made:
    """Store the weights of linear layers in few bits.

    Args:
        given: The model, and what it learned from; the model is changed.
        step: The format, the solver and their settings.

    Raises:
        UsageError: The model is quantised already, a layer cannot be, or a setting does not fit another.
        MissingError: The package that knows the format is not installed.
    """
    check_plain(given.model)
    _check(given, step)
    check_package()
    layers = _linear(given, step.keep or ())
    packs = _packs(given, step, layers)
    work = _Work(given, step, layers, _grids(given, step, layers), _rest_type(given.place), packs)
    if step.format == "w8a8" and step.smooth:
        work.smooth(step.smooth)
    work.store_rest()
    work.solve()
    return work.made()


def solver_of(step: Step) -> str:
    """How weights are rounded, where the step leaves it open."""
    if step.solver in (None, "auto"):
        return "rtn" if step.format in (None, "int8", "fp8") else "gptq"
    return str(step.solver)


def _check(given: Given, step: Step) -> None:
    """Refuse what can be known at once."""
    config = given.place / "config.json"
    if config.is_file() and is_packed(json.loads(config.read_bytes())):
        raise UsageError(
            f"{given.place}: the weights are stored in few bits already",
            hint="quantise the model that it was made from",
        )
    symmetric, solver = step.symmetric is not False, solver_of(step)
    if not symmetric and step.format in ("int4", "mixed"):
        raise UsageError(
            f"quantize: symmetric: false with format: {step.format}: transformers cannot load packed weights whose "
            "scales have an offset",
            hint="leave `symmetric` out, or format: int8",
        )
    if not symmetric and step.format == "fp8":
        raise UsageError("quantize: floats have no offset", hint="leave `symmetric` out")
    if solver == "awq" and step.format not in (None, "int8", "int4"):
        raise UsageError(
            f"quantize: solver: awq does not go with format: {step.format}",
            hint="solver: gptq, or format: int4",
        )
    if step.format == "fp8" and solver != "rtn":
        raise UsageError(f"quantize: solver: {solver} does not go with format: fp8", hint="solver: rtn")


def _linear(given: Given, keep: Sequence[str]) -> dict[str, nn.Linear]:
    found = linear_layers(given.model, keep)
    check_linear(found)
    stacks = [
        name
        for name, module in given.model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and any(weight.ndim > 2 for weight in module.parameters(recurse=False))
    ]
    if stacks:  # kept or not: what it makes of their names on loading goes wrong in a quantised model
        raise UsageError(
            f"{stacks[0]} ({type(given.model.get_submodule(stacks[0])).__name__}): transformers fails to load the "
            "weights of experts beside quantised ones",
            hint="make it smaller another way: --method 'export to=bf16', or prune",
        )
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


def _packs(given: Given, step: Step, layers: Mapping[str, nn.Linear]) -> bool:
    """Whether several weights are stored in one number: 8 bits can do without, fewer cannot."""
    packs = takes_packed(given.model, layers)
    if not packs and step.format in ("int4", "mixed"):
        raise UsageError(
            f"quantize: format: {step.format}: {given.model.config.model_type} with weights of fewer than 8 bits is "
            "written well, but transformers fails to load it",
            hint="format: int8",
        )
    return packs


def _grids(given: Given, step: Step, layers: Mapping[str, nn.Linear]) -> dict[str, Grid]:
    """What the weights of each layer are rounded to."""
    widths = {name: layer.in_features for name, layer in layers.items()}
    symmetric, group = step.symmetric is not False, step.group or "auto"
    if step.format == "mixed":
        few = Grid(_FEW, group_size(widths, _FEW, group))
        many = Grid(_MANY, group_size(widths, _MANY, group))
        given.told("measuring how much each layer loses")
        units = sensitivities(given.core, given.batches, layers, (few, many))
        found = assigned(units, few, many, step.bits or _MIXED_BITS)
        return {name: found.get(name, many) for name in layers}
    bits = _FEW if step.format == "int4" else _MANY
    grid = Grid(bits, group_size(widths, bits, group), symmetric, step.format == "fp8")
    return dict.fromkeys(layers, grid)


def _rest_type(place: Path) -> torch.dtype:
    """The 16 bits in which the rest is stored: float16 where the model was, else bfloat16."""
    config = place / "config.json"
    known = json.loads(config.read_bytes()) if config.is_file() else {}
    return torch.float16 if (known.get("dtype") or known.get("torch_dtype")) == "float16" else torch.bfloat16


@dataclass(frozen=True)
class _Fitted:
    """A grid whose scales are fitted already.

    Attributes:
        grid: The grid.
        scale_OG: Its scales.
        zero_OG: Their zero points, if there are some.
    """

    grid: Grid
    scale_OG: torch.Tensor
    zero_OG: torch.Tensor | None

    @classmethod
    def to(cls, weight_OI: torch.Tensor, gram_II: torch.Tensor, grid: Grid) -> "_Fitted":
        """With few bits, fitted to the weight without its largest numbers, as far as that makes the error smaller."""
        if grid.bits == _FEW:
            weight_OI = awq_clipped(weight_OI, gram_II, grid)
        return cls(grid, *grid.fit(weight_OI))

    @property
    def columns(self) -> int | None:
        """Inputs in a line that share a scale."""
        return self.grid.columns

    def fit(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scales."""
        return self.scale_OG, self.zero_OG

    def rounded(
        self, weight_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None
    ) -> torch.Tensor:
        """As the grid has it."""
        return self.grid.rounded(weight_OI, scale_OG, zero_OG)


@dataclass
class _Work:
    """A model while it is being quantised.

    Attributes:
        given: The model.
        step: What is asked.
        layers: The linear layers, by name.
        grids: What each is rounded to.
        dtype: The type in which the rest is stored.
        packs: Whether several weights are stored in one number.
        stored: What was rounded so far.
        errors: How much of a layer's output changed, as a share of it, where that was measured.
        warnings: What a person should know.
    """

    given: Given
    step: Step
    layers: Mapping[str, nn.Linear]
    grids: Mapping[str, Grid]
    dtype: torch.dtype
    packs: bool
    stored: dict[str, Stored] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    smoothed: int = 0

    @torch.no_grad()
    def smooth(self, alpha: float) -> None:
        """Move what is hard to round in what layers read into their weights."""
        check_any(self.given.batches)
        folds = find_folds(self.given.core, self.given.batches[0], self.layers)
        reads = reads_of(self.given.core, self.given.batches, self.layers, gram=False)
        for fold in folds:
            known = [name for name in fold.layers if name in reads and reads[name].count]
            if known:
                most_I = torch.stack([self.layers[name].weight.abs().amax(0) for name in fold.layers]).amax(0)
                largest_I = reads[known[0]].largest_I.to(most_I.device)
                move(self.given.model, fold, smooth_scales(largest_I, most_I, alpha), self.dtype)
        self._note_folds(folds, "smoothed")

    def _note_folds(self, folds: Sequence[Fold], word: str) -> None:
        moved = {name for fold in folds for name in fold.layers}
        left = [name for name in self.layers if name not in moved]
        self.smoothed = len(moved)
        if left:
            kinds = sorted({name.rpartition(".")[2] for name in left})
            self.warnings.append(
                f"{len(left)} of {len(self.layers)} linear layers could not be {word}: no norm or layer before them "
                f"can take the factors in ({', '.join(kinds)})"
            )

    @torch.no_grad()
    def store_rest(self) -> None:
        """Round what is not quantised to the type that it will be stored in."""
        weights = {id(layer.weight) for layer in self.layers.values()}
        for parameter in self.given.model.parameters():
            if id(parameter) not in weights:
                parameter.copy_(parameter.to(self.dtype))

    @torch.no_grad()
    def solve(self) -> None:
        """Round all layers."""
        solver = solver_of(self.step)
        if solver == "rtn":
            for name in self.layers:
                self._keep(name, round_nearest(self.layers[name].weight.detach(), self.grids[name]))
            return
        check_any(self.given.batches)
        folds: list[Fold] = []
        if solver == "awq":
            folds = find_folds(self.given.core, self.given.batches[0], self.layers)
            self._note_folds(folds, "scaled")
        treat = partial(self._awq, folds) if solver == "awq" else self._gptq
        self.warnings += walk(self.given.core, self.given.batches, self.layers, treat)
        for name in self.layers.keys() - self.stored.keys():  # nothing of what was looked at reached them
            self._keep(name, round_nearest(self.layers[name].weight.detach(), self.grids[name]))

    def _gptq(self, reads: Mapping[str, Read]) -> None:
        for name, read in reads.items():
            weight_OI = self.layers[name].weight.detach()
            gram_II = read.gram_II.to(weight_OI.device)
            fitted = _Fitted.to(weight_OI, gram_II, self.grids[name])
            damping = self.step.damping or _DAMPING
            rounded = gptq(weight_OI, gram_II, fitted, damping=damping, act_order=True)
            self._measure(name, rounded, gram_II)
            self._keep(name, rounded)
        self.given.told(f"rounded: {', '.join(reads)}")

    def _awq(self, folds: Sequence[Fold], reads: Mapping[str, Read]) -> None:
        grams = {name: read.gram_II.to(self.layers[name].weight.device) for name, read in reads.items()}
        for fold in folds:
            if not all(name in reads for name in fold.layers):
                continue
            first = reads[fold.layers[0]]
            mean_I = (first.abs_I / first.count).to(grams[fold.layers[0]].device)
            weights_OI = [self.layers[name].weight.detach() for name in fold.layers]
            scale_I = awq_scales(
                weights_OI, mean_I, grams[fold.layers[0]], self.grids[fold.layers[0]]
            ).scale_I
            move(self.given.model, fold, scale_I, self.dtype)
            for name in fold.layers:
                grams[name] = grams[name] / scale_I[:, None] / scale_I
        for name, gram_II in grams.items():
            weight_OI, grid = self.layers[name].weight.detach(), self.grids[name]
            clips = name.rpartition(".")[2] not in _MATCHED
            clipped_OI = awq_clipped(weight_OI, gram_II, grid) if clips else weight_OI
            rounded = round_nearest(clipped_OI, grid)
            self._measure(name, rounded, gram_II)
            self._keep(name, rounded)
        self.given.told(f"rounded: {', '.join(reads)}")

    def _measure(self, name: str, rounded: Rounded, gram_II: torch.Tensor) -> None:
        weight_OI = self.layers[name].weight.detach()
        whole = output_error(torch.zeros_like(weight_OI), weight_OI, gram_II)
        self.errors[name] = output_error(rounded.weight_OI, weight_OI, gram_II) / whole if whole else 0.0

    def _keep(self, name: str, rounded: Rounded) -> None:
        """Have the layer compute what is stored."""
        layer, grid = self.layers[name], self.grids[name]
        layer.weight.copy_(rounded.weight_OI)
        self.stored[name] = Stored(grid, rounded)
        if self.step.format in _WITH_INPUTS:
            set_rounding(layer, Rounding(None, inputs=True, float8=grid.float8))

    def made(self) -> Made:
        """What is handed back."""
        stored = {name: self.stored[name] for name in self.layers}
        write = partial(
            write_packed,
            model=self.given.model,
            layers=stored,
            inputs=self.step.format in _WITH_INPUTS,
            dtype=self.dtype,
            packs=self.packs,
        )
        return Made(self.given.model, self._facts(), write, self.warnings)

    def _facts(self) -> dict[str, Any]:
        sizes = {name: layer.weight.numel() for name, layer in self.layers.items()}
        total = sum(sizes.values())
        few = {name for name, grid in self.grids.items() if grid.bits == _FEW}
        columns = {grid.columns for grid in self.grids.values() if grid.bits == _FEW or not few}
        return {
            "format": self.step.format or "int8",
            "solver": solver_of(self.step),
            "group": columns.pop() or "row",
            "symmetric": self.step.symmetric is not False,
            "num_layers": len(self.layers),
            "num_weights": total,
            "bits": sum(sizes[name] * grid.bits for name, grid in self.grids.items()) / total,
            "rest": str(self.dtype).removeprefix("torch."),
            **({"few_bits": sorted(few)} if self.step.format == "mixed" else {}),
            **({"scaled_layers": self.smoothed} if self.smoothed else {}),
            **({"kept": list(self.step.keep)} if self.step.keep else {}),
            **({"errors": dict(self.errors)} if self.errors else {}),
        }
