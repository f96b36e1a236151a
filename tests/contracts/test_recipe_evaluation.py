"""The `eval` section: the published JSON Schema and the loader agree on it, and the loader says why."""

import copy
from typing import Any

import pytest
from test_recipe_schema import VALIDATOR, loads

from llmkit.errors import RecipeError
from llmkit.recipe import load_recipe

# The section, and what the loader's message holds; nothing: it is good.
CASES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"task": "choice", "labelled": {"files": "a.jsonl"}}, ""),
    ({"task": "sums"}, "task"),
    ({"labelled": {"files": "a.csv"}, "data": {"files": "b.txt"}}, "both say what to measure on"),
    ({"labelled": {"files": "a.csv", "dataset": "b"}}, "both say where the rows are"),
    ({"labelled": {"form": "columns"}}, "neither `files` nor `dataset`"),
    ({"task": "cls", "labelled": {"files": "a", "columns": {"text": "review"}}}, ""),
    ({"task": "cls", "labelled": {"files": "a", "columns": {"txt": "review"}}}, "`txt` is no role"),
    ({"task": "cls", "labelled": {"files": "a", "format": "conll"}}, "a tag for each word"),
    ({"task": "tag", "labelled": {"files": "a", "format": "conll"}}, ""),
    ({"task": "tag", "labelled": {"files": "a", "separator": "|"}}, "parts the labels of `cls`"),
    ({"task": "cls", "labelled": {"files": "a", "form": "sharegpt"}}, "not `sharegpt`"),
    ({"metrics": ["accuracy", "loss"]}, ""),
    ({"metrics": ["acuracy"]}, "did you mean `accuracy`?"),
    ({"harness": {"tasks": "arc_easy"}}, ""),
    ({"harness": {}}, "tasks"),
    ({"harness": {"tasks": ["a"]}, "speed": {}}, "two evaluations"),
    ({"speed": {"batch": 4, "length": [64, "1k"]}}, ""),
    ({"speed": {"batch": 0}}, "batch"),
    ({"gate": {"fail_under": {"accuracy": 0.9}}}, ""),
    ({"gate": {"max_drop": "2%"}}, "nothing says than which"),
    ({"gate": {"max_drop": "2%", "against": "runs/old"}}, ""),
    ({"gate": {"against": "runs/old"}}, "nothing says how much worse"),
    ({"gate": {"against": None, "max_drop": None}}, ""),
    ({"metrics": "accuracy"}, ""),
    ({"metrics": ["macro_precision", "weighted_f1", "r2"]}, ""),
    ({"metrics": "macro_precison"}, "did you mean `macro_precision`?"),
    ({"gate": {"max_drop": 2, "against": "runs/old"}}, "max_drop"),
    ({"noise": {"typos": "5%", "seeds": 3}}, ""),
    ({"noise": {"seeds": 0}}, "seeds"),
    ({"retrieval": {"corpus": "p.jsonl", "top": 5}}, ""),
    ({"context": 128, "stride": 64, "resamples": 0}, ""),
]


@pytest.mark.parametrize(("section", "said"), CASES)
def test_the_loader_and_the_schema_agree_and_the_loader_says_why(section: dict[str, Any], said: str) -> None:
    recipe = {"llmkit": 1, "eval": copy.deepcopy(section)}
    assert loads(recipe) == VALIDATOR.is_valid(recipe) == (not said)
    if said:
        with pytest.raises(RecipeError, match=r".") as error:
            load_recipe(recipe)
        assert said in "\n".join(map(str, error.value.problems))
