"""What the linear layers of a model read of what it learned from, block by block.

Each block is shown what the blocks before it give by then, so what was done to those is in it already. Where a block
reads what the one before it gives, and nothing else that a block makes, the model runs once, to learn what its blocks
are called with, and each block then runs by itself; else the model runs as a whole for each block. Both give the same.

Shape suffixes: B rows, T positions, H hidden size, O outputs, I inputs of a linear layer, N positions that are read.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.compress.calls import Call, Side, blocks_by_name, check_any, on_device
from llmkit.compress.structure import Linear
from llmkit.errors import UsageError
from llmkit.models.names import matches, near_names
from llmkit.objectives.base import Batch, LossModule

_MOST_NAMED = 3

__all__ = ["Read", "Treat", "check_any", "linear_layers", "on_device", "reads_of", "walk"]


def linear_layers(model: PreTrainedModel, keep: Sequence[str] = ()) -> dict[str, Linear]:
    """The linear layers in the model's blocks that may be treated, by name, from the input to the output.

    What is outside the blocks is none of them: embeddings, the output layer, tied or not, poolers and task heads.

    Args:
        model: The model.
        keep: Patterns of names, as in `train.optim.groups`; what they mean stays as it is.

    Raises:
        UsageError: A pattern means nothing; there are matrices of other layers, and no pattern means those; nothing is
            left.
    """
    inside = [
        (f"{name}.{inner}", module)
        for side in blocks_by_name(model)
        for name in side
        for inner, module in model.get_submodule(name).named_modules()
        if inner
    ]
    known: dict[str, Linear] = {name: layer for name, layer in inside if isinstance(layer, Linear)}
    others = {name: type(layer).__name__ for name, layer in inside if _is_other(layer)}
    _check_keep(keep, [*known, *others], [name for name, _ in model.named_modules()])
    named = {name: kind for name, kind in others.items() if not _meant(keep, name)}
    if named:
        first = ", ".join(f"{name} ({kind})" for name, kind in list(named.items())[:_MOST_NAMED])
        raise UsageError(
            f"{first}{' and others' if len(named) > _MOST_NAMED else ''}: no linear layer, so it cannot be treated",
            hint=f"to treat the others, and leave these: keep: {sorted({n.rpartition('.')[2] for n in named})}",
        )
    left = {name: layer for name, layer in known.items() if not _meant(keep, name)}
    if not left:
        raise UsageError(
            f"{model.config.model_type}: no linear layer is left to be treated",
            hint="fewer patterns in `keep`" if known else "it has none in its blocks",
        )
    return left


def _is_other(module: nn.Module) -> bool:
    """Whether it holds matrices itself, and is neither a linear layer nor a table that is looked up."""
    if isinstance(module, Linear | nn.Embedding):
        return False
    return any(weight.ndim >= 2 for weight in module.parameters(recurse=False))


def _check_keep(patterns: Sequence[str], names: Sequence[str], all_names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_meant([pattern], name) for name in {*names, *all_names} if name):
            raise UsageError(
                f"compress.steps: keep: {pattern!r} matches no layer",
                hint=f"near names: {', '.join(near_names(pattern, names))}",
            )


def _meant(patterns: Sequence[str], name: str) -> bool:
    return any(matches(pattern, f"{name}.weight") for pattern in patterns)


@dataclass
class Read:
    """What a linear layer was given, at the positions that are read.

    Attributes:
        gram_II: The sum of the outer product of its input with itself; empty where that was not asked for.
        sum_I: The sum of its input.
        abs_I: The sum of its input without the sign.
        squares_I: The sum of the squares of its input.
        largest_I: The largest of its input without the sign.
        sample_NI: Some positions, evenly spaced over all: as many as were asked for, or up to twice that.
        count: How many positions.
    """

    gram_II: torch.Tensor
    sum_I: torch.Tensor
    abs_I: torch.Tensor
    squares_I: torch.Tensor
    largest_I: torch.Tensor
    sample_NI: torch.Tensor
    count: int = 0
    _stride: int = 1

    @classmethod
    def nothing(cls, width: int, *, gram: bool) -> "Read":
        """Of no position yet."""
        zero_I = torch.zeros(width, dtype=torch.float64)
        side = width if gram else 0
        return cls(
            torch.zeros(side, side, dtype=torch.float64),
            zero_I,
            zero_I.clone(),
            zero_I.clone(),
            torch.zeros(width),
            torch.zeros(0, width),
        )

    def add(self, more: "Read", states_NI: torch.Tensor, sample: int) -> None:
        """Take positions in.

        Args:
            more: What is to be added of them.
            states_NI: The positions.
            sample: How many of all are to be kept at least.
        """
        for name in ("gram_II", "sum_I", "abs_I", "squares_I"):
            getattr(self, name).add_(getattr(more, name))
        self.largest_I = torch.maximum(self.largest_I, more.largest_I)
        if sample:
            first = -self.count % self._stride
            self.sample_NI = torch.cat([self.sample_NI, states_NI[first :: self._stride].cpu()])
            while len(self.sample_NI) >= 2 * sample:
                self.sample_NI, self._stride = self.sample_NI[::2].clone(), 2 * self._stride
        self.count += more.count


def _read_of(states_NI: torch.Tensor, *, gram: bool) -> Read:
    """What is added of these positions; sums over them in float32, those over all in float64."""
    size_NI = states_NI.abs()
    square_II = states_NI.T @ states_NI if gram else states_NI.new_zeros(0, 0)
    largest_I = size_NI.amax(0) if len(states_NI) else size_NI.new_zeros(states_NI.shape[1])
    return Read(
        square_II.double().cpu(),
        states_NI.sum(0).double().cpu(),
        size_NI.sum(0).double().cpu(),
        states_NI.square().sum(0).double().cpu(),
        largest_I.cpu(),
        states_NI[:0].cpu(),
        len(states_NI),
    )


@dataclass
class _Ear:
    """Listens to linear layers.

    Attributes:
        gram: Whether the products of their inputs are wanted.
        sample: How many positions are.
        call: The call of the block that they are in.
        reads: What each was given so far.
    """

    gram: bool
    sample: int
    call: Call | None = None
    reads: dict[str, Read] = field(default_factory=dict)
    _last: tuple[torch.Tensor, torch.Tensor, Read] | None = None

    def hear(self, _: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        """A layer is called. Layers that are given the same are measured once."""
        assert self.call is not None
        states: torch.Tensor = args[0]
        if self._last is None or self._last[0] is not states:
            states_NI = self.call.positions(states)
            self._last = states, states_NI, _read_of(states_NI, gram=self.gram)
        states_NI, more = self._last[1:]
        if name not in self.reads:
            self.reads[name] = Read.nothing(states.shape[-1], gram=self.gram)
        self.reads[name].add(more, states_NI, self.sample)

    def begin(self, call: Call) -> None:
        """The block is called anew."""
        self.call, self._last = call, None


Treat = Callable[[Mapping[str, Read]], None]


@torch.no_grad()
def walk(
    core: LossModule,
    batches: Sequence[Batch],
    layers: Sequence[str] | Mapping[str, nn.Module],
    treat: Treat,
    *,
    gram: bool = True,
    sample: int = 0,
    whole: bool = False,
) -> list[str]:
    """Show each block what it reads, in order, and let it be treated.

    Args:
        core: The model and what it learned, in evaluation mode.
        batches: What it learned from, from the objective's `collate`.
        layers: The full names of the linear layers that are looked at.
        treat: Called for each block that has any of them, with what they read by name; it may change the block, and
            blocks that follow read what the changed one gives. A layer that no position reached is not among them.
        gram: Whether the products of inputs are wanted.
        sample: How many positions are.
        whole: Run the model as a whole for each block even where its blocks could run by themselves.

    Returns:
        What a person should know: layers that were given too little.

    Raises:
        UsageError: There is nothing to look at, or no position of it is read.
    """
    sides, warnings = blocks_by_name(core.model), _Shortage()
    check_any(batches)
    for number in range(len(sides)):
        side = Side(core, batches, number)
        side.learn_calls()
        one_by_one = side.is_chain and not whole
        for name in side.names:
            own = [layer for layer in layers if layer.startswith(f"{name}.")]
            ear = _Ear(gram, sample)
            if own:
                _listen(core.model, ear, own, side, name, one_by_one=one_by_one)
                warnings.note(own, ear.reads, gram=gram)
                treat({layer: ear.reads[layer] for layer in own if _reached(ear.reads, layer)})
            if one_by_one:
                side.states = _advanced(core.model.get_submodule(name), side.states, side.calls[name])
    return warnings.lines()


def _listen(
    model: PreTrainedModel, ear: _Ear, layers: Sequence[str], side: Side, block: str, *, one_by_one: bool
) -> None:
    with ExitStack() as stack:
        for layer in layers:
            hook = model.get_submodule(layer).register_forward_pre_hook(partial(ear.hear, name=layer))
            stack.callback(hook.remove)
        if one_by_one:
            for states, call in zip(side.states, side.calls[block], strict=True):
                ear.begin(call)
                model.get_submodule(block)(states, *call.args, **call.given)
            return

        def told(name: str, _: torch.Tensor, call: Call) -> None:
            if name == block:
                ear.begin(call)

        side.run(told)


def _advanced(block: nn.Module, states: Sequence[torch.Tensor], calls: Sequence[Call]) -> list[torch.Tensor]:
    outputs = [block(one, *call.args, **call.given) for one, call in zip(states, calls, strict=True)]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _reached(reads: Mapping[str, Read], layer: str) -> bool:
    return layer in reads and reads[layer].count > 0


@torch.no_grad()
def reads_of(
    core: LossModule,
    batches: Sequence[Batch],
    layers: Sequence[str] | Mapping[str, nn.Module],
    *,
    gram: bool = True,
    sample: int = 0,
) -> dict[str, Read]:
    """What linear layers read in the model as it is, by name; see `walk`."""
    found: dict[str, Read] = {}
    walk(core, batches, layers, found.update, gram=gram, sample=sample)
    return found


@dataclass
class _Shortage:
    """What was looked at, and what of it was too little."""

    unreached: list[str] = field(default_factory=list)
    short: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, layers: Sequence[str], reads: Mapping[str, Read], *, gram: bool) -> None:
        reached = [layer for layer in layers if _reached(reads, layer)]
        if not reached and any(layer in reads for layer in layers):
            raise UsageError(
                f"{layers[0]}: no position that it was given is read: all of them only fill rows up",
                hint="give more to look at: --learn FILES (compress.learn), compress.calibration.rows",
            )
        self.unreached += [layer for layer in layers if layer not in reached]
        for layer in reached if gram else ():
            count, width = reads[layer].count, len(reads[layer].sum_I)
            if count < width:
                self.short[layer] = count, width

    def lines(self) -> list[str]:
        found = []
        if self.unreached:
            found.append(
                f"{len(self.unreached)} linear layers were given nothing of what was looked at, and stay as they are: "
                f"{', '.join(self.unreached[:_MOST_NAMED])}"
            )
        if self.short:
            layer, (count, width) = max(self.short.items(), key=lambda item: item[1][1])
            found.append(
                f"{count:,} tokens were looked at, and {layer} has {width:,} inputs: with fewer tokens than inputs how "
                f"these go together is not known; at least {width:,} are needed, several times that are better "
                "(compress.calibration.rows, compress.learn)"
            )
        return found
