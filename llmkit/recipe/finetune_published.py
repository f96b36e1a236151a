"""The rules of `finetune_checks.py` as JSON Schema.

What it cannot say, and only the loader checks: the type of each value apart, that a tag's or class's name in
`loss.weights` is one of the labels.
"""

from typing import Any, get_args

from llmkit.recipe.finetune_checks import (
    ADAPTED,
    AUGMENT_SETTINGS,
    MIXED_ALONE,
    NEW_MODEL,
    PLAIN_RATIO,
    PROBABILITIES,
    ROWS_ONLY,
    TEXT_DATA,
    UNCACHED,
)
from llmkit.recipe.labelled import FORMS, ROLES, Labelled
from llmkit.recipe.tasks import (
    AUGMENTED,
    CRITERION,
    MIXED,
    PREFERRED,
    TAUGHT,
    UNPROMPTED,
    WEIGHTED,
    Preferences,
    other_task_sections,
)
from llmkit.registry import OBJECTIVES, TASKS, goal_of

Json = dict[str, Any]

_PREFERENCES = get_args(Preferences.model_fields["loss"].annotation)
_MOST_STEPS = 8
"""Ways in one `augment` that this schema looks at for their order."""
_NONE: Json = {"enum": [None, []]}
_OFF: Json = {"enum": [None, 0, "none"]}


def add_finetune_rules(blocks: Json, env: Json) -> None:
    """Add the rules to the blocks of the schema.

    Args:
        blocks: The schema's blocks by name; `Finetune`, `Labelled` and `Recipe` get rules.
        env: What an environment expression looks like: where one stands, the value is not known here.
    """
    rules = blocks["Finetune"].setdefault("allOf", [])
    rules += [_for_task(task, env) for task in TASKS]
    rules += [_for_text(task, env) for task in OBJECTIVES]
    rules += [_losses(), _no_evaluations(), _adapting()]
    rules += [_off("model", name, values=[None]) for name in NEW_MODEL]
    files, dataset = _given("files"), _given("dataset")
    blocks["Labelled"]["oneOf"] = [files, dataset]
    ways = [_set(name) for name in ("layers", "match")]
    blocks["Freeze"]["oneOf"] = [_set("all_but"), {"anyOf": ways}]
    named = {"required": ["finetune"], "properties": {"finetune": _inside("model", _given("name"))}}
    alone = {"allOf": [_object("finetune"), {"not": _object("pretrain")}]}
    blocks["Recipe"]["allOf"].append({"if": alone, "then": named})


def _given(name: str) -> Json:
    return {"type": "object", "required": [name], "properties": {name: {"not": _NONE}}}


def _set(name: str) -> Json:
    return {"required": [name], "properties": {name: {"not": {"const": None}}}}


def _object(name: str) -> Json:
    return {"required": [name], "properties": {name: {"type": "object"}}}


def _inside(name: str, rule: Json) -> Json:
    return {"required": [name], "properties": {name: rule}}


def _below(*path: str, rule: Json) -> Json:
    """A rule for what stands at a path, where something does."""
    for name in reversed(path):
        rule = {"properties": {name: rule}}
    return rule


def _off(*path: str, values: list[Any]) -> Json:
    return _below(*path, rule={"enum": values})


def _of(task: str) -> Json:
    return {"required": ["task"], "properties": {"task": {"const": task}}}


def _for_task(task: str, env: Json) -> Json:
    """What holds for one task."""
    rules = [_off(name, values=[None, []]) for name in sorted(other_task_sections(task))]
    rules += [_rows(task, name, env) for name in ("data", "validation")]
    rules.append(_measured(task, env))
    rules.append(_below("train", "batch", rule={"not": {"type": "string", "pattern": "token"}}))
    if task in UNPROMPTED:
        rules.append(_off("prompts", values=[None, []]))
    if task not in WEIGHTED:
        rules += [_below("loss", name, rule=_OFF) for name in ("weights", "focal", "r_drop")]
    if task not in MIXED:
        rules.append(_below("loss", "mixup", rule=_OFF))
    if task not in CRITERION:
        rules.append(_off("loss", "custom", values=[None]))
    if task not in TAUGHT:
        rules.append(_off("distil", values=[None]))
    if task == "regression":
        rules += [_off("distil", name, values=[plain]) for name, plain in PROBABILITIES.items()]
    if task in UNCACHED:
        rules.append(_off("distil", "cache", values=[None]))
    rules += _compared() + _adapted() + _mixing()
    if task in ("regression", "dpo"):
        rules += [_off("train", name, values=[None, 0]) for name in ("label_smoothing", "z_loss")]
    if task == "cls":
        several = {
            "properties": {"cls": {"required": ["multiple"], "properties": {"multiple": {"const": True}}}}
        }
        one = {"allOf": [_off("cls", "balance", values=[None, "none"]), _below("loss", "weights", rule=_OFF)]}
        rules.append({"if": {"required": ["cls"], **several}, "then": one})
    rules.append(_augmented(task))
    rules += _chats(task)
    return {"if": _of(task), "then": {"allOf": rules}}


def _compared() -> list[Json]:
    """Layers are compared of one pass, and a teacher's words are kept of one."""
    twice = _inside("loss", {"type": "object", **_inside("r_drop", {"not": _OFF})})
    layers = [_off("distil", name, values=[None, 0]) for name in ("hidden", "attention")]
    layers.append(_off("distil", "cache", values=[None]))
    return [{"if": twice, "then": {"allOf": layers}}]


def _mixing() -> list[Json]:
    """What does not go with a mixture of two texts."""
    mixing = _inside("loss", {"type": "object", **_inside("mixup", {"not": _OFF})})
    refused = [_off(*path, values=[None, 0, {}]) for path in MIXED_ALONE]
    return [{"if": mixing, "then": {"allOf": refused}}]


def _adapted() -> list[Json]:
    """What does not go with an adapter."""
    adapted = _inside("adapter", {"not": {"const": None}})
    refused = [_off("train", name, values=[None, False]) for name in ADAPTED]
    return [{"if": adapted, "then": {"allOf": refused}}]


def _rows(task: str, name: str, env: Json) -> Json:
    """Roles and forms of a task's rows."""
    rules: Json = {
        "columns": {"type": "object", "propertyNames": {"enum": list(ROLES[task])}},
        "form": {"anyOf": [{"enum": ["auto", *FORMS[task]]}, env]},
        "separator": {"not": {"const": ""}},
    }
    if task != "tag":
        rules["format"] = {"not": {"const": "conll"}}
    if task != "cls":
        rules["separator"] = {"const": None}
    return _below(name, rule={"properties": rules})


def _measured(task: str, env: Json) -> Json:
    known = {"anyOf": [{"enum": [None, *(f"eval/{metric}" for metric in goal_of(task).metrics)]}, env]}
    return {
        "allOf": [_below("checkpoint", "keep_best", rule=known), _below("stop_early", "metric", rule=known)]
    }


def _augmented(task: str) -> Json:
    """Rows that may be changed in their text, or in their tokens."""
    step: Json = {"allOf": []}
    for kind, having in AUGMENTED.items():
        if task not in having:
            method: Json = {"const": "mask"} if kind == "mask" else {"not": {"const": "mask"}}
            step["allOf"].append({"not": {"type": "object", "properties": {"method": method}}})
    for name, ways in AUGMENT_SETTINGS.items():
        given = {"type": "object", **_inside(name, {"not": {"enum": [None, PLAIN_RATIO]}})}
        step["allOf"].append({"if": given, "then": {"properties": {"method": {"enum": list(ways)}}}})
    back = {"type": "object", **_inside("method", {"const": "back_translate"})}
    step["allOf"].append({"if": back, "then": _given("through")})
    # What comes after another way is no back-translation: of each place in the list, if it is one, so are all before.
    first: Json = {"type": "array", "items": step}
    first["allOf"] = [
        {
            "if": {"prefixItems": [*[True] * place, back], "minItems": place + 1},
            "then": {"prefixItems": [back] * place},
        }
        for place in range(1, _MOST_STEPS)
    ]
    return _below("augment", rule={"anyOf": [first, {"type": "object", **step}, _NONE]})


def _chats(task: str) -> list[Json]:
    """Chat templates and their variables; the settings of each loss of `dpo`."""
    if not TASKS[task].chats:
        return [_off("chat_template", values=[None])]
    joined = _inside("chat_template", {"const": "none"})
    rules: list[Json] = [
        {"if": joined, "then": _off(name, "template_options", values=[None, {}])}
        for name in TASKS[task].sections
    ]
    for name, having in PREFERRED.items() if task == "dpo" else ():
        chosen: Json = {
            "properties": {"loss": {"not": {"enum": [x for x in _PREFERENCES if x not in having]}}}
        }
        if "dpo" not in having:
            chosen["required"] = ["loss"]
        given = {"type": "object", **_inside(name, {"not": {"enum": [None, 0]}})}
        rules.append(_below("dpo", rule={"if": given, "then": chosen}))
    return rules


def _losses() -> Json:
    """A loss of the user's own replaces the others, and must be trusted."""
    custom = {"properties": {"loss": {**_given("custom")}}, "required": ["loss"]}
    trusted = {"required": ["trust_custom_code"], "properties": {"trust_custom_code": {"const": True}}}
    alone = [_below("loss", name, rule=_OFF) for name in ("weights", "focal")]
    alone += [_off("train", name, values=[None, 0]) for name in ("label_smoothing", "z_loss")]
    needless = _below("loss", "trust_custom_code", rule={"not": {"const": True}})
    return {"if": custom, "then": {"allOf": [{"properties": {"loss": trusted}}, *alone]}, "else": needless}


def _no_evaluations() -> Json:
    never = _inside("eval", {"type": "object", **_inside("every", {"const": "never"})})
    refused = [_off("checkpoint", "keep_best", values=[None]), _off("stop_early", values=[None])]
    return {"if": never, "then": {"allOf": refused}}


def _adapting() -> Json:
    adapted = _inside("adapter", {"not": {"const": None}})
    refused = [_off(name, values=[None]) for name in ("freeze", "unfreeze")]
    return {"if": adapted, "then": {"allOf": refused}}


def _for_text(task: str, env: Json) -> Json:
    """What holds for an objective of `pretrain`, which goes on with it."""
    blocks = {name for goal in TASKS.values() for name in goal.sections}
    rules = [_off(name, values=[None, []]) for name in sorted({*blocks, *ROWS_ONLY})]
    others = [name for name in Labelled.model_fields if name not in TEXT_DATA]
    rules += [_off("data", name, values=[None, []]) for name in others]
    if goal_of(task).model == "detector":
        rules.append(_off("distil", values=[None]))
    text = {"type": "object", "propertyNames": {"const": "text"}}
    rules += [_below("data", "columns", rule=text), _measured(task, env)]
    return {"if": _of(task), "then": {"allOf": rules}}
