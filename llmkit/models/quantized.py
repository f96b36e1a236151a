"""The base under an adapter in few bits: linear layers that bitsandbytes holds quantised on an NVIDIA GPU.

**Source**: 4 bits: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3 (NF4 and
double quantisation); 8 bits: Dettmers et al., "LLM.int8()", NeurIPS 2022, section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmkit.errors import UsageError

_BITS = {"Linear4bit": 4, "Linear8bitLt": 8}


def quantize_linear(model: nn.Module, names: Sequence[str], *, bits: int, device: torch.device) -> None:
    """Hold linear layers in 4 bits (NF4, its scales quantised too) or 8, on the device; the model goes there with them.

    Args:
        model: The network; its layers are replaced.
        names: Which, by their full names: plain `nn.Linear`.
        bits: 4 or 8.
        device: An NVIDIA GPU.

    Raises:
        UsageError: A layer is no `nn.Linear` (GPT-2 has others).
    """
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise UsageError(
                f"method: qlora: {name} is a {type(layer).__name__}, which cannot be held in few bits",
                hint="take `method: lora`",
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _quantized(layer, bits).to(device))
    model.to(device)


def _quantized(layer: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes as bnb

    sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    made: Any
    if bits == 4:
        made = bnb.nn.Linear4bit(
            *sizes, bias=has_bias, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        made.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    else:
        made = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    found: nn.Module = made
    return found


def bits_of(layer: nn.Module) -> int:
    """The bits that bitsandbytes holds this layer's weights in; 0 for any other layer."""
    return _BITS.get(type(layer).__name__, 0)


def whole_linear(layer: Any) -> nn.Linear:
    """The plain float32 layer that a quantised one stands for."""
    from peft.utils.integrations import dequantize_module_weight

    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    weight = dequantize_module_weight(layer).detach().float()
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return made
