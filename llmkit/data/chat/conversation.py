"""A conversation that fits: what is left out where it is longer than the model reads; and pairs without a template."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from llmkit.data.chat.masks import Encoded, Learn, encode_turns
from llmkit.data.chat.template import ASSISTANT, Messages, Template, Tools
from llmkit.errors import DataError, UsageError

TooLong = Literal["cut", "drop", "error"]

_BEFORE_ALL = ("system", "developer")


class Conversations(Protocol):
    """How conversations are written as ids: by a template, or joined."""

    stops: frozenset[int]

    def encode(self, messages: Messages, tools: Tools | None = None) -> Encoded:
        """A conversation as ids, with what is learned of it."""
        ...

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """What serving gives to the model to get the answer to these messages."""
        ...


def conversations_of(
    tokenizer: Any,
    template: str | None,
    *,
    learn: Learn = "all",
    options: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    too_long: TooLong = "cut",
) -> "Chat | Plain":
    """How a recipe wants conversations written.

    Args:
        tokenizer: One of transformers'.
        template: What `chosen_template` gave; None joins prompt and answer.
        learn: Every turn of the assistant, or the last alone.
        options: Further variables of the template.
        max_length: Tokens at most; None for no limit.
        too_long: What becomes of a longer one; see `Chat`.

    Raises:
        UsageError: The template ends no turn, or does not allow what is to be learned; the tokenizer has no end token.
    """
    if template is None:
        return Plain(tokenizer, max_length=max_length, too_long=too_long)
    own = Template(tokenizer, text=template, options=options)
    return Chat(own, learn=learn, max_length=max_length, too_long=too_long)


class Chat:
    """Conversations by a chat template.

    One that is too long is cut by `cut`: its earliest messages go, up to the next of the user, the system's stays; when
    only the last question and answer are left, the end goes. With `drop` nothing of it is left to learn; with `error`
    it is one.

    Args:
        template: How they are written.
        learn: Every turn of the assistant, or the last alone.
        max_length: Tokens at most; None for no limit.
        too_long: What becomes of a longer one.

    Raises:
        UsageError: The template ends no turn, or does not allow what is to be learned.
    """

    def __init__(
        self,
        template: Template,
        *,
        learn: Learn = "all",
        max_length: int | None = None,
        too_long: TooLong = "cut",
    ) -> None:
        self.template = template
        self.stops = template.stops
        self._learn: Learn = learn
        self._max_length = max_length
        self._too_long = too_long
        self._try()

    def encode(self, messages: Messages, tools: Tools | None = None) -> Encoded:
        """A conversation as ids, with what is learned of it; see `masks.encode_turns`.

        Raises:
            DataError: As there; or it is too long and that is to be an error.
        """
        whole = encode_turns(self.template, messages, tools, learn=self._learn)
        if self._max_length is None or len(whole.ids) <= self._max_length:
            return whole
        if self._too_long != "cut":
            return _shortened(whole, self._max_length, self._too_long)
        kept = whole
        while len(kept.ids) > self._max_length and (fewer := without_earliest(messages)):
            messages = fewer
            kept = encode_turns(self.template, messages, tools, learn=self._learn)
        left_out = len(whole.ids) - len(kept.ids)
        kept = _shortened(kept, self._max_length, "cut")
        return replace(kept, cut=kept.cut + left_out)

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """What serving gives to the model to get the answer to these messages."""
        return self.template.prompt_ids(messages, tools)

    def _try(self) -> None:
        """See on a conversation of two turns whether what is to be learned can be."""
        said = [("user", "one"), (ASSISTANT, "two"), ("user", "three"), (ASSISTANT, "four")]
        messages = [{"role": role, "content": content} for role, content in said]
        try:
            found = encode_turns(self.template, messages, learn=self._learn)
        except DataError as error:
            raise UsageError(
                f"with this chat template, `learn: {self._learn}` cannot be: {error.message}", hint=error.hint
            ) from error
        if found.passed_over:
            raise UsageError(
                "the chat template's prompt ends with characters that make one token with the first of an answer, so "
                "training and serving would differ in every turn",
                hint="end the template's prompt without a blank, or write `learn: last`, which is exact",
            )


class Plain:
    """One prompt and one answer, joined with nothing between; the end token follows.

    Both are encoded by themselves, as serving gives the prompt alone and the answer comes token by token.

    Args:
        tokenizer: One of transformers', with an end token.
        max_length: Tokens at most; None for no limit.
        too_long: `cut` takes away the end, `drop` leaves nothing to learn, `error` is one.

    Raises:
        UsageError: The tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None = None, too_long: TooLong = "cut") -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                f"tokenizer {tokenizer.name_or_path!r} has no end token, so a model could never learn to stop",
                hint='add `"eos_token": "..."` (a token of its vocabulary) to its tokenizer_config.json',
            )
        self.stops = frozenset({int(tokenizer.eos_token_id)})
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._too_long = too_long

    def encode(self, messages: Messages, tools: Tools | None = None) -> Encoded:
        """The prompt's ids, the answer's and the end token; these are learned.

        Raises:
            DataError: The messages are not one of the user and one of the assistant, or there are tools; it is too
                long and that is to be an error.
        """
        if [message.get("role") for message in messages] != ["user", ASSISTANT]:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"without a chat template a row is one prompt and one answer; this one has the roles {roles}",
                hint="name a template: `chat_template: chatml`",
            )
        prompt = self.prompt_ids(messages[:1], tools)
        answer = [*self._ids(messages[1]["content"]), *self.stops]
        learned = np.arange(len(prompt) + len(answer)) >= len(prompt)
        whole = Encoded(np.asarray(prompt + answer, dtype=np.int64), learned)
        if self._max_length is None or len(whole.ids) <= self._max_length:
            return whole
        return _shortened(whole, self._max_length, self._too_long)

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """What serving gives to the model to get the answer to this message.

        Raises:
            DataError: There are tools, or messages before.
        """
        if tools or len(messages) != 1:
            raise DataError(
                "without a chat template there is no place for tools or earlier messages",
                hint="name a template: `chat_template: chatml`",
            )
        return self._ids(messages[0]["content"])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def without_earliest(messages: Messages) -> Messages | None:
    """The messages without the earliest, up to the next of the user; None if no answer would be left."""
    start = 1 if messages[0].get("role") in _BEFORE_ALL else 0
    for number in range(start + 1, len(messages)):
        if messages[number].get("role") == "user":
            rest = messages[number:]
            has_answer = any(message.get("role") == ASSISTANT for message in rest)
            return [*messages[:start], *rest] if has_answer else None
    return None


def _shortened(whole: Encoded, max_length: int, too_long: TooLong) -> Encoded:
    """At most `max_length` tokens: the end goes; of one to be dropped, all targets too."""
    over = len(whole.ids) - max_length
    if over <= 0:
        return whole
    if too_long == "error":
        raise DataError(
            f"the conversation has {len(whole.ids):,} tokens, {over:,} more than the {max_length:,} that are read",
            hint="write `too_long: cut` or `too_long: drop`, or take a model that reads more",
        )
    learned = whole.learned[:max_length]
    if too_long == "drop":
        learned = np.zeros_like(learned)
    return replace(whole, ids=whole.ids[:max_length], learned=learned, cut=over)
