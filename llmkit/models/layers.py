"""What the layers of a model compute: found, and listened to while it runs.

Shape suffixes: B rows, T positions, H hidden size, A attention heads, S keys.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "llmkit_attention_weights"
"""Where an attention layer that is tapped (see `attention.py`) leaves its weights [B, A, T, S]."""


def blocks_of(model: "PreTrainedModel") -> list[nn.Module]:
    """The model's blocks, from the input to the output; of an encoder-decoder those of the decoder.

    Raises:
        UsageError: It has none that could be told.
    """
    body = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    blocks = _longest_list(body)
    if not blocks:
        raise UsageError(
            f"{model.config.model_type} has no blocks whose states could be compared",
            hint="leave `hidden` and `attention` of `distil` out",
        )
    return blocks


def block_lists(model: "PreTrainedModel") -> list[list[nn.Module]]:
    """The model's blocks, from the input to the output; of an encoder-decoder first the encoder's, then the decoder's.

    Raises:
        UsageError: It has none that could be told.
    """
    sides = [model.base_model]
    if model.config.is_encoder_decoder:
        sides = [model.get_encoder(), model.get_decoder()]
    found = [blocks for side in sides if (blocks := _longest_list(side))]
    if not found:
        raise UsageError(
            f"{model.config.model_type} has no layers that could be told apart",
            hint="choose parameters by name: `freeze: {match: ...}`, or `train.optim.groups` for rates of their own",
        )
    return found


def _longest_list(body: nn.Module) -> list[nn.Module]:
    depths = {len(module): module for module in _outermost_lists(body)}
    return list(depths[max(depths)]) if depths else []


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


@contextmanager
def listening(blocks: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The states [B, T, H] that each of `blocks` gives, in the list once the model has run."""
    heard: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        heard.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        yield heard


def attention_weights(block: nn.Module) -> torch.Tensor:
    """The weights [B, A, T, S] of a block's self-attention in the last pass of a tapped model.

    Raises:
        UsageError: There are none: its attention does not go through transformers' interface.
    """
    for module in block.modules():
        found: torch.Tensor | None = getattr(module, WEIGHTS, None)
        if found is not None:
            return found
    raise UsageError(
        f"the attention of {type(block).__name__} cannot be looked at",
        hint="leave `distil.attention` out",
    )
