"""Activations that the backward pass computes again instead of keeping them: less memory for more work.

The numbers are the same to the last bit, dropout's masks among them: torch puts its generator back before it computes
a block for the second time.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from llmkit.errors import UsageError
from llmkit.models.blocks import blocks_of

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.linear.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Matrix products and attention: nearly all the work, and a small part of what a block keeps."""


def recompute_activations(module: nn.Module, how: str) -> None:
    """Have each block of a network keep less for its backward pass, in training.

    Args:
        module: A network whose blocks `blocks_of` finds; changed in place. What does not learn is left alone.
        how: `none`; `full`: a block keeps only its input; `selective`: also the results of matrix products and of
            attention, so that only norms, activations and the like are computed again.

    Raises:
        UsageError: It has no blocks.

    **Source**: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; `selective`: Korthikanti et al.,
    "Reducing Activation Recomputation in Large Transformer Models", 2022, section 5, by torch's policies.
    """
    if how == "none":
        return
    blocks = [block for block in blocks_of(module) if any(p.requires_grad for p in block.parameters())]
    if not blocks:
        raise UsageError(
            f"machine.recompute is {how}, but this network is not a chain of blocks",
            hint="machine.recompute=none",
        )
    more: dict[str, Any] = {}
    if how == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        # Bound methods, which a deep copy of the network binds to its own blocks.
        block._keeping = block.forward  # type: ignore[assignment]
        block._more = more  # type: ignore[assignment]
        block.forward = MethodType(_forward, block)


def _forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return block._keeping(*args, **kwargs)
    return checkpoint(block._keeping, *args, use_reentrant=False, **block._more, **kwargs)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
