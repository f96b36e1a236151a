"""Encoder-decoders, counted as transformers builds them; `families.py` has their defaults."""

from collections.abc import Mapping
from typing import Any

from llmkit.plan.shape import ModelShape, Weights, linear, norm, shape_of
from llmkit.registry import ModelKind

Fields = Mapping[str, Any]


def t5_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """T5."""
    hidden, inner, heads, head_dim = (fields[key] for key in ("d_model", "d_ff", "num_heads", "d_kv"))
    encoder_layers = fields["num_layers"]
    decoder_layers = fields["num_decoder_layers"] or encoder_layers
    one = norm(hidden, bias=False)
    gated = str(fields["feed_forward_proj"]).startswith("gated")
    mlp = (3 if gated else 2) * linear(hidden, inner, bias=False) + one
    half = 2 * linear(hidden, heads * head_dim, bias=False)
    biases = Weights(0, fields["relative_attention_num_buckets"] * heads)  # each side's first layer has them
    encoder = encoder_layers * (2 * half + one + mlp) + biases + one
    decoder = decoder_layers * (4 * half + 2 * one + mlp) + biases + one
    return shape_of(
        {**fields, "tie_word_embeddings": True},  # transformers always does; `False` leaves out a scale
        encoder + decoder,
        tables=fields["vocab_size"] * hidden,
        head=linear(hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=decoder_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=inner,
        max_length=None,
        gated_mlp=gated,
        num_encoder_layers=encoder_layers,
        num_encoder_parameters=encoder.matrices + decoder_layers * half.matrices,
    )


def bart_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """BART."""
    hidden, heads = fields["d_model"], fields["decoder_attention_heads"]
    half = 2 * linear(hidden, hidden)

    def mlp(side: str) -> Weights:
        inner = fields[f"{side}_ffn_dim"]
        return linear(hidden, inner) + linear(inner, hidden) + norm(hidden)

    encoder = fields["encoder_layers"] * (2 * half + norm(hidden) + mlp("encoder")) + norm(hidden)
    decoder = fields["decoder_layers"] * (4 * half + 2 * norm(hidden) + mlp("decoder")) + norm(hidden)
    positions = 2 * (fields["max_position_embeddings"] + 2)
    return shape_of(
        fields,
        encoder + decoder,
        tables=(fields["vocab_size"] + positions) * hidden,
        head=linear(hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=fields["decoder_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields["decoder_ffn_dim"],
        max_length=fields["max_position_embeddings"],
        gated_mlp=False,
        num_encoder_layers=fields["encoder_layers"],
        num_encoder_parameters=encoder.matrices + fields["decoder_layers"] * half.matrices,
    )
