"""Which tokens of a conversation are learned: what the assistant says, up to the token that ends its turn.

Few templates mark this, so it is found by rendering. Before each turn stands what serving gives to the model there
(`Template.prompt_ids`), token for token; the turn goes to the last end-of-turn token before the next message. Where a
template does not allow that (it changes earlier turns when later ones come, or opens a turn in serving with what
training does not have), that is an error and not a guess.

Shapes: T tokens of a conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmkit.data.chat.template import ASSISTANT, MARK, Messages, Template, Tools
from llmkit.errors import DataError

Learn = Literal["all", "last"]

_OTHER_TEMPLATE = "take a template that knows such messages: `chat_template: FILE`"


class NotExactError(DataError):
    """What serving gives to the model before a turn is not what stands before it in training."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids.

    Attributes:
        ids: [T].
        learned: [T]: whether a token is to be predicted from those before it.
        cut: Tokens that did not fit and were left out.
        passed_over: Turns that are not learned though they are the assistant's: their first characters melt into one
            token with the end of the prompt (a line break after a line break, mostly), which serving never makes.
    """

    ids: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]
    cut: int = 0
    passed_over: int = 0

    @property
    def num_targets(self) -> int:
        """How many tokens are learned; the first has none before it and cannot be."""
        return int(self.learned[1:].sum())


def encode_turns(
    template: Template, messages: Messages, tools: Tools | None = None, *, learn: Learn = "all"
) -> Encoded:
    """The ids of a conversation, as `apply_chat_template` gives them, with what is learned of it.

    What comes after the last turn of the assistant is left out, for nothing is learned of it. A message with
    `weight: 0` (OpenAI's form) is not learned.

    Args:
        template: How it is written.
        messages: In their order.
        tools: What the assistant may call, in JSON schema.
        learn: Every turn of the assistant, or the last alone.

    Raises:
        DataError: No turn is to be learned, the template refuses the messages, or one of them spells a special token.
        NotExactError: What stands before a learned turn is not what serving would give.
    """
    turns = [number for number, message in enumerate(messages) if message.get("role") == ASSISTANT]
    if not turns:
        raise DataError("the conversation has no message of the assistant, so there is nothing to learn")
    messages = list(messages[: turns[-1] + 1])
    _refuse_control_tokens(template, messages)
    wanted = [n for n in (turns if learn == "all" else turns[-1:]) if messages[n].get("weight", 1) != 0]
    text = template.render(messages, tools)
    _refuse_left_out(template, text, messages, tools)
    ids = template.ids(text)
    spans: list[tuple[int, int]] = []
    for number in wanted:
        prompt = template.render(messages[:number], tools, prompt=True)
        if not text.startswith(prompt):
            raise _not_exact(number, prompt, text, is_last=number == turns[-1])
        prompt_ids = template.ids(prompt)
        if ids[: len(prompt_ids)] != prompt_ids:
            if number != turns[-1] or not (joined := _joined(template, text, prompt, prompt_ids, ids, spans)):
                continue
            ids = joined
        limit = len(ids)
        if number != turns[-1]:
            limit = _common(ids, template.ids(template.render(_marked(messages, number + 1), tools)))
        spans.append((len(prompt_ids), _end(template, ids, len(prompt_ids), limit, number)))
    learned = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        learned[start:end] = True
    return Encoded(np.asarray(ids, dtype=np.int64), learned, passed_over=len(wanted) - len(spans))


def _marked(messages: Messages, number: int) -> Messages:
    """The messages, one of them saying something else: where it begins, what is in common with the real ones ends."""
    other = {**messages[number], "content": MARK}
    return [*messages[:number], other, *messages[number + 1 :]]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _end(template: Template, ids: Sequence[int], start: int, limit: int, number: int) -> int:
    """Behind the last end-of-turn token of ids[start:limit]."""
    for place in range(limit - 1, start - 1, -1):
        if ids[place] in template.stops:
            return place + 1
    raise NotExactError(
        f"message {number + 1}: the chat template does not end this turn of the assistant with an end-of-turn token, "
        "so it would be learned never to stop",
        hint="write `learn: last`, or end every turn in the template",
    )


def _joined(
    template: Template,
    text: str,
    prompt: str,
    prompt_ids: list[int],
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
) -> list[int] | None:
    """What serving has before and after the last turn: the prompt's ids, then those of the answer by itself.

    None where that is not the same text, or the turns before it would not be the same ids.
    """
    joined = [*prompt_ids, *template.ids(text[len(prompt) :])]
    done = spans[-1][1] if spans else 0
    same_turns = joined[:done] == list(ids[:done])
    decode = template.tokenizer.decode
    same_text = decode(joined, skip_special_tokens=False) == decode(list(ids), skip_special_tokens=False)
    return joined if same_turns and same_text else None


def _refuse_control_tokens(template: Template, messages: Messages) -> None:
    found = template.control_token(messages)
    if found is not None:
        number, token = found
        raise DataError(
            f"message {number + 1} ({messages[number].get('role')}) spells the special token {token!r} in its text, "
            "which would be taken for the real one",
            hint="take it out: the chat template writes the special tokens itself",
        )


def _refuse_left_out(template: Template, text: str, messages: Messages, tools: Tools | None) -> None:
    """What a template does not know, it says nothing of: the model would learn to stop instead of to call a tool."""
    if tools and template.render(messages) == text:
        raise DataError("the chat template leaves out the tools", hint=_OTHER_TEMPLATE)
    for number, message in enumerate(messages):
        where = f"message {number + 1} ({message.get('role')})"
        if message.get("tool_calls"):
            silent = {key: value for key, value in message.items() if key != "tool_calls"}
            others = [*messages[:number], silent, *messages[number + 1 :]]
            if template.render(others, tools) == text:
                raise DataError(
                    f"{where}: the chat template leaves out the tools that it calls", hint=_OTHER_TEMPLATE
                )
        # A line of its content, for the reasoning of earlier turns is left out by right, and blanks are trimmed.
        content = message.get("content")
        line = content.strip().splitlines()[-1:] if isinstance(content, str) else []
        if message.get("role") != "tool" and line and line[0].strip() not in text:
            raise DataError(
                f"{where}: the chat template leaves out what it says ({line[0][:60]!r})", hint=_OTHER_TEMPLATE
            )


def _not_exact(number: int, prompt: str, text: str, *, is_last: bool) -> NotExactError:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
    message = (
        f"message {number + 1}: in serving, {prompt[max(0, same - 20) :][:60]!r} stands before this turn of the "
        f"assistant; in the whole conversation it is {text[max(0, same - 20) :][:60]!r}"
    )
    if is_last:
        hint = (
            "set the template's variables to how it is served (`template_options`), or take another template"
        )
    else:
        hint = "the template changes earlier turns when later ones come: write `learn: last`, which is exact"
    return NotExactError(message, hint=hint)
