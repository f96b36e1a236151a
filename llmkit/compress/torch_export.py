"""A model as a program of `torch.export`, for any number of rows and any length.

Shape suffixes: B rows, T positions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import UsageError
from llmkit.registry import ModelKind

OUTPUTS: Mapping[ModelKind, tuple[str, ...]] = {
    "causal": ("logits",),
    "masked": ("logits",),
    "seq2seq": ("logits",),
    "detector": ("logits",),
    "sequence": ("logits",),
    "tokens": ("logits",),
    "answers": ("start_logits", "end_logits"),
    "pairs": ("prediction_logits", "seq_relationship_logits"),
    "encoder": ("last_hidden_state",),
}
"""What an exported model gives, by its kind: the names that transformers has for it."""

_CACHES: tuple[ModelKind, ...] = ("causal", "seq2seq")


class Plain(nn.Module):
    """A model of tensors by name, without anything that it keeps.

    Args:
        model: The model.
        kind: What it does.
    """

    def __init__(self, model: PreTrainedModel, kind: ModelKind) -> None:
        super().__init__()
        self.model = model
        self._names = OUTPUTS[kind]
        self._more: dict[str, Any] = {"use_cache": False} if kind in _CACHES else {}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Inputs [B, T] -> what the model says of them, by name."""
        more = {"token_type_ids": token_type_ids, "decoder_input_ids": decoder_input_ids}
        given = {name: value for name, value in more.items() if value is not None}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **given, **self._more)
        return {name: output[name] for name in self._names}


def trace(
    model: PreTrainedModel, kind: ModelKind, inputs: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    """A model as a program.

    Args:
        model: In evaluation mode, on CPU.
        kind: What it does.
        inputs: Some, [B, T] each, with B and T of at least 2: what the program takes.

    Raises:
        UsageError: torch cannot write down what the model does.
    """
    free = torch.export.Dim.DYNAMIC
    # Of a part of a longer row torch would guard the row's length too, which nobody has when the program is run.
    inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    try:
        return torch.export.export(
            Plain(model, kind),
            (),
            kwargs=dict(inputs),
            dynamic_shapes={name: {0: free, 1: free} for name in inputs},
            strict=False,
        )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise UsageError(
            f"export: torch cannot write down what this {model.config.model_type} does ({said})",
            hint="export it as safetensors of 16 bits: `to: bf16`",
        ) from error


def write_torch(
    model: PreTrainedModel, kind: ModelKind, inputs: Mapping[str, torch.Tensor], file: Path
) -> None:
    """Write a model as a program that torch alone runs: `torch.export.load(file).module()(**inputs)`.

    Args:
        model: In evaluation mode, on CPU.
        kind: What it does.
        inputs: See `trace`.
        file: Where to.

    Raises:
        UsageError: See `trace`.
    """
    torch.export.save(trace(model, kind, inputs), file)
