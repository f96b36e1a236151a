"""Whether an architecture can learn an objective and take word vectors, asked before any text is read."""

from collections.abc import Mapping
from typing import Any

from llmkit.plan.batch import PlanError
from llmkit.plan.shape import ModelShape
from llmkit.recipe.architectures import KINDS, family_of_config, misfit
from llmkit.registry import ModelKind


def known_kinds(fields: Mapping[str, Any]) -> tuple[ModelKind, ...] | None:
    """What a configuration can be trained as; None where only transformers can say."""
    return KINDS.get(family_of_config(fields))


def check_fit(objective: str, fields: Mapping[str, Any], kinds: tuple[ModelKind, ...]) -> None:
    """Refuse an architecture that does not fit the objective.

    Args:
        objective: A registered objective.
        fields: The model's configuration.
        kinds: The kinds of model that its architecture makes.

    Raises:
        PlanError: It does not fit; the message says which architectures and which objectives would.
    """
    found = misfit(objective, family_of_config(fields), kinds)
    if found is not None:
        raise PlanError(found[0], hint=found[1])


def check_vectors(name: str, width: int, shape: ModelShape, architecture: str) -> None:
    """Refuse word vectors of another width than the model's embedding.

    Args:
        name: Their file, for the message.
        width: Numbers of each.
        shape: The model.
        architecture: Its name.

    Raises:
        PlanError: The message says which configuration takes them.
    """
    wanted = shape.embedding_size or shape.hidden_size
    if width == wanted:
        return
    field = _WIDTH_FIELDS.get(architecture, "hidden_size")
    heads = " and a number of heads that divides it" if shape.num_heads and field != "embedding_size" else ""
    raise PlanError(
        f"model.embeddings: the vectors of {name} are {width} wide, this model's embedding is {wanted}",
        hint=f"architecture: {architecture}, config: {{{field}: {width}}}{heads}; or vectors of {wanted}",
    )


_WIDTH_FIELDS = {
    **dict.fromkeys(("rnn", "lstm", "gru", "electra"), "embedding_size"),
    **dict.fromkeys(("t5", "bart"), "d_model"),
    "gpt2": "n_embd",
}
"""Where an architecture says how wide its embedding is."""
