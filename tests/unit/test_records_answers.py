"""Rows of `qa`: SQuAD's nesting and flat ones, answers where they stand."""

import json

import pytest
from records import read, refused, rows

from llmkit.data.records.answers import IMPOSSIBLE, LOOKED_UP, REPAIRED

CONTEXT = "Bonn lies on the Rhine. Bonn is old."


def squad(*qas):
    return json.dumps(
        {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}
    )


def question(text, start, **more):
    return {"id": "q1", "question": "Where?", "answers": [{"text": text, "answer_start": start}], **more}


def test_squad(tmp_path):
    none = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": []}
    found = read(tmp_path, "a.json", squad(question("the Rhine", 13), none), "qa")
    assert [{k: v for k, v in row.items() if k != "place"} for row in found.rows] == [
        {
            "id": "q1",
            "question": "Where?",
            "context": CONTEXT,
            "answers": [{"text": "the Rhine", "start": 13}],
        },
        {"id": "q2", "question": "Why?", "context": CONTEXT, "answers": []},
    ]
    assert found.rows[1]["place"].endswith("a.json: data[0].paragraphs[0].qas[1]")
    assert found.said == "read as SQuAD, 2.0 questions a text on average"
    assert found.form == "squad"
    assert found.counts == {IMPOSSIBLE: 1}


def test_all_rows_when_none_can_be_answered(tmp_path):
    none = {"id": "q2", "question": "Why?", "is_impossible": True}
    assert rows(tmp_path, "a.json", squad(none), "qa")[0]["answers"] == []


@pytest.mark.parametrize(("start", "meant"), [(12, 13), (15, 13), (25, 24), (20, 24), (1, 0)])
def test_an_answer_near_its_start_is_repaired_and_counted(tmp_path, start, meant):
    text = "the Rhine" if meant == 13 else "Bonn"
    found = read(tmp_path, "a.json", squad(question(text, start)), "qa")
    assert found.rows[0]["answers"] == [{"text": text, "start": meant}]
    assert found.counts == {REPAIRED: 1}


def test_an_answer_that_stands_elsewhere(tmp_path):
    message = refused(tmp_path, "a.json", squad(question("the Rhine", 3), question("the Elbe", 13)), "qa")
    assert "data[0].paragraphs[0].qas[1]: the answer 'the Elbe' is not in the context at 13" in message
    assert "where 'the Rhin' stands" in message
    far = [
        {"question": "q", "context": "x" * 100 + " Bonn", "answers": [{"text": "Bonn", "answer_start": 3}]}
    ]
    assert "it stands at 101" in refused(tmp_path, "a.jsonl", far, "qa")


def test_flat_rows(tmp_path):
    content = [
        {"question": "q", "context": CONTEXT, "answers": {"text": ["Bonn"], "answer_start": [24]}},
        {"question": "q", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
        {"question": "q", "context": CONTEXT, "answers": ["old"]},
        {"question": "q", "context": CONTEXT, "answers": "Bonn"},
    ]
    found = read(tmp_path, "a.jsonl", content, "qa")
    assert [row["answers"] for row in found.rows] == [
        [{"text": "Bonn", "start": 24}],
        [],
        [{"text": "old", "start": 32}],
        [{"text": "Bonn", "start": 0}],
    ]
    assert found.rows[0]["id"] == found.rows[0]["place"]
    assert found.counts == {IMPOSSIBLE: 1, LOOKED_UP: 2}


def test_a_table(tmp_path):
    content = f"query,passage,answer,answer_start\nWhere?,{CONTEXT},the Rhine,13\n"
    assert rows(tmp_path, "a.csv", content, "qa")[0]["answers"] == [{"text": "the Rhine", "start": 13}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answers": [{"text": " ", "answer_start": 1}]}, "the answer is  "),
        ({"answers": 3}, "holds 3, which are no answers"),
        ({"answers": {"text": ["a"], "answer_start": []}}, "which are no answers"),
        ({"answers": ["Elbe"]}, "the answer 'Elbe' stands nowhere in the context"),
        ({"answers": ["Bonn"], "context": ""}, "column 'context' is empty"),
    ],
)
def test_wrong_rows(tmp_path, row, said):
    good = {"question": "q", "context": CONTEXT, "answers": ["old"]}
    message = refused(tmp_path, "a.jsonl", [good, {**good, **row}], "qa")
    assert f"a.jsonl:2: {said}" in message or said in message
    assert "a.jsonl:2" in message


def test_rows_without_a_context(tmp_path):
    message = refused(tmp_path, "a.jsonl", [{"question": "q", "answer": "a"}], "qa")
    assert "nothing tells which is 'context'" in message
