"""The families of architectures whose parameters are counted without building them, each as transformers builds it.

Tests compare every number here with the model that transformers builds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.plan.consistent import check_consistent
from llmkit.plan.fit import known_kinds
from llmkit.plan.presets import ALIASES, preset_fields
from llmkit.plan.shape import ModelShape
from llmkit.plan.shape_decoders import gpt2_shape, llama_like_shape, llama_shape, mamba2_shape, qwen3_shape
from llmkit.plan.shape_encoder_decoders import bart_shape, t5_shape
from llmkit.plan.shape_encoders import (
    bert_shape,
    electra_shape,
    modernbert_shape,
    roberta_shape,
    unused_positions,
)
from llmkit.plan.shape_own import (
    CONVOLUTION_DEFAULTS,
    RECURRENT_DEFAULTS,
    convolution_shape,
    recurrent_shape,
)
from llmkit.registry import ModelKind

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How a family is counted.

    Attributes:
        count: Its complete fields, and what it is trained as -> its shape.
        defaults: What transformers assumes for a field that a configuration leaves out.
        aliases: Other names of fields.
        uncounted: Fields that, where they are set, make a model that is not counted here.
        length_field: The field that holds the longest row; None: it reads any.
        unused_positions: Entries at the beginning of its position table that no token has, where there are any.
    """

    count: Callable[[Fields, ModelKind], ModelShape]
    defaults: Fields
    aliases: Mapping[str, str] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    length_field: str | None = "max_position_embeddings"
    unused_positions: bool = False

    def positions_before(self, fields: Fields) -> int:
        """How many entries of the position table come before that of a row's first token."""
        return unused_positions(fields.get("pad_token_id")) if self.unused_positions else 0


_LLAMA: Fields = {
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
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN: Fields = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_GPT2: Fields = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "tie_word_embeddings": True,
}
_MAMBA2: Fields = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "head_dim": 64,
    "state_size": 128,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "chunk_size": 256,
    "tie_word_embeddings": False,
}
_BERT: Fields = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}
_ROBERTA = {**_BERT, "vocab_size": 50265, "pad_token_id": 1}
_ELECTRA = {
    **_BERT,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
_MODERNBERT: Fields = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
}
_T5: Fields = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}
_BART: Fields = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    **{f"{side}_layers": 12 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 4096 for side in ("encoder", "decoder")},
    "tie_word_embeddings": True,
}
_DECODES = ("is_decoder", "add_cross_attention")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(llama_shape, _LLAMA),
    "mistral": Family(lambda fields, kind: llama_like_shape(fields), {**_LLAMA, **_MISTRAL}),
    "qwen2": Family(lambda fields, kind: llama_like_shape(fields, qkv_bias=True), {**_LLAMA, **_QWEN}),
    "qwen3": Family(qwen3_shape, {**_LLAMA, **_QWEN, "head_dim": 128}),
    "gpt2": Family(
        gpt2_shape,
        _GPT2,
        aliases=ALIASES["gpt2"],
        uncounted=("add_cross_attention",),
        length_field="n_positions",
    ),
    "mamba2": Family(mamba2_shape, _MAMBA2, length_field=None),
    "bert": Family(bert_shape, _BERT, uncounted=_DECODES),
    "roberta": Family(roberta_shape, _ROBERTA, uncounted=_DECODES, unused_positions=True),
    "electra": Family(electra_shape, _ELECTRA, uncounted=_DECODES),
    "modernbert": Family(modernbert_shape, _MODERNBERT),
    "t5": Family(
        t5_shape,
        _T5,
        aliases=ALIASES["t5"],
        length_field=None,
    ),
    "bart": Family(
        bart_shape,
        _BART,
        aliases=ALIASES["bart"],
    ),
    "llmkit-recurrent": Family(recurrent_shape, RECURRENT_DEFAULTS, length_field=None),
    "llmkit-cnn": Family(convolution_shape, CONVOLUTION_DEFAULTS, length_field=None),
}
"""By `model_type`."""


def shape_of_preset(preset: str, vocab_size: int, context: int, kind: ModelKind | None = None) -> ModelShape:
    """The shape of a preset with this vocabulary and this longest row.

    Args:
        preset: Its name.
        vocab_size: Entries of the tokenizer.
        context: Tokens of a row.
        kind: What it is trained as; by default the first that its family can.

    Raises:
        UsageError: There is no such preset.
    """
    fields = with_lengths(preset_fields(preset), vocab_size, context)
    shape = shape_of_config(fields, kind)
    assert shape is not None
    return shape


def with_lengths(
    fields: Mapping[str, Any], vocab_size: int, context: int, *, pad_token_id: int | None = None
) -> dict[str, Any]:
    """A configuration for a vocabulary and rows of `context`, as a new model is built; what it says itself stays.

    Args:
        fields: The configuration.
        vocab_size: Entries of the tokenizer.
        context: Tokens of a row.
        pad_token_id: Of the tokenizer, where it has one: some count positions from it on.
    """
    family = FAMILIES.get(str(fields.get("model_type")))
    added: dict[str, Any] = {"vocab_size": vocab_size}
    if pad_token_id is not None:
        fields = {"pad_token_id": pad_token_id, **fields}
    if family is None:
        added["max_position_embeddings"] = context
    elif family.length_field is not None:
        added[family.length_field] = context + family.positions_before(fields)
    return {**added, **fields}


def counts_from_padding(fields: Mapping[str, Any]) -> bool:
    """Whether a model counts its positions from the padding token's id on."""
    family = FAMILIES.get(str(fields.get("model_type")))
    return family is not None and family.unused_positions


def shape_of_config(config: Mapping[str, Any], kind: ModelKind | None = None) -> ModelShape | None:
    """The shape of a transformers configuration (written out, or a model's config.json).

    Args:
        config: With its `model_type`; what it leaves out is as in transformers.
        kind: What it is trained as, which says what heads it has; by default the first that its family can.

    Returns:
        The shape, or None for an architecture that is not counted here (then only the built model can be
        counted).

    Raises:
        PlanError: Its numbers do not go together.
    """
    family, kinds = FAMILIES.get(str(config.get("model_type"))), known_kinds(config)
    if family is None or not kinds or (kind is not None and kind not in kinds):
        return None
    given = {family.aliases.get(key, key): value for key, value in config.items()}
    fields = {**family.defaults, **given}
    if any(fields.get(key) for key in family.uncounted):
        return None
    check_consistent(str(config["model_type"]), fields)
    return family.count(fields, kind or kinds[0])
