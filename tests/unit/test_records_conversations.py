"""Rows of `sft`: each form gives the same turns, and a wrong order is named."""

import json

import pytest
from records import read, refused, rows

from llmkit.data.records.conversations import UNANSWERED
from llmkit.data.records.pairs import CUT

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
SHARED = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
    {"from": "human", "value": "Bye"},
    {"from": "gpt", "value": "See you"},
]
ONE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "turns", "said"),
    [
        ({"messages": TURNS}, TURNS, "read as messages (OpenAI's form), 2.0 turns on average, 1 with a system turn"),
        ({"conversations": SHARED}, TURNS[1:], "read as ShareGPT, 2.0 turns on average"),
        (
            {"conversations": SHARED, "system": "Be kind."},
            TURNS,
            "read as ShareGPT, 2.0 turns on average, 1 with a system turn",
        ),
        (
            {"conversations": TURNS},
            TURNS,
            "read as messages (OpenAI's form), 2.0 turns on average, 1 with a system turn",
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, ONE, "read as Alpaca, 1.0 turns on average"),
        (
            {"instruction": "Bye", "output": "See you", "history": [["Hi", "Hello"]], "system": "Be kind."},
            TURNS,
            "read as Alpaca, 2.0 turns on average, 1 with a system turn",
        ),
        ({"prompt": "Hi", "completion": "Hello"}, ONE, "read as pairs of `prompt`, `completion`, 1.0 turns on average"),
        (
            {"prompt": ONE[:1], "completion": ONE[1:]},
            ONE,
            "read as pairs of `prompt`, `completion`, 1.0 turns on average",
        ),
        ({"question": "Hi", "answer": "Hello"}, ONE, "read as pairs of `question`, `answer`, 1.0 turns on average"),
    ],
)  # fmt: skip
def test_forms(tmp_path, row, turns, said):
    found = read(tmp_path, "a.jsonl", [row], "sft")
    assert found.rows[0]["messages"] == turns
    assert found.said == said


def test_alpaca_with_an_input(tmp_path):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert rows(tmp_path, "a.jsonl", [row], "sft")[0]["messages"][0]["content"] == "Add.\n1 and 2"


def test_other_names(tmp_path):
    row = {"talk": [{"who": "human", "says": "Hi"}, {"who": "bot", "says": "Hello"}]}
    columns = {"messages": "talk", "role": "who", "content": "says"}
    assert rows(tmp_path, "a.jsonl", [row], "sft", columns=columns) == [{"messages": ONE}]
    columns = {"prompt": "q", "completion": "a"}
    assert rows(tmp_path, "a.jsonl", [{"q": "Hi", "a": "Hello"}], "sft", columns=columns) == [
        {"messages": ONE}
    ]


def test_tools(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [
        ONE[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        ONE[1],
    ]
    openai = {"messages": [ONE[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *turns[2:]]}
    shared = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "Hello"},
        ]
    }
    for row in ({**openai, "tools": tools}, {**shared, "tools": json.dumps(tools)}):
        assert rows(tmp_path, "a.jsonl", [row], "sft") == [{"messages": turns, "tools": tools}]


def test_parts_of_a_turn_are_joined(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, ONE[1]]}
    assert rows(tmp_path, "a.jsonl", [row], "sft") == [{"messages": ONE}]
    row = {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ONE[1]]}
    assert "which is no text" in refused(tmp_path, "a.jsonl", [row], "sft")


def test_what_nobody_answers_is_left_out_and_counted(tmp_path):
    found = read(tmp_path, "a.jsonl", [{"messages": TURNS[1:4]}], "sft")
    assert found.rows[0]["messages"] == ONE
    assert found.counts == {UNANSWERED: 1}


def test_marks_of_the_end(tmp_path):
    found = read(tmp_path, "a.jsonl", [{"prompt": "Hi", "completion": "Hello<|endoftext|>"}], "sft")
    assert found.rows[0]["messages"] == ONE
    assert found.counts == {CUT: 1}


def turns(*roles):
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (turns("assistant", "user"), "messages[0]: the assistant speaks first"),
        (turns("user", "user", "assistant"), "messages[1]: two turns of the user follow each other"),
        (
            turns("user", "assistant", "assistant"),
            "messages[2]: two turns of the assistant follow each other",
        ),
        (turns("user", "system", "assistant"), "messages[1]: the system speaks after others"),
        (turns("system", "assistant"), "messages[1]: the assistant speaks after the system"),
        (turns("user", "assistant", "tool"), "messages[2]: a tool answers that no assistant called"),
        (turns("user"), "the assistant never speaks"),
        (
            turns("user", "asistant"),
            "messages[1].role is asistant, which is no role\n  did you mean 'assistant'?",
        ),
        ([{"role": "user", "content": " "}], "messages[0].content is empty"),
        ([{"role": "user"}], "messages[0].content holds null, not text"),
        ([{"content": "x"}, {"role": "user", "content": "x"}], "messages[0] has no 'role'; it holds content"),
        ([], "column 'messages' holds [], which is no list of turns"),
    ],
)
def test_a_wrong_row_is_named_or_skipped(tmp_path, messages, said):
    content = [{"messages": ONE}, {"messages": messages}]
    message = refused(tmp_path, "a.jsonl", content, "sft")
    assert f"a.jsonl:2: {said}" in message
    found = read(tmp_path, "a.jsonl", content, "sft", on_error="skip")
    assert (len(found.rows), found.skipped.num_skipped) == (1, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "completion": ""}, "column 'completion' is empty"),
        ({"prompt": 3, "completion": "a"}, "column 'prompt' holds 3, which is of type int, not text"),
        ({"prompt": "Hi", "completion": "a", "tools": "x"}, "which is no list of tools"),
        ({"prompt": "Hi", "completion": "a", "history": ["x"]}, "history[0] is x, no question and answer"),
    ],
)
def test_wrong_pairs(tmp_path, row, said):
    assert said in refused(tmp_path, "a.jsonl", [row], "sft")


def test_an_unknown_form(tmp_path):
    message = refused(tmp_path, "a.jsonl", [{"ask": "a", "reply": "b"}], "sft")
    assert "a.jsonl:1: no form that `sft` knows; the keys found are ask, reply" in message
    assert "sharegpt: `conversations`, a list of {from, value}" in message
    message = refused(tmp_path, "a.jsonl", [{"prompt": "a", "completoin": "b"}], "sft")
    assert "`columns: {completion: completoin}`" in message
