"""From a recipe's `pretrain` section to its objective."""

from typing import Any

from llmkit import registry
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.objectives.base import Objective
from llmkit.recipe.schema import Pretrain


def make_objective(section: Pretrain, tokenizer: Any) -> Objective:
    """The objective that the section names.

    Args:
        section: The recipe's `pretrain` section.
        tokenizer: The run's, from `load_tokenizer`.

    Raises:
        UsageError: The tokenizer lacks a token that the objective needs.
    """
    objective: Objective = registry.load(registry.goal_of(section.objective).code)(
        section, Vocabulary.of(tokenizer)
    )
    return objective
