"""What makes a model's own layers faster: each block compiled by itself, 8-bit matrix products, Liger's kernels.

All of it changes layers in place and leaves parameters, their names and their places as they are, so that optimizers,
checkpoints and exports do not know of it. What happens beside training steps (evaluations, samples, proofs, the
export) goes through the plain layers.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmkit.errors import MissingError, UsageError
from llmkit.models.blocks import blocks_of

LARGEST_GRAPHED = 300_000_000
"""Weights above which a GPU is busy for so long with each kernel that recording them saves nothing."""
_MOST_FORMS = 64
"""Forms that one block may be compiled in: kinds of blocks x shapes of rows x modes."""
_MULTIPLE = 16
"""What both sides of an 8-bit matrix product must be a multiple of."""


def compile_module(module: nn.Module, *, graphs: bool = False) -> list[nn.Module]:
    """Have torch.compile make kernels for training steps when they first run, in place; shapes are fixed.

    Each block of a network is compiled by itself: equal blocks share one form, which is made once however many there
    are; what stands around them stays as it is. A network that repeats nothing is compiled whole. Evaluations and
    samples, whose rows have every length, go through the plain layers.

    Args:
        module: Model and objective, called as one.
        graphs: Record the kernels of the whole as CUDA graphs (torch's mode `reduce-overhead`).

    Returns:
        The blocks that are compiled by themselves; none: the whole is.

    **Source**: the regional compilation of torch's tutorials and of torchtitan, `torchtitan/models/llama3`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_FORMS)
    if graphs:
        _replace_forward(module, _forward_recorded)
        return []
    blocks = blocks_of(module)
    if len(blocks) < 2:
        module.compile(dynamic=False)
        return []
    for block in blocks:
        compile_block(block)
    return blocks


def compile_block(block: nn.Module) -> None:
    """Compile what a block does in training; what hooks add to that (gathering shards) stays outside.

    Args:
        block: Of any class; a deep copy of it is compiled too.
    """
    _replace_forward(block, _forward)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    # What is compiled is the function of the class: blocks of one class share what is made of it.
    own: Any = module.forward
    module._plain_forward = own
    module.forward = MethodType(forward, module)


def _forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    own = block._plain_forward
    if not (block.training and torch.is_grad_enabled()):
        return own(*args, **kwargs)
    return _compiled(own.__func__)(block, *args, **kwargs)


def _forward_recorded(module: Any, *args: Any, **kwargs: Any) -> Any:
    """As `_forward`, by CUDA graphs, which write what they give to the same places each time.

    So gradients are added up in tensors that were there before: the first micro-batch's would otherwise be a graph's
    own, and the next would overwrite them.
    """
    own = module._plain_forward
    if not (module.training and torch.is_grad_enabled()):
        return own(*args, **kwargs)
    for p in module.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    torch.compiler.cudagraph_mark_step_begin()  # nobody reads what the last call gave any more
    return _recorded(own.__func__)(module, *args, **kwargs)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


@cache
def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, mode="reduce-overhead")


# --- 8-bit matrix products -------------------------------------------------------------------------------------------


def use_float8(model: PreTrainedModel, *, emulate: bool = False) -> int:
    """Have the linear layers of the model's blocks multiply in 8-bit floats, with a scale for each tensor.

    Weights stay what they are; they, what is read and the gradients are rounded for each product. Layers are left
    alone that an 8-bit product has no room for (sides that are no multiple of 16), those of other classes, and
    adapters, whose products are too small to win by it.

    Args:
        model: On its device, and with its adapters.
        emulate: Multiply the rounded numbers in a wide type: on any processor, and slowly.

    Returns:
        How many layers.

    Raises:
        MissingError: torchao is not installed.
        UsageError: No layer can.

    **Source**: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; torchao's `float8`, dynamic scales.
    """
    if find_spec("torchao") is None:
        raise MissingError(
            "machine.precision=fp8 needs the package torchao", hint='pip install "llmkit[fp8]"'
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    inside = {id(layer) for block in blocks_of(model) for layer in block.modules()} - _adapters(model)
    chosen = {
        id(layer)
        for layer in model.modules()
        if id(layer) in inside and type(layer) is nn.Linear and _fits(layer)
    }
    if not chosen:
        raise UsageError(
            f"{model.config.model_type}: no linear layer of its blocks can multiply in 8 bits (both sides must be "
            f"multiples of {_MULTIPLE})",
            hint="machine.precision=bf16",
        )
    convert_to_float8_training(
        model,
        module_filter_fn=lambda layer, _: id(layer) in chosen,
        config=Float8LinearConfig(emulate=emulate),
    )
    for layer in model.modules():
        if isinstance(layer, Float8Linear):
            layer.__class__ = _in_training(Float8Linear)
            layer.training = model.training
    return len(chosen)


@cache
def _in_training(kind: type[nn.Linear]) -> type[nn.Linear]:
    """A linear layer's class that is `kind` in training and torch's own otherwise, which is what is exported."""

    class TrainedInFloat8(kind):  # type: ignore[misc, valid-type]
        """Multiplies in 8 bits while it learns."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            """[..., inputs] -> [..., outputs]."""
            if not self.training:
                return functional.linear(input, self.weight, self.bias)
            rows = input.reshape(-1, input.shape[-1])
            missing = -len(rows) % _MULTIPLE
            # The weight's gradient is a sum over rows: such of zeros change neither it nor a scale.
            if missing:
                rows = functional.pad(rows, (0, 0, 0, missing))
            outputs: torch.Tensor = super().forward(rows)
            return outputs[: len(rows) - missing].reshape(*input.shape[:-1], -1)

    return TrainedInFloat8


def _adapters(model: nn.Module) -> set[int]:
    """The layers that adapters consist of, as PEFT names them."""
    owned = [
        getattr(layer, name)
        for layer in model.modules()
        for name in getattr(layer, "adapter_layer_names", ())
        if isinstance(getattr(layer, name, None), nn.Module)
    ]
    return {id(part) for one in owned for part in one.modules()}


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


# --- Liger's kernels -------------------------------------------------------------------------------------------------


def check_liger() -> None:
    """See that Liger's kernels are installed.

    Raises:
        MissingError: They are not.
    """
    if find_spec("liger_kernel") is None:
        raise MissingError(
            "machine.liger needs the package liger-kernel (and with it triton)",
            hint='pip install "llmkit[liger]"',
        )


def use_liger(model: PreTrainedModel) -> None:
    """Put Liger's kernels for norms, rotations and gated layers into a model; the loss stays llmkit's own.

    Args:
        model: On a GPU.

    Raises:
        MissingError: They are not installed.
        UsageError: There are none for this architecture.
    """
    check_liger()
    # Through their names, for an architecture that is not among them would be passed over in silence.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(
            f"machine.liger: there are no kernels for {model.config.model_type}", hint="machine.liger=false"
        )
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def describe_blocks(blocks: Sequence[nn.Module]) -> str:
    """Blocks in words: how many of which classes."""
    kinds = [type(block).__name__ for block in blocks]
    return " and ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
