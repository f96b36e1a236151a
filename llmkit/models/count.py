"""Counting models that the plan has no formula for: built without memory, on the meta device."""

from typing import Any, cast

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from llmkit.errors import MissingError
from llmkit.hub import local_only
from llmkit.models.build import make_config, max_length, new_model
from llmkit.models.trust import check_code
from llmkit.plan import ModelShape
from llmkit.recipe.schema import Model
from llmkit.registry import ModelKind

_GATES = ("gate_proj", "gate_up_proj", "wi_0", "mlp.Wi")
"""How a gated MLP's first matrix is called."""


def fetch_config(name: str, *, trusted: bool = False) -> dict[str, Any]:
    """The configuration of a model by name, as transformers finds it (its cache first, then the Hub).

    Args:
        name: A folder, or a name on the Hub.
        trusted: Code that comes with it may run.

    Raises:
        MissingError: It cannot be found.
        UsageError: It brings code, and is not trusted.
    """
    return _named_config(name, trusted=trusted).to_dict()


def kinds_of_type(model_type: str) -> tuple[ModelKind, ...]:
    """What transformers can train an architecture as, by its own tables."""
    found = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "pairs": auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    kinds = [kind for kind, table in found.items() if model_type in table]
    if "pairs" in kinds and "ForPreTraining" not in auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(
        model_type, ""
    ):
        kinds.remove("pairs")
    return cast("tuple[ModelKind, ...]", tuple(kinds))


def shape_by_building(spec: Model, kind: ModelKind, vocab_size: int) -> ModelShape:
    """The shape of any architecture, its parameters counted on the meta device.

    Args:
        spec: The recipe's `model` block.
        kind: What it is trained as.
        vocab_size: Entries of the tokenizer.

    Raises:
        UsageError: There is no such model, or its numbers do not go together.
    """
    if spec.name is not None:
        config = _named_config(spec.name, trusted=spec.trust_remote_code)
    else:
        config = make_config(spec, vocab_size=vocab_size, special_ids={})
    with torch.device("meta"):
        model = new_model(config, kind, trusted=spec.trust_remote_code)
    return shape_of_model(model)


def shape_of_model(model: PreTrainedModel) -> ModelShape:
    """The shape of a model that is built; it may be on the meta device."""
    config = model.config
    total, body, matrices = _weights(model)
    hidden = _field(config, "hidden_size", default=model.get_input_embeddings().embedding_dim)
    heads = _field(config, "num_attention_heads", default=0)
    head = model.get_output_embeddings()
    encoder = model.get_encoder() if config.is_encoder_decoder else None
    return ModelShape(
        vocab_size=model.get_input_embeddings().num_embeddings,
        hidden_size=hidden,
        num_layers=_field(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers", default=1),
        num_heads=heads,
        num_kv_heads=_field(config, "num_key_value_heads", default=heads),
        head_dim=_field(config, "head_dim", default=hidden // max(1, heads)),
        intermediate_size=_field(config, "intermediate_size", "decoder_ffn_dim", default=4 * hidden),
        max_length=max_length(config),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        gated_mlp=any(name.endswith(_GATES) for name, _ in model.named_modules()),
        num_parameters=total,
        num_non_embedding_parameters=body,
        num_matmul_parameters=matrices,
        embedding_size=model.get_input_embeddings().embedding_dim,
        num_encoder_layers=0 if encoder is None else _field(config, "num_hidden_layers", default=1),
        num_encoder_parameters=0 if encoder is None else _weights(encoder)[2],
        num_experts=_field(config, "num_local_experts", "num_experts", "n_routed_experts", default=0),
        num_expert_parameters=sum(p.numel() for name, p in model.named_parameters() if ".experts." in name),
    )


def _weights(model: PreTrainedModel) -> tuple[int, int, int]:
    """All parameters, those without tables and output layer, and those that each token is multiplied with."""
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    head = None if output is None else output.weight
    tied = head is not None and id(head) in tables
    total = sum(p.numel() for p in model.parameters())
    outside = sum(tables.values()) + (head.numel() if head is not None and not tied else 0)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)
    return total, total - outside, matrices + (head.numel() if head is not None and tied else 0)


def _field(config: PretrainedConfig, *names: str, default: int) -> int:
    """The first of these fields that the configuration has as a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), default)


def _named_config(name: str, *, trusted: bool) -> PretrainedConfig:
    try:
        local = local_only(name)
        fields, _ = PretrainedConfig.get_config_dict(name, local_files_only=local)
        check_code(name, fields, trusted=trusted)
        return AutoConfig.from_pretrained(name, trust_remote_code=trusted, local_files_only=local)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"model.name: {name!r} cannot be found ({str(error).splitlines()[0]})",
            hint="give a folder with config.json, or a Hub id while online",
        ) from error
