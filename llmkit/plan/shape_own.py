"""llmkit's own networks, counted."""

from collections.abc import Mapping
from typing import Any

from llmkit.plan.shape import ModelShape, linear, norm, shape_of
from llmkit.registry import ModelKind

Fields = Mapping[str, Any]

RECURRENT_DEFAULTS: Fields = {
    "vocab_size": 32000,
    "cell": "lstm",
    "hidden_size": 512,
    "embedding_size": None,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
CONVOLUTION_DEFAULTS: Fields = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "kernel_size": 4,
    "tie_word_embeddings": True,
}
_GATES = {"rnn": 1, "lstm": 4, "gru": 3}
_KEPT = {"rnn": 2, "lstm": 17, "gru": 8}
"""Numbers of the cells' width that each layer keeps of a token for the backward pass, measured with torch on CPU."""


def recurrent_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """A recurrent model: torch's cells, which have two biases each."""
    hidden, layers, cell = fields["hidden_size"], fields["num_hidden_layers"], fields["cell"]
    width = fields["embedding_size"] or hidden
    tied = bool(fields["tie_word_embeddings"])
    wide = _GATES[cell] * hidden
    body = linear(width, wide) + (layers - 1) * linear(hidden, wide) + layers * linear(hidden, wide)
    if tied and width != hidden:
        body += linear(hidden, width)
    return shape_of(
        fields,
        body,
        tables=fields["vocab_size"] * width,
        head=linear(width if tied else hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        intermediate_size=wide,
        max_length=None,
        gated_mlp=False,
        kept_values=layers * _KEPT[cell] * hidden + width,
        compiles=False,
        embedding_size=width,
    )


def convolution_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """A gated convolutional model."""
    hidden, layers, kernel = fields["hidden_size"], fields["num_hidden_layers"], fields["kernel_size"]
    block = norm(hidden) + linear(kernel * hidden, 2 * hidden)
    return shape_of(
        fields,
        layers * block + norm(hidden),
        tables=fields["vocab_size"] * hidden,
        head=linear(hidden, fields["vocab_size"], bias=False),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        intermediate_size=2 * hidden,
        max_length=None,
        gated_mlp=True,
        # Of each layer its input, the positions it reads side by side, and both halves of the gate.
        kept_values=layers * (kernel + 3) * hidden + hidden,
    )
