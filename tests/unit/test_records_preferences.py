"""Rows of `dpo`: every form gives a prompt of turns and two answers of turns."""

import pytest
from records import read, refused, rows

from llmkit.data.records.preferences import _parted

USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": "No"},
)
ROW = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
HUMAN = {"from": "human", "value": "Hi"}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "preference"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "preference"),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "preference"),
        ({"question": "Hi", "chosen": GOOD, "rejected": "No<|im_end|>"}, "preference"),
        (
            {
                "conversations": [HUMAN],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            "sharegpt",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "dialogues"),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
                "rejected": "\n\nHuman: Hi\n\nAssistant: No",
            },
            "dialogues",
        ),
    ],
)
def test_forms(tmp_path, row, form):
    found = read(tmp_path, "a.jsonl", [row], "dpo")
    assert {key: found.rows[0][key] for key in ROW} == ROW
    assert found.form == form
    assert "1.0 turns on average" in found.said


def test_a_system_column(tmp_path):
    row = {"system": "Be kind.", "prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    made = rows(tmp_path, "a.jsonl", [row], "dpo")[0]
    assert made["prompt"] == [{"role": "system", "content": "Be kind."}, USER]


def test_dialogues_part_where_they_differ(tmp_path):
    longer = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: {}"
    row = {"chosen": longer.format("yes"), "rejected": longer.format("no")}
    made = rows(tmp_path, "a.jsonl", [row], "dpo")[0]
    assert [turn["content"] for turn in made["prompt"]] == ["Hi", "Hello", "More"]
    assert (made["chosen"][0]["content"], made["rejected"][0]["content"]) == ("yes", "no")


def test_dialogues_that_part_at_a_question_part_at_the_answer_before_it():
    one, other = [USER, GOOD, USER, GOOD], [USER, GOOD, {**USER, "content": "Bye"}, BAD]
    assert _parted(one, other) == ([USER], one[1:], other[1:])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        {"messages": [USER, GOOD], "kto_tag": "true"},
    ],
)
def test_kto(tmp_path, row):
    found = read(tmp_path, "a.jsonl", [row], "dpo")
    assert {key: found.rows[0][key] for key in ("prompt", "completion", "label")} == {
        "prompt": [USER],
        "completion": [GOOD],
        "label": True,
    }
    assert found.said.endswith("1 of 1 good")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "the prompt does not end with the user's turn"),
        ({"prompt": "Hi", "chosen": "a", "rejected": ""}, "column 'rejected' is empty"),
        ({"prompt": [GOOD], "chosen": "a", "rejected": "b"}, "the prompt does not end with the user's turn"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, "chosen is not what the assistant says"),
        (
            {"prompt": [USER, USER], "chosen": "a", "rejected": "b"},
            "[1]: two turns of the user follow each other",
        ),
        ({"chosen": "Hello", "rejected": "No"}, "column 'chosen' is no dialogue: Hello"),
        (
            {"prompt": "Hi", "completion": "a", "label": "maybe"},
            "column 'label' holds maybe, not true or false",
        ),
    ],
)
def test_wrong_rows(tmp_path, row, said):
    message = refused(tmp_path, "a.jsonl", [row], "dpo")
    assert "a.jsonl:1: " in message
    assert said in message


def test_an_unknown_form(tmp_path):
    message = refused(tmp_path, "a.jsonl", [{"prompt": "a", "chosen": "b", "other": "c"}], "dpo")
    assert "no form that `dpo` knows; the keys found are prompt, chosen, other" in message
    assert "nothing tells which is 'rejected'" in message
