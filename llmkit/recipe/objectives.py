"""The settings of each objective, and how many tokens of text its rows take: blocks of the `pretrain` section."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.recipe.block import Block
from llmkit.registry import BERT_ROLES, OBJECTIVES

BERT_LIKE = ("wordpiece", "chars")
"""Algorithms whose vocabularies have `[CLS]`, `[SEP]` and `[MASK]`."""


@dataclass(frozen=True)
class RowLayout:
    """What a row takes of a stream of tokens.

    Attributes:
        stride: Tokens that it takes for itself.
        overlap: Tokens of the next row that it sees too.
        decoder: Positions of the decoder at most; 0 where the model has none of its own.
    """

    stride: int
    overlap: int = 0
    decoder: int = 0


class ObjectiveSettings(Block):
    """What the settings of every objective have."""

    def layout(self, context: int) -> RowLayout:
        """What a row of `context` positions takes: as many tokens."""
        return RowLayout(context)


def tokens_for(objective: str, algorithm: str, given: Sequence[str]) -> list[str]:
    """The special tokens of a tokenizer that a recipe learns for an objective, after the algorithm's own.

    Args:
        objective: The recipe's.
        algorithm: How the vocabulary is learnt.
        given: The recipe's `special_tokens`.
    """
    has = BERT_ROLES if algorithm in BERT_LIKE else ()
    needed = [token for token in OBJECTIVES[objective].tokens if token not in has]
    return list(dict.fromkeys([*given, *needed]))
