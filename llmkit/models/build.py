"""From the recipe's `model` block to a `transformers` model of the objective's kind, seeded and checked."""

import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from llmkit.errors import MissingError, UsageError
from llmkit.hub import local_only
from llmkit.models.trust import check_trust
from llmkit.models.unpacked import check_package, is_packed, unpack, without_bars
from llmkit.plan import model_fields
from llmkit.plan.shape_encoders import unused_positions
from llmkit.recipe.architectures import OWN, kind_of_config
from llmkit.recipe.schema import Model
from llmkit.registry import ModelKind, nearest

_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DROPOUT_MARKS = ("dropout", "pdrop")
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FRAME = ("cls_token_id", "sep_token_id", "mask_token_id")
_SPARE_HEADS = re.compile(r"(^|\.)(pooler|seq_relationship|sop_classifier)\.")
"""Tensors of heads for whole texts and pairs of them, which a model that only fills gaps does without."""
_left_out: WeakKeyDictionary[PreTrainedModel, tuple[str, ...]] = WeakKeyDictionary()
_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Model types whose positions are counted from the padding token's id on."""

AUTO_CLASSES: Mapping[ModelKind, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "pairs": AutoModelForPreTraining,
    "seq2seq": AutoModelForSeq2SeqLM,
    "detector": AutoModelForPreTraining,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "encoder": AutoModel,
}
"""By the kind of model, what transformers chooses its class by."""

_ALIGNED_BYTES = 64
"""What torch aligns its memory to."""


def build_model(
    spec: Model, kind: ModelKind, *, vocab_size: int, special_ids: Mapping[str, int], seed: int
) -> PreTrainedModel:
    """Build the model that `spec` asks for, on CPU in float32.

    A new model's weights depend on `seed` alone: not on the device, nor on how many there are.

    Args:
        spec: The recipe's `model` block.
        kind: What the objective needs.
        vocab_size: Entries of the tokenizer; a new model has as many embeddings.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the configuration, and for one that has
            them `cls_token_id`, `sep_token_id` and `mask_token_id`.
        seed: The recipe's seed.

    Raises:
        UsageError: The configuration does not fit the recipe (context, vocabulary, dropout).
        MissingError: A pretrained model cannot be found.
    """
    if spec.name is not None:
        model = _load_pretrained(spec, kind, vocab_size)
    else:
        config = make_config(spec, vocab_size=vocab_size, special_ids=special_ids)
        torch.manual_seed(seed)
        model = new_model(config, kind)
    if kind in ("causal", "seq2seq"):
        start = getattr(model.config, "decoder_start_token_id", None)
        ends = {name: number for name, number in special_ids.items() if name in _ENDS}
        model.generation_config = GenerationConfig(**ends, decoder_start_token_id=start)
    model.train()  # what is loaded comes in evaluation mode
    return model


def new_model(config: PretrainedConfig, kind: ModelKind, *, trusted: bool = False) -> PreTrainedModel:
    """A model of this configuration with new weights, by torch's generator and on its default device.

    Raises:
        UsageError: The configuration's numbers do not go together.
    """
    try:
        return AUTO_CLASSES[kind].from_config(config, dtype=torch.float32, trust_remote_code=trusted)
    except (ValueError, AssertionError) as error:
        raise UsageError(
            f"model.config: transformers cannot build this {config.model_type} ({' '.join(str(error).split())})"
        ) from error


def make_config(spec: Model, *, vocab_size: int, special_ids: Mapping[str, int]) -> PretrainedConfig:
    """The `transformers` configuration of a model that starts from random weights."""
    fields = model_fields(spec) or {}
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UsageError("model.config: `model_type` is missing", hint="for example `model_type: llama`")
    ends = {name: number for name, number in special_ids.items() if name in _ENDS}
    config = _config_of(model_type, {"vocab_size": vocab_size, **ends, **fields})
    _check_fields(config, fields)
    _set_length(config, spec.context, pinned=fields)
    if config.vocab_size < vocab_size:
        raise UsageError(
            f"model.config.vocab_size is {config.vocab_size:,}, but the tokenizer has {vocab_size:,} entries",
            hint="leave `vocab_size` out: it follows the tokenizer",
        )
    _set_tokens(config, special_ids, pinned=fields)
    if config.is_encoder_decoder and "decoder_start_token_id" not in fields:
        # T5 begins with padding, BART with the end of text.
        start = "pad_token_id" if config.model_type != "bart" else "eos_token_id"
        config.decoder_start_token_id = special_ids.get(start, 0)
    if spec.dropout is not None:
        set_dropout(config, spec.dropout)
    return config


def _config_of(model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        guess = nearest(model_type, [*OWN, *CONFIG_MAPPING])
        raise UsageError(
            f"model: {model_type!r} is no architecture that transformers or llmkit has",
            hint=f"did you mean {guess!r}?" if guess else "architecture: llama",
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageError(
            f"model.config does not fit together ({' '.join(str(error).split())})",
            hint=f"llmkit recipe show says which fields {model_type!r} gets",
        ) from error


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability of the architecture.

    Raises:
        UsageError: The architecture has none.
    """
    names = [
        name
        for name, value in config.to_dict().items()
        if any(mark in name for mark in _DROPOUT_MARKS) and isinstance(value, int | float)
    ]
    if not names:
        raise UsageError(f"model.dropout: {config.model_type} has no dropout", hint="leave `dropout` out")
    for name in names:
        setattr(config, name, probability)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Make `model` use the attention implementation `name`, as registered with transformers."""
    model.set_attn_implementation(name)


def max_length(config: PretrainedConfig) -> int | None:
    """The longest input the configuration was made for, in tokens; None where it does not say."""
    found = next((int(getattr(config, f)) for f in _LENGTH_FIELDS if getattr(config, f, None)), None)
    return None if found is None else found - _unused(config)


def _check_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    # transformers takes any keyword and ignores it; a misspelt one would be lost in silence.
    known = set(type(config)().to_dict()) | set(getattr(config, "attribute_map", {}))
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UsageError(
            f"model.config: {config.model_type} has no field {', '.join(map(repr, unknown))}",
            hint=f"its fields: {', '.join(sorted(k for k in known if not k.startswith('_')))}",
        )


def _set_length(config: PretrainedConfig, context: int, *, pinned: Mapping[str, Any]) -> None:
    field = next((f for f in _LENGTH_FIELDS if hasattr(config, f)), None)
    if field is None:
        return
    if field not in pinned:
        setattr(config, field, context + _unused(config))
        return
    longest = getattr(config, field) - _unused(config)
    if longest < context:
        raise UsageError(
            f"model.config.{field} is {getattr(config, field)}: room for {longest} tokens, fewer than "
            f"`context: {context}`",
            hint=f"set `context` to at most {longest}, or leave `{field}` out",
        )


def _set_tokens(config: PretrainedConfig, ids: Mapping[str, int], *, pinned: Mapping[str, Any]) -> None:
    """The tokenizer's `[CLS]` and the like, where a configuration has them; never an id outside the vocabulary."""
    for name in (*_ENDS, *_FRAME):
        if not hasattr(config, name) or name in pinned:
            continue
        if name in ids:
            setattr(config, name, ids[name])
        else:
            default = getattr(config, name)
            if isinstance(default, int) and default >= config.vocab_size:
                setattr(config, name, None)  # that of another vocabulary


def _unused(config: PretrainedConfig) -> int:
    """Entries at the beginning of the position table that no token has."""
    return unused_positions(config.pad_token_id) if config.model_type in _AFTER_PADDING else 0


def _load_pretrained(spec: Model, kind: ModelKind, vocab_size: int) -> PreTrainedModel:
    name = str(spec.name)
    try:
        model = load_weights(name, kind, trusted=spec.trust_remote_code)
    except OSError as error:
        raise MissingError(
            f"model.name: {name!r} cannot be loaded ({str(error).splitlines()[0]})",
            hint="give a folder with config.json and weights, or a Hub id while online",
        ) from error
    limit = max_length(model.config)
    if limit is not None and limit < spec.context:
        raise UsageError(
            f"{name} takes at most {limit} tokens, fewer than `context: {spec.context}`",
            hint=f"set `context` to at most {limit}",
        )
    if model.get_input_embeddings().weight.shape[0] < vocab_size:
        raise UsageError(
            f"{name} has {model.get_input_embeddings().weight.shape[0]:,} embeddings, the tokenizer "
            f"{vocab_size:,} entries",
            hint="use the model's own tokenizer: leave `tokenize` and `tokenizer` out",
        )
    if spec.dropout is not None:
        raise UsageError(
            "model.dropout cannot be changed on a loaded model in this version", hint="leave it out"
        )
    return model


def kind_of(name: str) -> ModelKind:
    """What kind of model a folder or name on the Hub holds, by the class that its configuration names.

    Raises:
        OSError: There is no such model.
    """
    return kind_of_config(PretrainedConfig.get_config_dict(name, local_files_only=local_only(name))[0])


def load_weights(name: str, kind: ModelKind, *, trusted: bool) -> PreTrainedModel:
    """A model by folder or Hub name, in float32 on CPU, in evaluation mode; every tensor is from its safetensors.

    Weights in few bits become plain ones: what the files say.

    Args:
        name: A folder, or a name on the Hub.
        kind: What it is loaded as.
        trusted: Code that comes with it may run.

    Raises:
        UsageError: It brings code or pickles, or its weights do not belong to its configuration.
        MissingError: Its weights are in few bits, and the package that knows them is not installed.
        OSError: There is no such model.
    """
    check_trust(name, trusted=trusted)
    local = local_only(name)
    packed = is_packed(PretrainedConfig.get_config_dict(name, local_files_only=local)[0])
    if packed:
        check_package()
    # Else a model without safetensors is sent to a converter elsewhere, and its answer taken for the model.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with without_bars() if packed else nullcontext():
        model, info = AUTO_CLASSES[kind].from_pretrained(
            name,
            dtype=torch.float32,
            trust_remote_code=trusted,
            output_loading_info=True,
            use_safetensors=True,
            weights_only=True,
            local_files_only=local,
        )
        _left_out[model] = check_loaded(name, info)
        if packed:
            unpack(model)
    align(model)
    return model


def align(model: PreTrainedModel) -> None:
    """Move weights that lie where their file is mapped to where torch would have put them.

    A file's tensors begin at any byte, and on processors with wide vectors some matrix products round by where their
    numbers begin: two models of the same weights would differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNED_BYTES:
            tensor.data = tensor.data.clone()


def left_out(model: PreTrainedModel) -> tuple[str, ...]:
    """The tensors that stand beside a loaded model's own and were not taken: those of heads that it does without."""
    return _left_out.get(model, ())


def check_loaded(name: str, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse weights that do not belong to the configuration: a missing tensor would be random in silence.

    Args:
        name: The model, for the message.
        info: What `from_pretrained(..., output_loading_info=True)` says.

    Returns:
        Tensors that were left out: a pooler, or a head for pairs of texts, that this kind of model does without.

    Raises:
        UsageError: Tensors are missing, left over or of another shape.
    """
    spare = tuple(sorted(key for key in info.get("unexpected_keys", ()) if _SPARE_HEADS.search(key)))
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted({*map(str, info.get(kind, ()))} - {*(spare if kind == "unexpected_keys" else ())})
        if keys:
            listed = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise UsageError(
                f"{name}: {kind.replace('_', ' ')} when loading the weights: {listed}",
                hint="the weights do not belong to this configuration",
            )
    return spare
