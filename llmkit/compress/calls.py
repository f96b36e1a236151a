"""How a model calls its blocks: with what, and at which positions it reads.

Shape suffixes: B rows, T positions, H hidden size, I inputs of a linear layer, N positions that are read.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from llmkit.compress.structure import block_names
from llmkit.errors import UsageError
from llmkit.objectives.base import NOT_LEARNED, Batch, LossModule

_STATES = "hidden_states"
_CACHES = ("past_key_values", "past_key_value", "use_cache")


def blocks_by_name(model: PreTrainedModel) -> list[list[str]]:
    """The names of the model's blocks, for each list of them.

    Raises:
        UsageError: It has none.
    """
    try:
        return block_names(model)
    except UsageError as error:
        raise UsageError(
            f"{model.config.model_type} has no blocks whose linear layers could be treated",
            hint="export it as it is: --method 'export to=bf16'",
        ) from error


@dataclass
class Call:
    """A call of a block.

    Attributes:
        args: What it is given by position, after the states.
        given: And by name.
        is_read: Which positions [B, T] of the block's states are read; None: all.
        is_source_read: And of the states of the encoder that it reads.
    """

    args: tuple[Any, ...]
    given: dict[str, Any]
    is_read: torch.Tensor | None
    is_source_read: torch.Tensor | None

    def positions(self, states: torch.Tensor) -> torch.Tensor:
        """[N, I]: what is read of a layer's input."""
        is_source = any(states is one for one in (*self.args, *self.given.values()))
        mask = self.is_source_read if is_source else self.is_read
        if mask is not None and states.shape[:-1] == mask.shape:
            return states[mask].float()
        return states.reshape(-1, states.shape[-1]).float()


class Side:
    """A list of a model's blocks, while the model runs.

    Attributes:
        names: The blocks' names.
        states: What the first block was given in each call; afterwards what the block at hand is.
        calls: For each block, its calls.
        is_chain: Whether each block read what the one before it gave, and nothing else that a block makes.
    """

    def __init__(self, core: LossModule, batches: Sequence[Batch], number: int) -> None:
        self.names = blocks_by_name(core.model)[number]
        self.states: list[torch.Tensor] = []
        self.calls: dict[str, list[Call]] = {name: [] for name in self.names}
        self.is_chain = True
        self._core, self._batches = core, batches
        self._body: nn.Module = _body_of(core.model, number)
        self._batch: Batch = {}
        self._masks: dict[str, Any] = {}
        self._made: list[Any] = []
        """The last block's states, then what else blocks made."""

    def run(self, told: Callable[[str, torch.Tensor, Call], None]) -> None:
        """Run the model on all batches.

        Args:
            told: Takes each call of a block: its name, and its states [B, T, H].
        """
        with ExitStack() as stack:
            stack.callback(self._body.register_forward_pre_hook(self._body_called, with_kwargs=True).remove)
            for name in self.names:
                block, called = self._core.model.get_submodule(name), partial(self._called, name, told)
                stack.callback(block.register_forward_pre_hook(called, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._gave).remove)
            for batch in self._batches:
                self._batch = on_device(batch, self._core.model.device)
                self._core.objective.loss(self._core.model, self._batch)
        self._made = []

    def learn_calls(self) -> None:
        """Take down what the blocks are called with, and whether they can be run one by one."""

        def told(name: str, states_BTH: torch.Tensor, call: Call) -> None:
            self.calls[name].append(call)
            if name == self.names[0]:
                self.states.append(states_BTH.detach())
                self._made = []
                return
            rest = self._made[1:]
            others = [one for one in (*call.args, *call.given.values()) if isinstance(one, torch.Tensor)]
            follows = bool(self._made) and self._made[0] is states_BTH
            self.is_chain &= follows and not any(a is b for a in others for b in rest)

        self.run(told)
        self.is_chain &= all(len(calls) == len(self.states) for calls in self.calls.values())

    def _body_called(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._masks = {name: given.get(name) for name in ("attention_mask", "encoder_attention_mask")}

    def _called(
        self,
        name: str,
        told: Callable[[str, torch.Tensor, Call], None],
        _: nn.Module,
        args: tuple[Any, ...],
        given: dict[str, Any],
    ) -> None:
        states_BTH = args[0] if args else given[_STATES]
        more = {key: value for key, value in given.items() if key not in (_STATES, *_CACHES)}
        rest = tuple(None if isinstance(one, Cache) else one for one in args[1:])
        told(
            name,
            states_BTH,
            Call(rest, more, self._is_read(states_BTH), _two_sided(self._masks, "encoder_")),
        )

    def _gave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        self._made = [parts[0], *self._made[1:], *(one for one in parts[1:] if isinstance(one, torch.Tensor))]

    def _is_read(self, states_BTH: torch.Tensor) -> torch.Tensor | None:
        """Not what only fills rows up: what the mask hides, and in a decoder all behind the last target of a row."""
        size, model = states_BTH.shape[:2], self._core.model
        mask = _two_sided(self._masks, "")
        if mask is not None and mask.shape == size:
            return mask
        targets_BT = self._batch.get("targets")
        is_decoder = model.can_generate() and "encoder" not in self.names[0].split(".")
        if not is_decoder or targets_BT is None or targets_BT.shape != size:
            return None
        return (targets_BT != NOT_LEARNED).flip(1).cumsum(1).flip(1) > 0


def _two_sided(masks: Mapping[str, Any], prefix: str) -> torch.Tensor | None:
    mask = masks.get(f"{prefix}attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _body_of(model: PreTrainedModel, number: int) -> nn.Module:
    if not model.config.is_encoder_decoder:
        return model.base_model
    body: nn.Module = (model.get_encoder(), model.get_decoder())[number]
    return body


def check_any(batches: Sequence[Batch]) -> None:
    """Refuse to look at nothing.

    Raises:
        UsageError: There are no batches.
    """
    if not batches:
        raise UsageError(
            "there is nothing to look at: 0 tokens, and this method needs some, at best several times as many as a "
            "layer has inputs",
            hint="say what the model learned from: --learn FILES (compress.learn)",
        )


def on_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch where the model is; counts stay on the host."""
    return {k: v if k.startswith("num_") else v.to(device) for k, v in batch.items()}
