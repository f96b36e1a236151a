"""The JSON Schema of recipes, for editors and other programs. It accepts and rejects what the loader does.

What JSON Schema cannot say, and only the loader checks:

- `vocab_size` must hold the further `special_tokens` too, and more of them for some algorithms; that sources have
  distinct names;
- what a recipe that extends another lacks: the schema cannot see the other, so it asks for less;
- the value of `${env:NAME}`: any complete expression is accepted where a number or a word belongs, also one
  that quotes keep text;
- that `mlm.mask_ratio` and `mlm.random_ratio` are not more than 1 together;
- that `variant` is one of `variants`, and what a variant lacks or breaks with the recipe under it;
- YAML itself: duplicate keys, tags, depth, size; secrets that stand in the open.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, get_args

from llmkit.recipe import fields
from llmkit.recipe.architectures import KINDS, NOT_COUNTED, OWN, family_of_preset
from llmkit.recipe.block import Block
from llmkit.recipe.checks import BUILT_IN_TOKENS, BYTES
from llmkit.recipe.compression_checks import add_compression_rules
from llmkit.recipe.evaluation_checks import add_evaluation_rules
from llmkit.recipe.finetune_published import add_finetune_rules
from llmkit.recipe.optimizers import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE, PARTIAL_SETTINGS, SCHEDULES
from llmkit.recipe.schema import Preset, Recipe
from llmkit.recipe.units import Amount
from llmkit.recipe.variants import FIXED, NAME, TAKEN
from llmkit.registry import OBJECTIVES, ModelKind

Json = dict[str, Any]

_ENV: Json = {
    "type": "string",
    "pattern": r"\$\{env:[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}",
    "description": "The value of an environment variable: `${env:NAME}` or `${env:NAME:-default}`.",
}
_ENV_REF: Json = {"$ref": "#/$defs/env"}
_RENAMED = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema() -> Json:
    """The JSON Schema (draft 2020-12) of a recipe file."""
    raw = Recipe.model_json_schema()
    blocks: Json = {**raw.pop("$defs"), "Recipe": raw}
    classes = {s.block.__name__: s.block for s in fields.settings().values() if s.block is not None}
    for name, block in blocks.items():
        _tidy(block, classes.get(name, Recipe))
    partial = _partial(blocks)
    _add_rules(blocks)
    _add_variants(blocks["Recipe"], partial)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmkit recipe, version 1",
        "if": _given("extends"),
        "then": {"$ref": "#/$defs/RecipePart"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": {"env": _ENV, **blocks, **partial},
    }


def schema_text() -> str:
    """The JSON Schema as the text that is published."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _tidy(block: Json, owner: type[Block]) -> None:
    """Pydantic's schema of one block: our defaults, standard words, `${env:}` where it may stand."""
    block.pop("title", None)
    for name, schema in block["properties"].items():
        default = owner.model_fields[name].default
        kept = {"description": schema.pop("description", "")}
        schema.pop("title", None)
        if "default" in schema:
            del schema["default"]
            if not isinstance(default, Block):
                plain = str(default) if isinstance(default, Amount) else default
                kept["default"] = list(plain) if isinstance(plain, tuple) else plain
        block["properties"][name] = {**_with_env(_standard(schema)), **kept}


def _standard(schema: Any) -> Any:
    """Limits by their names in JSON Schema."""
    if isinstance(schema, list):
        return [_standard(part) for part in schema]
    if isinstance(schema, dict):
        return {_RENAMED.get(name, name): _standard(part) for name, part in schema.items()}
    return schema


def _is_free_text(schema: Json) -> bool:
    return schema.get("type") == "string" and not {"pattern", "enum", "const"} & set(schema)


def _with_env(schema: Json) -> Json:
    """The schema that also accepts an environment expression in the place of a scalar."""
    if "$ref" in schema or schema.get("type") == "object" or _is_free_text(schema):
        return schema
    if schema.get("type") == "array":
        for name in ("items", "prefixItems"):
            part = schema.get(name)
            if isinstance(part, dict):
                schema[name] = _with_env(part)
            elif isinstance(part, list):
                schema[name] = [_with_env(inner) for inner in part]
        return schema
    if "anyOf" not in schema:
        return {"anyOf": [schema, _ENV_REF]}
    parts = [_with_env(part) if part.get("type") == "array" else part for part in schema["anyOf"]]
    scalars = [
        part for part in parts if part.get("type") not in ("array", "object", "null") and "$ref" not in part
    ]
    free = not scalars or any(_is_free_text(part) for part in scalars)
    return {**schema, "anyOf": parts if free else [*parts, _ENV_REF]}


def _given(name: str, *below: str) -> Json:
    """A key, or a key inside it and so on, is there and neither null nor empty."""
    last: Json = {"not": {"enum": [None, []]}}
    inner = _given(*below) if below else last
    return {"type": "object", "required": [name], "properties": {name: inner}}


def _section(name: str) -> Json:
    return {"required": [name], "properties": {name: {"type": "object"}}}


def _not_both(*names: str) -> Json:
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {"not": {"anyOf": [{"allOf": [_given(a), _given(b)]} for a, b in pairs]}}


_ONE_MODEL = [
    _not_both("preset", "architecture", "name"),
    _not_both("preset", "config"),
    _not_both("name", "config"),
]


def _fits(kind: ModelKind) -> Json:
    """The models that cannot be of this kind are refused to the objectives that need it."""
    objectives = [name for name, goal in OBJECTIVES.items() if goal.model == kind]
    chosen: Json = {"properties": {"objective": {"enum": objectives}}}
    if "clm" not in objectives:
        chosen["required"] = ["objective"]
    others = [name for name, kinds in KINDS.items() if kind not in kinds]
    presets = [name for name in get_args(Preset) if family_of_preset(name) in others]
    types = sorted({OWN.get(name, {"model_type": name})["model_type"] for name in others})
    config = {"type": "object", "required": ["model_type"], "properties": {"model_type": {"enum": types}}}
    refused = {"preset": {"enum": presets}, "architecture": {"enum": others}, "config": config}
    return {
        "if": chosen,
        "then": {
            "properties": {"model": {"properties": {key: {"not": what} for key, what in refused.items()}}}
        },
    }


def _not_counted() -> Json:
    """A counted model has none of what training by gradients has."""
    config = {
        "type": "object",
        "required": ["model_type"],
        "properties": {"model_type": {"const": "llmkit-ngram"}},
    }
    by_name: Json = {"required": ["architecture"], "properties": {"architecture": {"const": "ngram"}}}
    by_config: Json = {"required": ["config"], "properties": {"config": config}}
    counted: Json = {"type": "object", "anyOf": [by_name, by_config]}
    refused: Json = {}
    for setting in NOT_COUNTED:
        *block, name = setting.split(".")
        place = refused
        for part in block:
            place = place.setdefault(part, {"properties": {}})["properties"]
        place[name] = {"enum": [None, 0]}
    return {"if": {"required": ["model"], "properties": {"model": counted}}, "then": {"properties": refused}}


def _partial(blocks: Json) -> Json:
    """The blocks of a recipe that extends another: nothing but the schema's version is required."""
    names = set(blocks)
    partial: Json = {}
    for name, block in copy.deepcopy(blocks).items():
        if name != "Recipe":
            block.pop("required", None)
        partial[f"{name}Part"] = _renamed(block, names)
    partial["ModelPart"]["allOf"] = list(_ONE_MODEL)
    partial["SourcePart"]["allOf"] = [_not_both("files", "dataset")]
    return partial


def _add_variants(recipe: Json, partial: Json) -> None:
    """A variant holds any of a recipe's settings, but those that all variants share; nothing of it is required."""
    settings: Json = partial["RecipePart"]["properties"]
    shared = {name: schema for name, schema in settings.items() if name not in FIXED}
    partial["Variant"] = {
        "type": ["object", "null"],
        "description": "The settings that a variant changes.",
        "additionalProperties": False,
        "properties": shared,
    }
    names: Json = {"pattern": f"^{NAME.pattern}$", "not": {"enum": list(TAKEN)}}
    listed: Json = {
        "type": ["object", "null"],
        "propertyNames": names,
        "additionalProperties": {"$ref": "#/$defs/Variant"},
    }
    for properties in (recipe["properties"], settings):
        properties["variants"] = {**listed, "description": properties["variants"]["description"]}
    none_chosen: Json = {"properties": {"variant": {"const": None}}}
    recipe["allOf"].append({"anyOf": [none_chosen, _given("variants")]})


def _renamed(schema: Any, names: set[str]) -> Any:
    if isinstance(schema, list):
        return [_renamed(part, names) for part in schema]
    if not isinstance(schema, dict):
        return schema
    target = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if target in names:
        return {**schema, "$ref": f"#/$defs/{target}Part"}
    return {name: _renamed(part, names) for name, part in schema.items()}


def _goes_with(setting: str, having: list[str]) -> Json:
    """A setting of `optim` that only some optimizers, or schedules, have."""
    kind, default = ("name", DEFAULT_OPTIMIZER)
    if having[0] in SCHEDULES:
        kind, default = ("schedule", DEFAULT_SCHEDULE)
    chosen: Json = {"properties": {kind: {"anyOf": [{"enum": having}, _ENV_REF]}}}
    if default not in having:
        chosen["required"] = [kind]
    return {"if": _given(setting), "then": chosen}


def _of_eight_bits() -> list[Json]:
    """Rounded to floats, or activations too: then bits are 8; and floats have no offset."""
    apart = (("float8", "bits", 4), ("float8", "symmetric", False), ("activations", "bits", 4))
    return [{"not": {"allOf": [_inside(name, True), _inside(other, value)]}} for name, other, value in apart]


_KEPT_OF_A_TEACHER: Json = {
    "direction": {"not": {"const": "reverse"}},
    **{name: {"not": {"type": "number", "exclusiveMinimum": 0}} for name in ("hidden", "attention")},
}
"""What goes with `distil.cache`: probabilities of what the teacher holds for likely."""


def _inside(name: str, value: Any) -> Json:
    return {"required": [name], "properties": {name: {"const": value}}}


def _of_objectives(name: str) -> Json:
    """The block of some objectives' settings: the recipe must name one of them."""
    having = [objective for objective, goal in OBJECTIVES.items() if name in goal.sections]
    chosen: Json = {"properties": {"objective": {"anyOf": [{"enum": having}, _ENV_REF]}}}
    return {"if": _given(name), "then": {"required": ["objective"], **chosen}}


def _measured(objective: str, metrics: Sequence[str]) -> tuple[Json, Json]:
    """The best checkpoint, and what an evaluation reports, are by what the objective measures.

    Returns:
        The rule within `pretrain`, and that of the recipe.
    """
    chosen: Json = {"properties": {"objective": {"const": objective}}}
    if objective != "clm":
        chosen["required"] = ["objective"]
    best = {"anyOf": [{"enum": [None, *(f"eval/{name}" for name in metrics)]}, _ENV_REF]}
    kept = {"properties": {"checkpoint": {"properties": {"keep_best": best}}}}
    own = {"required": ["pretrain"], "properties": {"pretrain": {"type": "object", **chosen}}}
    listed = {"items": {"anyOf": [{"enum": list(metrics)}, _ENV_REF]}}
    reported = {"properties": {"eval": {"if": _given("model"), "else": {"properties": {"metrics": listed}}}}}
    return {"if": chosen, "then": kept}, {"if": own, "then": reported}


def _add_rules(blocks: Json) -> None:
    """The rules of `checks.py`."""
    blocks["Model"]["allOf"] = [
        *_ONE_MODEL,
        _not_both("embeddings", "name"),
        {
            "if": _given("architecture"),
            "then": {"properties": {"config": {"not": {"required": ["model_type"]}}}},
        },
        {
            "if": {"not": _given("architecture")},
            "then": {
                "properties": {
                    "config": {
                        "if": {"type": "object"},
                        "then": {
                            "required": ["model_type"],
                            "properties": {"model_type": {"type": "string"}},
                        },
                    }
                }
            },
        },
    ]
    blocks["Source"]["oneOf"] = [_given("files"), _given("dataset")]
    blocks["Source"]["if"], blocks["Source"]["then"] = _given("max_epochs"), _given("weight")
    least = BYTES + len(BUILT_IN_TOKENS)
    small = {"type": "integer", "maximum": least - 1}
    blocks["Tokenize"]["anyOf"] = [_given("tokenizer"), {"properties": {"vocab_size": {"not": small}}}]
    even = {
        "if": {"type": "array"},
        "then": {"anyOf": [{"items": _given("weight")}, {"items": {"not": _given("weight")}}]},
    }
    for section in ("Tokenize", "Pretrain", "Eval", "Compress"):
        blocks[section]["allOf"] = [{"properties": {"data": even}}]
    never = {"type": "object", "required": ["every"], "properties": {"every": {"const": "never"}}}
    unmeasured = {"type": "object", "required": ["eval"], "properties": {"eval": never}}
    best = _given("checkpoint", "keep_best")
    blocks["Pretrain"]["allOf"].append({"not": {"allOf": [best, unmeasured]}})
    pairs = [name for name, goal in OBJECTIVES.items() if goal.model == "detector"]
    detects = {"type": "object", "required": ["objective"], "properties": {"objective": {"enum": pairs}}}
    taught = {"type": "object", "required": ["distil"], "properties": {"distil": {"not": {"type": "null"}}}}
    blocks["Pretrain"]["allOf"].append({"not": {"allOf": [detects, taught]}})
    joined = [name for name, goal in OBJECTIVES.items() if not goal.isolates]
    apart = {"isolate_documents": {"const": True}, "objective": {"enum": joined}}
    blocks["Pretrain"]["allOf"].append({"not": {"required": list(apart), "properties": apart}})
    blocks["Optim"]["allOf"] = [_goes_with(*pair) for pair in PARTIAL_SETTINGS.items()]
    averaging = _given("optim")
    averaging["properties"]["optim"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"const": "schedule_free"}},
    }
    blocks["Rounded"]["allOf"] = _of_eight_bits()
    blocks["Distil"]["allOf"] = [{"if": _given("cache"), "then": {"properties": _KEPT_OF_A_TEACHER}}]
    for section in ("Train", "Tuning"):
        blocks[section]["not"] = {"allOf": [_given("ema"), averaging]}
    blocks["Pretrain"]["allOf"].append(_not_counted())
    needed = dict.fromkeys(goal.model for goal in OBJECTIVES.values())
    blocks["Pretrain"]["allOf"] += [_fits(kind) for kind in needed]
    sections = dict.fromkeys(name for goal in OBJECTIVES.values() for name in goal.sections)
    blocks["Pretrain"]["allOf"] += [_of_objectives(name) for name in sections]
    measured = [_measured(name, goal.metrics) for name, goal in OBJECTIVES.items()]
    blocks["Pretrain"]["allOf"] += [rule for rule, _ in measured]
    somewhere = [_given("tokenize", "data"), _given("pretrain", "data")]
    tokenizer = [_given("tokenize"), _given("pretrain", "tokenizer"), _given("pretrain", "model", "name")]
    blocks["Recipe"]["allOf"] = [
        {"if": {"anyOf": [_section("pretrain"), _section("tokenize")]}, "then": {"anyOf": somewhere}},
        {"if": _section("pretrain"), "then": {"anyOf": tokenizer}},
        *(rule for _, rule in measured),
    ]
    add_finetune_rules(blocks, _ENV_REF)
    add_evaluation_rules(blocks, _ENV_REF)
    add_compression_rules(blocks, _ENV_REF)
