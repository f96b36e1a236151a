"""What a source of labelled rows may say for a task, and that the tables about tasks agree."""

from typing import get_args

import pytest

from llmkit.data.records.form import LOOKS
from llmkit.data.records.forms import _RECOGNISERS
from llmkit.data.records.names import NAMES
from llmkit.recipe.labelled import FORMS, ROLES, Form, Labelled, check_labelled
from llmkit.registry import TASKS


def test_every_task_has_roles_forms_and_names():
    assert set(ROLES) == set(FORMS) == set(LOOKS) == set(_RECOGNISERS) == set(TASKS)
    assert set(NAMES) == {*TASKS, "choice", "generation", "retrieval", "passages"}
    for task in TASKS:
        assert set(NAMES[task]) <= set(ROLES[task])
        assert tuple(LOOKS[task]) == FORMS[task]
    assert {form for forms in FORMS.values() for form in forms} | {"auto"} == set(get_args(Form))


@pytest.mark.parametrize(
    ("task", "data", "path", "message", "hint"),
    [
        (
            "cls",
            {"columns": {"txt": "a"}},
            ("columns", "txt"),
            "`txt` is no role of a row of `cls`",
            "`text`?",
        ),
        ("cls", {"columns": {"review": "text"}}, ("columns", "review"), "no role", "`text: review`?"),
        (
            "seq2seq",
            {"columns": {"xyz": "a"}},
            ("columns", "xyz"),
            "no role",
            "write the role first: `source: xyz`",
        ),
        ("cls", {"form": "alpaca"}, ("form",), "not `alpaca`", "`alpaca` is a form of `sft`"),
        ("cls", {"format": "conll"}, ("format",), "a tag for each word", "`task: tag`"),
        ("tag", {"separator": "|"}, ("separator",), "`tag` has none", "leave it out"),
        ("cls", {"separator": ""}, ("separator",), "is empty", "'|'"),
    ],
)
def test_what_a_task_has_not(task, data, path, message, hint):
    ((found_path, found_message, found_hint),) = check_labelled(task, data)
    assert found_path == path
    assert message in found_message
    assert hint in found_hint


def test_what_a_task_has():
    assert check_labelled("cls", {"columns": {"text": "a", "label": "b"}, "separator": "|"}) == []
    assert check_labelled("sft", {"columns": {"role": "who"}, "form": "sharegpt", "format": "json"}) == []
    assert check_labelled("clm", {"columns": {"text": "a"}}) == []
    assert check_labelled("cls", {"columns": 3, "form": "auto"}) == []


def test_one_file_may_stand_without_brackets():
    assert Labelled.model_validate({"files": "a.csv"}).files == ["a.csv"]
