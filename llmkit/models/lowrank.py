"""Linear layers that are products of two smaller ones, and how transformers loads a model that has them.

Such a model's `config.json` says under `quantization_config` which layers they are and of what rank; transformers asks
whoever is registered for `quant_method: llmkit_lowrank`, and that is `LowRankQuantizer`, once llmkit is imported.

Shape suffixes: O outputs, I inputs of a linear layer, K rank.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:  # this is imported while transformers' models still are
    from transformers import PreTrainedModel

METHOD = "llmkit_lowrank"
"""What `config.json` calls this."""


class LowRankLinear(nn.Module):
    """x -> (x down^T) up^T + bias.

    Args:
        in_features: I.
        out_features: O.
        rank: K.
        bias: Whether something is added.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> torch.Tensor:
        """The first factor [K, I]: T5 asks a linear layer's weight for its data type."""
        return self.down.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        found: torch.Tensor = self.up(self.down(states))
        return found

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def low_rank_of(up_OK: torch.Tensor, down_KI: torch.Tensor, bias_O: torch.Tensor | None) -> LowRankLinear:
    """A layer with these factors."""
    made = LowRankLinear(down_KI.shape[1], up_OK.shape[0], len(down_KI), bias=bias_O is not None)
    with torch.no_grad():
        made.down.weight.copy_(down_KI)
        made.up.weight.copy_(up_OK)
        if bias_O is not None:
            made.up.bias.copy_(bias_O)
    return made


class LowRankConfig(QuantizationConfigMixin):
    """What `config.json` says of such a model.

    Args:
        ranks: Name of a layer -> its rank.
    """

    def __init__(self, ranks: Mapping[str, int], **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.ranks = dict(ranks)


class LowRankQuantizer(HfQuantizer):
    """Puts the smaller layers in before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        prefix = model.base_model_prefix + "."
        for name, rank in self.quantization_config.ranks.items():
            whole = _own_name(model, name, prefix)
            if whole is None:
                continue  # of a head that this class does without; transformers says what was left over
            layer = model.get_submodule(whole)
            inputs, outputs = sizes_of(layer)
            with torch.device("meta"):
                made = LowRankLinear(inputs, outputs, rank, bias=layer.bias is not None)
            model.set_submodule(whole, made.to(layer.weight.dtype))
        return model

    def is_serializable(self) -> bool:
        """It can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It can be trained: the factors are ordinary weights."""
        return True


def _own_name(model: "PreTrainedModel", name: str, prefix: str) -> str | None:
    """What this class calls a layer that another class of the architecture saved: with its body's name or without."""
    names = {inner for inner, _ in model.named_modules()}
    tries = (name, name.removeprefix(prefix), prefix + name)
    return next((one for one in tries if one in names), None)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; GPT-2's hold their weights the other way round."""
    from transformers.pytorch_utils import Conv1D

    rows, columns = layer.weight.shape  # type: ignore[misc]
    inputs, outputs = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
    return int(inputs), int(outputs)


def mark_low_rank(model: "PreTrainedModel") -> None:
    """Have a model with such layers say so, for `save_pretrained`."""
    ranks = {name: part.rank for name, part in model.named_modules() if isinstance(part, LowRankLinear)}
    settings = LowRankConfig(ranks)
    model.config.quantization_config = settings
    model.hf_quantizer = LowRankQuantizer(settings)
