"""Rows of `sft`: conversations, in the forms in which people keep them."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llmkit.data.records.form import Form, average, refused, require, unknown_form
from llmkit.data.records.names import NAMES
from llmkit.data.records.pairs import without_end
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of, text_of
from llmkit.data.records.turns import Turn, TurnKeys, check_order, is_turns, keys_of, turns_of
from llmkit.data.tables import short
from llmkit.recipe.labelled import Labelled

UNANSWERED = "turns of the user at the end, which nobody answers (left out)"
WORDS = {"messages": "messages (OpenAI's form)", "sharegpt": "ShareGPT", "alpaca": "Alpaca"}


def recognise_sft(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with conversations.

    Raises:
        DataError: They are of none that is known.
    """
    columns = columns_of(sample)
    roles = Roles(columns, data.columns, NAMES["sft"])
    counts: Counter[str] = Counter()
    form = _form_of(sample, roles, data)
    if form in ("messages", "sharegpt"):
        require(roles, ("messages",), "sft", sample, form)
        make = _conversation(roles, sample, data, form)
    else:
        require(roles, ("prompt", "completion"), "sft", sample, data.form)
        make = _answered(roles, counts)

    def row(fields: Fields) -> Row:
        messages = _answered_to_the_end(make(fields), counts, roles.column("messages"))
        return {"messages": messages, **_tools(roles.get(fields, "tools"), roles.column("tools"))}

    def said(rows: Sequence[Row]) -> str:
        pair = ", ".join(f"`{roles.column(role)}`" for role in ("prompt", "completion"))
        turns = sum(turn["role"] == "user" for made in rows for turn in made["messages"])
        name = WORDS.get(form, f"pairs of {pair}")
        return f"read as {name}, {average(turns, len(rows))} turns on average{_further(rows)}"

    return Form(form, row, said, counts)


def _form_of(sample: Sequence[Record], roles: Roles, data: Labelled) -> str:
    if data.form != "auto":
        return data.form
    for record in sample:
        value = roles.get(record.fields, "messages")
        if is_turns(value):
            keys = keys_of(value, {})
            return "sharegpt" if keys is not None and keys.role == "from" else "messages"
    if roles.has("prompt", "completion"):
        return "alpaca" if roles.column("prompt") == "instruction" else "pairs"
    lacking = "completion" if roles.has("prompt") else "prompt" if roles.has("completion") else ""
    raise unknown_form("sft", sample, lacking)


def _conversation(
    roles: Roles, sample: Sequence[Record], data: Labelled, form: str
) -> Callable[[Fields], list[Turn]]:
    column = roles.column("messages")
    values = (roles.get(record.fields, "messages") for record in sample)
    keys = next((keys_of(value, data.columns) for value in values if is_turns(value)), None)
    if keys is None:
        raise unknown_form("sft", sample, "messages", form)

    def make(fields: Fields) -> list[Turn]:
        turns = turns_of(roles.value(fields, "messages"), column, keys)
        return [*_system(roles, fields, turns), *turns]

    return make


def _answered(roles: Roles, counts: Counter[str]) -> Callable[[Fields], list[Turn]]:
    """A question, with what it is asked about and what was said before, and its answer."""

    def make(fields: Fields) -> list[Turn]:
        if is_turns(roles.value(fields, "prompt")):
            return _two_lists(roles, fields)
        prompt = roles.text(fields, "prompt")
        about = roles.get(fields, "input")
        if about is not None and about != "":
            prompt = f"{prompt}\n{text_of(about, roles.column('input'), 'input')}"
        answer = without_end(roles.text(fields, "completion"), counts)
        return [
            *_system(roles, fields, []),
            *_history(roles.get(fields, "history"), roles.column("history")),
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]

    return make


def _two_lists(roles: Roles, fields: Fields) -> list[Turn]:
    """A prompt of turns and the turns that answer it."""
    turns: list[Turn] = []
    for role in ("prompt", "completion"):
        value, column = roles.value(fields, role), roles.column(role)
        turns += turns_of(value, column, keys_of(value, {}) or TurnKeys("role", "content"))
    return [*_system(roles, fields, turns), *turns]


def _system(roles: Roles, fields: Fields, turns: Sequence[Turn]) -> list[Turn]:
    """What a column of its own tells the system; nothing where it is empty, or the turns begin with it."""
    value = roles.get(fields, "system")
    if value is None or value == "" or (turns and turns[0]["role"] == "system"):
        return []
    return [{"role": "system", "content": text_of(value, roles.column("system"), "system")}]


def _history(value: Any, column: str) -> list[Turn]:
    """Earlier turns, as pairs of a question and its answer."""
    turns: list[Turn] = []
    for index, pair in enumerate(value or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            hint = "write `[[question, answer], ...]`"
            raise refused(
                "no history", f"{column}[{index}] is {short(pair)}, no question and answer", hint, pair
            )
        turns.append({"role": "user", "content": text_of(pair[0], f"{column}[{index}][0]", "history")})
        turns.append({"role": "assistant", "content": text_of(pair[1], f"{column}[{index}][1]", "history")})
    return turns


def _answered_to_the_end(turns: list[Turn], counts: Counter[str], column: str) -> list[Turn]:
    """The turns up to the assistant's last one: after it there is nothing to learn.

    Raises:
        Fault: Their order is wrong, or the assistant never speaks.
    """
    check_order(turns, column)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        what = "the assistant never speaks, so there is nothing to learn"
        raise refused("no answer", what, "repair or remove the row", turns[-1]["content"])
    counts[UNANSWERED] += len(turns) - 1 - last
    return turns[: last + 1]


def _tools(value: Any, column: str) -> dict[str, Any]:
    """The tools that a row offers, a list of objects or its JSON; none where there is none.

    Raises:
        Fault: They are something else.
    """
    if value is None or value in ("", [], "[]"):
        return {}
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except ValueError:
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        hint = "write a list of objects, each the JSON schema of a function"
        raise refused(
            "no tools", f"column {column!r} holds {short(value)}, which is no list of tools", hint, value
        )
    return {"tools": tools}


def _further(rows: Sequence[Row]) -> str:
    """How many rows have a system turn and tools."""
    system = sum(row["messages"][0]["role"] == "system" for row in rows)
    tools = sum("tools" in row for row in rows)
    words = [f"{system:,} with a system turn"] if system else []
    words += [f"{tools:,} with tools"] if tools else []
    return "".join(f", {word}" for word in words)
