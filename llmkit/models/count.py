"""Counting models that the plan has no formula for: built without memory, on the meta device."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from llmkit.errors import MissingError
from llmkit.models.build import make_config, max_length
from llmkit.models.trust import check_code
from llmkit.plan import ModelShape
from llmkit.recipe.schema import Model


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


def shape_by_building(spec: Model, vocab_size: int) -> ModelShape:
    """The shape of any architecture, its parameters counted on the meta device."""
    if spec.name is not None:
        config = _named_config(spec.name, trusted=spec.trust_remote_code)
    else:
        config = make_config(spec, vocab_size=vocab_size, special_ids={})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    head = model.get_output_embeddings().weight
    embeddings = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    tied = id(head) in embeddings
    total = sum(p.numel() for p in model.parameters())
    inside = total - sum(embeddings.values()) - (0 if tied else head.numel())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings)
    heads = config.num_attention_heads
    return ModelShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        max_length=max_length(config) or spec.context,
        tied=tied,
        gated_mlp=False,
        num_parameters=total,
        num_non_embedding_parameters=inside,
        num_matmul_parameters=matrices + (head.numel() if tied else 0),
    )


def _named_config(name: str, *, trusted: bool) -> PretrainedConfig:
    try:
        check_code(name, PretrainedConfig.get_config_dict(name)[0], trusted=trusted)
        return AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"model.name: {name!r} cannot be found ({str(error).splitlines()[0]})",
            hint="give a folder with config.json, or a Hub id while online",
        ) from error
