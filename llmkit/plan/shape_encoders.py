"""Encoders, counted as transformers builds them with the head that they train; `families.py` has their defaults."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.plan.shape import ModelShape, Weights, linear, norm, shape_of
from llmkit.registry import ModelKind

Fields = Mapping[str, Any]


def _bert_like(fields: Fields, *, head: Weights, extra: Weights, embedding: int | None = None) -> ModelShape:
    """BERT's layers; `extra` is what stands between them and the output layer."""
    hidden, inner, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    width, heads = embedding or hidden, fields["num_attention_heads"]
    block = 4 * linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden) + 2 * norm(hidden)
    body = norm(width) + layers * block + extra
    if width != hidden:
        body += linear(width, hidden)
    rows = fields["vocab_size"] + fields["max_position_embeddings"] + fields["type_vocab_size"]
    return shape_of(
        fields,
        body,
        tables=rows * width,
        head=head,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_length=fields["max_position_embeddings"],
        gated_mlp=False,
        embedding_size=width,
    )


def _head(fields: Fields) -> Weights:
    """BERT's output layer; one that is not tied has its bias twice."""
    biases = 1 if fields["tie_word_embeddings"] else 2
    return Weights(fields["hidden_size"] * fields["vocab_size"], biases * fields["vocab_size"])


def bert_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """BERT with its masked-language head and, for pairs, its next-sentence head."""
    hidden = fields["hidden_size"]
    extra = linear(hidden, hidden) + norm(hidden)
    if kind == "pairs":  # the pooler, and whether the second text follows the first
        extra += Weights(0, (linear(hidden, hidden) + linear(hidden, 2)).total)
    return _bert_like(fields, head=_head(fields), extra=extra)


def roberta_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """RoBERTa."""
    hidden = fields["hidden_size"]
    extra = linear(hidden, hidden) + norm(hidden)
    shape = _bert_like(fields, head=_head(fields), extra=extra)
    longest = fields["max_position_embeddings"] - unused_positions(fields["pad_token_id"])
    return replace(shape, max_length=longest)


def unused_positions(pad_token_id: int | None) -> int:
    """Entries of RoBERTa's position table that no token has: it counts positions from the padding token's id on.

    Two is enough for every tokenizer that is learnt here, and what a new model gets at least.
    """
    return max(2, (pad_token_id or 0) + 1)


def electra_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """ELECTRA: the detector, or as a generator."""
    hidden, width = fields["hidden_size"], fields["embedding_size"]
    if kind == "detector":  # one score for each token, and no output layer
        untied = {**fields, "tie_word_embeddings": False}
        extra = linear(hidden, hidden) + linear(hidden, 1)
        return _bert_like(untied, head=Weights(), extra=extra, embedding=width)
    extra = linear(hidden, width) + norm(width)
    return _bert_like(fields, head=linear(width, fields["vocab_size"]), extra=extra, embedding=width)


def modernbert_shape(fields: Fields, kind: ModelKind) -> ModelShape:
    """ModernBERT."""
    hidden, inner, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    one = norm(hidden, bias=bool(fields["norm_bias"]))
    attention = 4 * linear(hidden, hidden, bias=bool(fields["attention_bias"]))
    mlp = linear(hidden, 2 * inner, bias=bool(fields["mlp_bias"]))
    mlp += linear(inner, hidden, bias=bool(fields["mlp_bias"]))
    # One for the embeddings, none before the first attention, one at the end, one in the head.
    norms = (2 * layers + 2) * one
    body = layers * (attention + mlp) + norms + linear(hidden, hidden, bias=bool(fields["classifier_bias"]))
    heads = fields["num_attention_heads"]
    return shape_of(
        fields,
        body,
        tables=fields["vocab_size"] * hidden,
        head=linear(hidden, fields["vocab_size"], bias=bool(fields["decoder_bias"])),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_length=fields["max_position_embeddings"],
        gated_mlp=True,
    )
