"""Whether the numbers of a configuration go together, asked before any text is read or a model is built."""

from collections.abc import Mapping
from typing import Any

from llmkit.plan.batch import PlanError

Fields = Mapping[str, Any]
_ROTARY = ("llama", "mistral", "qwen2", "qwen3", "modernbert")
_HEADS = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "llama", "bert", "roberta", "electra", "modernbert"), (
        "hidden_size", ("num_attention_heads",))),
    "gpt2": ("n_embd", ("n_head",)),
    "bart": ("d_model", ("encoder_attention_heads", "decoder_attention_heads")),
}  # fmt: skip
"""By architecture, the field of its width and those of its heads."""


def check_consistent(model_type: str, fields: Fields) -> None:
    """Refuse widths that heads cannot share, before the network fails on them in the middle of a step.

    Args:
        model_type: The architecture.
        fields: Its complete configuration.

    Raises:
        PlanError: The message names the fields and numbers that would work.
    """
    width_name, heads_names = _HEADS.get(model_type, ("", ()))
    for name in heads_names:
        # Llama's configuration refuses other numbers even where `head_dim` says how wide a head is.
        if model_type == "llama" or not fields.get("head_dim"):
            _divides(fields, name, width_name)
    if fields.get("num_key_value_heads") and model_type in _ROTARY:
        _divides(fields, "num_key_value_heads", "num_attention_heads")
    if model_type in _ROTARY:
        _check_even(fields)
    if model_type == "mamba2":
        _check_mamba2(fields)


def _divides(fields: Fields, part: str, whole: str) -> None:
    few, many = _whole(fields, part), _whole(fields, whole)
    if many % few:
        near = sorted((n for n in range(1, many + 1) if many % n == 0), key=lambda n: abs(n - few))[:3]
        raise PlanError(
            f"model.config: {whole} {many} is not a multiple of {part} {few}",
            hint=f"{part} that would do: {', '.join(map(str, sorted(near)))}",
        )


def _check_even(fields: Fields) -> None:
    heads = _whole(fields, "num_attention_heads")
    width = fields.get("head_dim") or _whole(fields, "hidden_size") // heads
    if width % 2:
        raise PlanError(
            f"model.config: each of {heads} heads is {width} wide, and rotary positions turn pairs of numbers",
            hint=f"a hidden_size that is a multiple of {2 * heads}",
        )


def _check_mamba2(fields: Fields) -> None:
    hidden, heads, groups = (_whole(fields, name) for name in ("hidden_size", "num_heads", "n_groups"))
    width, inner = _whole(fields, "head_dim"), int(fields["expand"] * hidden)
    if heads * width != inner:
        raise PlanError(
            f"model.config: num_heads {heads} times head_dim {width} is {heads * width}, but expand times "
            f"hidden_size is {inner}",
            hint=f"a head_dim that divides {inner}, and num_heads: {inner} / head_dim",
        )
    if heads % groups:
        raise PlanError(
            f"model.config: num_heads {heads} is not a multiple of n_groups {groups}", hint="n_groups: 1"
        )


def _whole(fields: Fields, name: str) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"model.config.{name} is {value!r}", hint="a whole number from 1 on")
    return value
