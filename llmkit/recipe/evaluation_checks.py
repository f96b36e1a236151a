"""Rules between the settings of the `eval` section, for the loader and as JSON Schema."""

from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.recipe.labelled import FORMS, ROLES, check_labelled
from llmkit.recipe.positions import Node, find, key_spot
from llmkit.recipe.problems import Problem
from llmkit.registry import TASKS

SECTION = "eval"
_INSTEAD = ("harness", "speed")
"""What is done instead of asking a task."""
Json = dict[str, Any]


def check_evaluation(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """What does not go together in the `eval` section."""
    node = find(root, (SECTION,))
    section = node.plain() if node is not None else None
    if not isinstance(section, dict):
        return
    yield from _one_source(root, section, meant)
    yield from _rows_of_the_task(root, section)
    yield from _one_thing(root, section)
    yield from _something_to_compare(root, section)


def _problem(root: Node, keys: tuple[str, ...], message: str, hint: str) -> Problem:
    """A problem at the deepest of these keys that was written."""
    while len(keys) > 1 and find(root, (SECTION, *keys)) is None:
        keys = keys[:-1]
    return Problem(key_spot(root, (SECTION, *keys)), message, hint)


def _one_source(root: Node, section: Mapping[str, Any], meant: tuple[str, ...]) -> Iterator[Problem]:
    rows = section.get("labelled")
    if not isinstance(rows, dict):
        return
    if section.get("data") not in (None, []):
        message = "`data` and `labelled` both say what to measure on"
        yield _problem(root, ("labelled",), message, "keep one of them")
    given = [key for key in ("files", "dataset") if rows.get(key) not in (None, [])]
    if len(given) == 2:
        message = "`files` and `dataset` both say where the rows are"
        yield _problem(root, ("labelled", "dataset"), message, "keep one of them")
    elif not given and not any(f"{SECTION}.labelled.{key}" in meant for key in ("files", "dataset")):
        message = "`labelled` has neither `files` nor `dataset`"
        yield _problem(root, ("labelled",), message, "add `files: reviews.csv` or `dataset: owner/name`")


def _rows_of_the_task(root: Node, section: Mapping[str, Any]) -> Iterator[Problem]:
    task, rows = section.get("task"), section.get("labelled")
    if not isinstance(rows, Mapping):
        return
    for keys, message, hint in check_labelled(task, rows) if isinstance(task, str) else ():
        yield _problem(root, ("labelled", *keys), message, hint)


def _one_thing(root: Node, section: Mapping[str, Any]) -> Iterator[Problem]:
    given = [key for key in _INSTEAD if section.get(key) is not None]
    if len(given) == 2:
        message = "`harness` and `speed` are two evaluations, and a section is one"
        yield _problem(root, ("speed",), message, "keep one of them, and give the other a recipe of its own")


def _something_to_compare(root: Node, section: Mapping[str, Any]) -> Iterator[Problem]:
    gate = section.get("gate")
    if not isinstance(gate, dict) or (gate.get("max_drop") is None) == (gate.get("against") is None):
        return
    if gate.get("against") is None:
        message = "`max_drop` says how much worse a model may be, and nothing says than which"
        yield _problem(root, ("gate", "max_drop"), message, "add `against: RUN`")
    else:
        message = "`against` names a model to compare with, and nothing says how much worse this one may be"
        yield _problem(root, ("gate", "against"), message, "add `max_drop: 2%`")


def add_evaluation_rules(blocks: Json, env: Json) -> None:
    """Add the rules to the blocks of the schema.

    Args:
        blocks: The schema's blocks by name; `Eval` and `Gate` get rules.
        env: What an environment expression looks like: where one stands, the value is not known here.
    """
    empty: Json = {"enum": [None, []]}
    rules = blocks["Eval"].setdefault("allOf", [])
    rules.append({"not": {"allOf": [_set("labelled"), _set("data", empty)]}})
    rules.append({"not": {"allOf": [_set(name) for name in _INSTEAD]}})
    rules += [_rows(task, env) for task in TASKS]
    both = [_set("max_drop"), _set("against")]
    blocks["Gate"]["anyOf"] = [{"allOf": both}, {"not": {"anyOf": both}}]


def _set(name: str, unset: Json | None = None) -> Json:
    return {"required": [name], "properties": {name: {"not": unset or {"const": None}}}}


def _rows(task: str, env: Json) -> Json:
    """Roles and forms of a task's rows; see `finetune_published.py`."""
    rules: Json = {
        "columns": {"type": "object", "propertyNames": {"enum": list(ROLES[task])}},
        "form": {"anyOf": [{"enum": ["auto", *FORMS[task]]}, env]},
    }
    if task != "tag":
        rules["format"] = {"not": {"const": "conll"}}
    rules["separator"] = {"not": {"const": ""}} if task == "cls" else {"enum": [None]}
    chosen = {"required": ["task"], "properties": {"task": {"const": task}}}
    return {
        "if": chosen,
        "then": {"properties": {"labelled": {"if": {"type": "object"}, "then": {"properties": rules}}}},
    }
