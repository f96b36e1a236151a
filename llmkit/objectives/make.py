"""From a section of a recipe to its objective."""

from typing import Any

from llmkit import registry
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.objectives.base import Material, Objective
from llmkit.recipe.schema import Finetune, Pretrain


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


def make_task(section: Finetune, material: Material) -> Objective:
    """The task that the section names.

    Args:
        section: The recipe's `finetune` section; its task is one on labelled rows.
        material: What it is made of.

    Raises:
        UsageError: The tokenizer or the labels are not what the task needs.
    """
    objective: Objective = registry.load(registry.TASKS[section.task].code)(section, material)
    return objective
