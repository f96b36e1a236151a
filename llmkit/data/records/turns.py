"""Turns of a conversation, from the forms in which people write them to `{role, content}`, and their order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.data.places import Fault
from llmkit.data.records.form import refused
from llmkit.data.tables import checked_text, short
from llmkit.registry import nearest

Turn = dict[str, Any]

ROLE_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""What the speakers are called, and which role of ours that is; `call` is an assistant that calls a tool."""
_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"), ("speaker", "text"))
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class TurnKeys:
    """The keys of a turn that hold who speaks and what is said."""

    role: str
    content: str


def is_turns(value: Any) -> bool:
    """Whether this is a list of turns, by its first one."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def keys_of(value: Any, asked: Mapping[str, str]) -> TurnKeys | None:
    """The keys of turns, by the first one and the recipe's `columns`; None where they are not known."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return None
    if "role" in asked or "content" in asked:
        known = keys_of(value, {}) or TurnKeys("role", "content")
        return TurnKeys(asked.get("role", known.role), asked.get("content", known.content))
    return next((TurnKeys(*keys) for keys in _KEYS if keys[0] in first), None)


def turns_of(value: Any, column: str, keys: TurnKeys) -> list[Turn]:
    """A list of turns in our form: `role`, `content`, and what belongs to tools.

    Raises:
        Fault: It is no list of objects, or a turn has no known speaker or nothing to say.
    """
    if not isinstance(value, list) or not value:
        raise refused(
            "no turns",
            f"column {column!r} holds {short(value)}, which is no list of turns",
            f"write `[{{{keys.role}: user, {keys.content}: ...}}, {{{keys.role}: assistant, ...}}]`",
            value,
        )
    return [_turn(one, f"{column}[{index}]", keys) for index, one in enumerate(value)]


def _turn(value: Any, column: str, keys: TurnKeys) -> Turn:
    if not isinstance(value, dict) or keys.role not in value:
        found = ", ".join(value) if isinstance(value, dict) else short(value)
        raise refused(
            "no turn",
            f"{column} has no {keys.role!r}; it holds {found}",
            f"a turn is {{{keys.role}: ..., {keys.content}: ...}}; other keys: `columns: {{role: ..., content: ...}}`",
            value,
        )
    role = _role(value[keys.role], f"{column}.{keys.role}")
    kept = {key: value[key] for key in _KEPT if value.get(key) is not None}
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(value.get(keys.content), column)]}
    content = _content(value.get(keys.content), f"{column}.{keys.content}", bool(kept.get("tool_calls")))
    return {"role": role, "content": content, **kept}


def _role(value: Any, where: str) -> str:
    role = ROLE_NAMES.get(str(value).strip().lower())
    if role is None:
        guess = nearest(str(value), list(ROLE_NAMES))
        raise refused(
            "unknown role",
            f"{where} is {short(value)}, which is no role",
            f"did you mean {guess!r}?" if guess else f"known: {', '.join(ROLE_NAMES)}",
            value,
        )
    return role


def _content(value: Any, where: str, may_be_empty: bool) -> str:
    """The text of a turn; parts (`[{type: text, text: ...}]`) are joined."""
    if isinstance(value, list):
        other = next((one for one in value if not isinstance(one, dict) or one.get("type") != "text"), None)
        if other is not None:
            raise refused(
                "not text", f"{where} holds {short(other)}, which is no text", "leave such rows out", other
            )
        value = "".join(str(one.get("text", "")) for one in value)
    if may_be_empty and (value is None or value == ""):
        return ""
    if not isinstance(value, str):
        raise refused(
            "not text", f"{where} holds {short(value)}, not text", "repair or remove the row", value
        )
    if not value.strip():
        raise refused(
            "empty text",
            f"{where} is empty",
            "repair or remove the row; `on_error: skip` leaves such rows out",
            value,
        )
    return checked_text(value, where)


def _call(value: Any, column: str) -> dict[str, Any]:
    """A call of a tool, which is written as JSON: `{"name": ..., "arguments": {...}}`."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise refused(
            "no call of a tool",
            f"{column} calls a tool but holds {short(value)}",
            'write `{"name": ..., "arguments": {...}}`',
            value,
        )
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def check_order(turns: Sequence[Turn], column: str = "messages") -> None:
    """Check who speaks when: the system first, if at all, then user and assistant by turns.

    Tools answer an assistant, each as often as it called, and then the assistant goes on.

    Raises:
        Fault: Somebody speaks who cannot.
    """
    before = ""
    for index, turn in enumerate(turns):
        role = turn["role"]
        if role not in _MAY_FOLLOW[before]:
            raise _out_of_order(role, before, f"{column}[{index}]")
        if role == "tool" and before == "assistant" and not turns[index - 1].get("tool_calls"):
            raise _out_of_order(role, before, f"{column}[{index}]")
        before = role


_MAY_FOLLOW: Mapping[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _out_of_order(role: str, before: str, where: str) -> Fault:
    if role == "system":
        what = "the system speaks after others, but it speaks first or not at all"
    elif before == role:
        what = f"two turns of the {role} follow each other"
    elif role == "tool":
        what = "a tool answers that no assistant called"
    elif before:
        what = f"the {role} speaks after the {before}"
    else:
        what = f"the {role} speaks first"
    hint = (
        "after an optional system turn, user and assistant take turns; `on_error: skip` leaves such rows out"
    )
    return refused("wrong order of roles", f"{where}: {what}", hint, role)
