"""The shape of a decoder: the presets, and exact parameter counts without building anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.errors import UsageError
from llmkit.registry import nearest


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that parameters, FLOPs and memory follow from.

    Attributes:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer than `num_heads` in grouped-query attention.
        head_dim: Width of one head; `num_heads * head_dim` need not be `hidden_size`.
        intermediate_size: Width inside the MLP.
        max_length: The longest row the model can read.
        tied: Whether the LM head is the embedding table.
        gated_mlp: Whether the MLP has a gate (SwiGLU: three matrices instead of two).
        num_parameters: All weights, each shared one once.
        num_non_embedding_parameters: Those without token and position embeddings and the LM head.
        num_matmul_parameters: Weights that each token is multiplied with: the linear layers' and the LM
            head's (also where it is tied), no embedding look-up, bias or norm.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int
    tied: bool
    gated_mlp: bool
    num_parameters: int
    num_non_embedding_parameters: int
    num_matmul_parameters: int


def _preset(hidden: int, layers: int, heads: int, kv_heads: int, *, tied: bool = True) -> dict[str, Any]:
    """Llama fields for a width and depth; the MLP is 8/3 of the width, to the nearest multiple of 64."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 64 * round(hidden * 8 / 3 / 64),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": tied,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gpt-tiny": _preset(128, 4, 4, 4),
    "gpt-mini": _preset(256, 6, 4, 4),
    "gpt-small": _preset(512, 8, 8, 8),
    "gpt-base": _preset(768, 12, 12, 12),
    "gpt-medium": _preset(1024, 24, 16, 16),
    "gpt-large": _preset(1536, 24, 12, 12),
    "gpt-1b": _preset(2048, 22, 16, 8, tied=False),
}
"""Shapes by name, as fields of transformers' `LlamaConfig`; vocabulary and context come from the recipe.

About 1 M, 7 M, 30 M, 124 M, 350 M, 760 M and 1.2 B parameters. The MLP width of 8/3 keeps the parameters of a
plain MLP of 4 (Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2).
"""


def preset_fields(preset: str) -> Mapping[str, Any]:
    """The llama fields of a preset.

    Raises:
        UsageError: There is no such preset; the message lists them and the nearest one.
    """
    if preset not in PRESETS:
        guess = nearest(preset, PRESETS)
        raise UsageError(
            f"unknown preset {preset!r}; known: {', '.join(PRESETS)}",
            hint=f"did you mean {guess!r}?" if guess else "",
        )
    return PRESETS[preset]


def shape_of_preset(preset: str, vocab_size: int, context: int) -> ModelShape:
    """The shape of a preset with this vocabulary and this longest row.

    Raises:
        UsageError: There is no such preset.
    """
    fields = dict(preset_fields(preset)) | {"vocab_size": vocab_size, "max_position_embeddings": context}
    return _llama_shape(fields, _Biases())


@dataclass(frozen=True)
class _Biases:
    """What a llama-like architecture has besides its matrices and two norms a block."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False
    qk_norm: bool = False


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": _LLAMA | _QWEN,
    "qwen3": _LLAMA | _QWEN | {"head_dim": 128},
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "tie_word_embeddings": True,
        "add_cross_attention": False,
    },
}
"""What transformers assumes for a field that a configuration leaves out (a test compares the two)."""

_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""GPT2Config takes these names too."""


def shape_of_config(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape of a transformers configuration (written out, or a model's config.json).

    Returns:
        The shape, or None for an architecture that is not counted here (then only the built model can be
        counted).
    """
    model_type = str(config.get("model_type"))
    if model_type not in _DEFAULTS:
        return None
    given = {_ALIASES.get(key, key) if model_type == "gpt2" else key: value for key, value in config.items()}
    fields = {**_DEFAULTS[model_type], **given}
    if model_type == "gpt2":
        return None if fields["add_cross_attention"] else _gpt2_shape(fields)
    return _llama_shape(fields, _biases_of(model_type, fields))


def _biases_of(model_type: str, fields: Mapping[str, Any]) -> _Biases:
    if model_type == "qwen2":
        return _Biases(qkv=True)
    if model_type == "mistral":
        return _Biases()
    attention = bool(fields["attention_bias"])
    if model_type == "qwen3":
        return _Biases(qkv=attention, output=attention, qk_norm=True)
    return _Biases(qkv=attention, output=attention, mlp=bool(fields["mlp_bias"]))


def _llama_shape(fields: Mapping[str, Any], extra: _Biases) -> ModelShape:
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    kv_heads = fields["num_key_value_heads"] or heads
    head_dim = fields["head_dim"] or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    matrices = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    biases = extra.qkv * (queries + 2 * keys) + extra.output * hidden + extra.mlp * (2 * inner + hidden)
    norms = 2 * hidden + extra.qk_norm * 2 * head_dim
    body = layers * (matrices + biases + norms) + hidden
    table = fields["vocab_size"] * hidden
    tied = bool(fields["tie_word_embeddings"])
    return ModelShape(
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        max_length=fields["max_position_embeddings"],
        tied=tied,
        gated_mlp=True,
        num_parameters=body + (table if tied else 2 * table),
        num_non_embedding_parameters=body,
        num_matmul_parameters=layers * matrices + table,
    )


def _gpt2_shape(fields: Mapping[str, Any]) -> ModelShape:
    hidden, layers, heads = fields["n_embd"], fields["n_layer"], fields["n_head"]
    inner = fields["n_inner"] or 4 * hidden
    matrices = 4 * hidden * hidden + 2 * hidden * inner
    biases = 4 * hidden + inner + hidden
    body = layers * (matrices + biases + 4 * hidden) + 2 * hidden
    table = fields["vocab_size"] * hidden
    tied = bool(fields["tie_word_embeddings"])
    return ModelShape(
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_length=fields["n_positions"],
        tied=tied,
        gated_mlp=False,
        num_parameters=body + fields["n_positions"] * hidden + (table if tied else 2 * table),
        num_non_embedding_parameters=body,
        num_matmul_parameters=layers * matrices + table,
    )
