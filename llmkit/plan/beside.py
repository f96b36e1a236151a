"""Networks beside the one that is trained: a teacher, ELECTRA's generator."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.plan.families import shape_of_config
from llmkit.plan.shape import ModelShape
from llmkit.recipe.schema import Pretrain

_SCALED = ("hidden_size", "intermediate_size", "num_attention_heads")


def generator_shape(section: Pretrain, fields: Mapping[str, Any], model: ModelShape) -> ModelShape | None:
    """ELECTRA's generator, with the weights that are its own: its embeddings are the model's.

    Args:
        section: The recipe's section.
        fields: The model's configuration, with its lengths.
        model: The model's shape.

    Returns:
        Its shape; None where the objective has none, or the model is not counted by formula.
    """
    if section.objective != "electra":
        return None
    heads = max(1, round(section.electra.generator_ratio * model.num_heads))
    wide = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size}
    full = {**fields, **wide, "num_attention_heads": model.num_heads}
    scaled = {name: full[name] * heads // model.num_heads for name in _SCALED}
    width = model.embedding_size or model.hidden_size
    shape = shape_of_config({**full, **scaled, "embedding_size": width}, "masked")
    if shape is None:
        return None
    tables = model.num_parameters - model.num_non_embedding_parameters
    return replace(shape, num_parameters=shape.num_parameters - tables)
