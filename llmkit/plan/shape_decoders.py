"""Decoders, counted as transformers builds them; `families.py` has their defaults."""

from collections.abc import Mapping
from typing import Any

from llmkit.plan.shape import ModelShape, Weights, linear, norm, shape_of
from llmkit.registry import ModelKind

Fields = Mapping[str, Any]


def llama_like_shape(
    fields: Fields,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelShape:
    """A decoder of llama's kind: rotary positions, RMS norms, a gated MLP; with these extras."""
    hidden, inner, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    kv_heads = fields["num_key_value_heads"] or heads
    head_dim = fields["head_dim"] or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    attention = linear(hidden, queries, bias=qkv_bias) + 2 * linear(hidden, keys, bias=qkv_bias)
    attention += linear(queries, hidden, bias=output_bias)
    mlp = 2 * linear(hidden, inner, bias=mlp_bias) + linear(inner, hidden, bias=mlp_bias)
    norms = 2 * norm(hidden, bias=False) + (2 if qk_norm else 0) * norm(head_dim, bias=False)
    layers = fields["num_hidden_layers"]
    return shape_of(
        fields,
        layers * (attention + mlp + norms) + norm(hidden, bias=False),
        tables=fields["vocab_size"] * hidden,
        head=linear(hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        max_length=fields["max_position_embeddings"],
        gated_mlp=True,
    )


def llama_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """Llama, with biases where it says so."""
    bias = bool(fields["attention_bias"])
    return llama_like_shape(fields, qkv_bias=bias, output_bias=bias, mlp_bias=bool(fields["mlp_bias"]))


def qwen3_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """Qwen3: norms on queries and keys."""
    bias = bool(fields["attention_bias"])
    return llama_like_shape(fields, qkv_bias=bias, output_bias=bias, qk_norm=True)


def gpt2_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """GPT-2."""
    hidden, layers, heads = fields["n_embd"], fields["n_layer"], fields["n_head"]
    inner = fields["n_inner"] or 4 * hidden
    block = 4 * linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden) + 2 * norm(hidden)
    return shape_of(
        fields,
        layers * block + norm(hidden),
        tables=(fields["vocab_size"] + fields["n_positions"]) * hidden,
        head=linear(hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_length=fields["n_positions"],
        gated_mlp=False,
    )


def mamba2_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """Mamba 2, a state-space model."""
    hidden, heads, layers = fields["hidden_size"], fields["num_heads"], fields["num_hidden_layers"]
    inner, bias = int(fields["expand"] * hidden), bool(fields["use_bias"])
    mixed = inner + 2 * fields["n_groups"] * fields["state_size"]
    convolution = Weights(mixed * fields["conv_kernel"], mixed if fields["use_conv_bias"] else 0)
    block = linear(hidden, inner + mixed + heads, bias=bias) + convolution + linear(inner, hidden, bias=bias)
    block += Weights(0, 3 * heads) + norm(inner, bias=False) + norm(hidden, bias=False)
    return shape_of(
        fields,
        layers * block + norm(hidden, bias=False),
        tables=fields["vocab_size"] * hidden,
        head=linear(hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        intermediate_size=inner,
        max_length=None,
        gated_mlp=True,
        # Within a chunk each head holds a square of the chunk, and a few states in float32.
        kept_values=layers * (8 * inner + 4 * mixed + 6 * heads * fields["chunk_size"]),
    )
