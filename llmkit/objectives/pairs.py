"""A prompt with answers to it as conversations that begin with the same tokens."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llmkit.data.chat import Conversations, Encoded, Message, conversations_of, without_earliest
from llmkit.errors import DataError
from llmkit.objectives.base import NOT_LEARNED, Ints

_ROLE, _WEIGHT = "role", "weight"
Written = tuple[Ints, Ints]
"""The tokens of a conversation, and at each place the next one where it is learned [T]."""


class Pairs:
    """Writes the conversations of a row.

    What does not fit is cut once for all of them: the earliest messages of the prompt go, up to the next of the user;
    when only its last message is left, the ends of the answers go.

    Args:
        tokenizer: The model's.
        max_length: Tokens of a conversation at most.

    Raises:
        UsageError: The chat template ends no turn.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._last = conversations_of(tokenizer, tokenizer.chat_template, learn="last")
        self.stops = self._last.stops

    @cached_property
    def _all(self) -> Conversations:
        """For answers of several turns, which not every template allows."""
        return conversations_of(self._tokenizer, self._tokenizer.chat_template, learn="all")

    def encode(self, row: Mapping[str, Any]) -> tuple[Written, Written, int]:
        """The chosen and the rejected conversation, each as ids and targets [T], and how many tokens were cut.

        Raises:
            DataError: The row is of another form, or cannot be written by the template.
        """
        if "chosen" not in row:
            raise DataError(
                "the row has one answer that is good or bad (KTO's form), and this loss compares two",
                hint="finetune.dpo.loss=kto, or give rows with a chosen and a rejected answer",
            )
        (chosen, rejected), cut = self.write(row["prompt"], (row["chosen"], row["rejected"]))
        return chosen, rejected, cut

    def write(
        self, prompt: Sequence[Message], answers: Sequence[Sequence[Message]]
    ) -> tuple[list[Written], int]:
        """The conversation with each of some answers, as ids and targets [T], and how many tokens were cut.

        Raises:
            DataError: It cannot be written by the template.
        """
        prompt = [*prompt]
        whole = each = [self._encoded(prompt, answer) for answer in answers]
        while max(len(one.ids) for one in each) > self._max_length and (fewer := _shorter(prompt)):
            prompt = fewer
            each = [self._encoded(prompt, answer) for answer in answers]
        kept = [min(len(one.ids), self._max_length) for one in each]
        cut = sum(len(one.ids) for one in whole) - sum(kept)
        return [_next_tokens(one, length) for one, length in zip(each, kept, strict=True)], cut

    def _encoded(self, prompt: Sequence[Message], answer: Sequence[Message]) -> Encoded:
        if len(answer) == 1:
            return self._last.encode([*prompt, *answer])
        silent = [{**message, _WEIGHT: 0} if message[_ROLE] == "assistant" else message for message in prompt]
        return self._all.encode([*silent, *answer])


def _shorter(prompt: Sequence[Message]) -> list[Message] | None:
    """The prompt without its earliest messages, up to the next of the user; None if there would be none left."""
    fewer = without_earliest([*prompt, {_ROLE: "assistant", "content": ""}])
    return None if fewer is None else list(fewer[:-1])


def _next_tokens(encoded: Encoded, length: int) -> Written:
    ids, learned = encoded.ids[:length], encoded.learned[:length]
    targets = ids[1:].copy()
    targets[~learned[1:]] = NOT_LEARNED
    return ids[:-1], targets
