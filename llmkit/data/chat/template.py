"""A tokenizer's chat template: messages -> text -> ids, exactly as serving makes them; and how a turn ends in it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from llmkit.errors import DataError, UsageError

Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]

ASSISTANT = "assistant"
MARK = "qzxvjq"
"""A word that no template holds and no template changes."""

_NOT_CONTENT = ("role", "name", "weight", "tool_call_id")


class Template:
    """A chat template with its tokenizer.

    Args:
        tokenizer: One of transformers'.
        text: The template; None takes the tokenizer's own.
        options: Further variables of the template, such as `enable_thinking`; serving has to give the same.

    Raises:
        UsageError: The tokenizer has no template.
    """

    def __init__(
        self, tokenizer: Any, *, text: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        if text is None and not tokenizer.chat_template:
            raise UsageError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template, so it does not say how a conversation "
                "is written",
                hint="write `chat_template: chatml`, name a file with a template, or write `chat_template: none`: "
                "then prompt and answer are joined, and nothing stands between them",
            )
        self.tokenizer = tokenizer
        self.text = text
        self.options = dict(options or {})

    def render(self, messages: Messages, tools: Tools | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: All of them, or those before an answer.
            tools: What the assistant may call, in JSON schema.
            prompt: Go on to where the assistant begins to speak: what serving gives to the model.

        Raises:
            DataError: The template refuses these messages; it says why.
        """
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.text,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.options,
            )
        except (TemplateError, TypeError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the chat template refuses a conversation of {roles}: {error}",
                hint="look at the order of the roles; or take another template: `chat_template: chatml`",
            ) from error
        return str(rendered)

    def ids(self, text: str) -> list[int]:
        """The ids of what `render` gave."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """What serving gives to the model to get the answer to these messages."""
        return self.ids(self.render(messages, tools, prompt=True))

    @cached_property
    def stops(self) -> frozenset[int]:
        """The ids that end an assistant's turn, in the midst of a conversation and at its end. Serving stops at them.

        Found by rendering two turns of a mark and looking for the first special token behind each.

        Raises:
            UsageError: There is none: a model could never learn to stop.
        """
        probe = [
            {"role": role, "content": f"{MARK}{number}"}
            for number, role in enumerate(("user", ASSISTANT, "user", ASSISTANT))
        ]
        parts = self.render(probe).split(MARK)
        if len(parts) != len(probe) + 1:
            raise UsageError(f"the chat template {self._name} leaves out messages, or says them twice")
        found = {self._first_special(parts[2][1:]), self._first_special(parts[4][1:])} - {None}
        if not found:
            raise UsageError(
                f"the chat template {self._name} ends the assistant's turn with {parts[4][1:]!r}, which holds no "
                "special token: a model could never learn to stop",
                hint="write {{ eos_token }} after the assistant's content, or take `chat_template: chatml`",
            )
        return frozenset(number for number in found if number is not None)

    def _first_special(self, text: str) -> int | None:
        """The id of the special token that comes first; of another added token, if no special one comes."""
        for is_special in (True, False):
            places = [
                (text.index(token), -len(token), number)
                for token, (number, special) in self._added.items()
                if special == is_special and token.strip() and token in text
            ]
            if places:
                return min(places)[2]
        return None

    @cached_property
    def _added(self) -> dict[str, tuple[int, bool]]:
        """Each token beside the ordinary vocabulary: its id, and whether it is special."""
        tokens = {
            token.content: (number, bool(token.special))
            for number, token in self.tokenizer.added_tokens_decoder.items()
        }
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return tokens | {str(token): (int(number), True) for token, number in named}

    @property
    def _name(self) -> str:
        return "given" if self.text is not None else f"of {self.tokenizer.name_or_path!r}"

    def control_token(self, messages: Messages) -> tuple[int, str] | None:
        """The first special token that a message spells in its text: the message's number, counted from 0, and it.

        In the conversation it would be the real one, and end a turn or a text where none ends.
        """
        specials = [token for token, (_, special) in self._added.items() if special and token.strip()]
        for number, message in enumerate(messages):
            for text in _texts(value for key, value in message.items() if key not in _NOT_CONTENT):
                for token in specials:
                    if token in text:
                        return number, token
        return None


def _texts(values: Iterable[Any]) -> list[str]:
    """All texts within values, however deep."""
    found: list[str] = []
    for value in values:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            found += _texts(value.values())
        elif isinstance(value, list | tuple):
            found += _texts(value)
    return found
