"""Rules between the settings of the `compress` section, for the loader and as JSON Schema."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.recipe.compression import with_method_defaults
from llmkit.recipe.positions import Node, find, key_spot
from llmkit.recipe.problems import Problem
from llmkit.recipe.units import listing, shown
from llmkit.registry import METHODS

SECTION = "compress"
_TARGETS = ("size", "latency")
_HALF = r"^50(?:\.0{1,9})? *%$"
Json = dict[str, Any]


@dataclass(frozen=True)
class _Fits:
    """Where a setting has one of some values, another has one of others.

    Attributes:
        method: Of the step.
        name: The setting that decides.
        values: Its values.
        other: The setting that depends on it.
        allowed: What that may be; nothing else.
        also: A second setting that decides, and its values: both must be so.
        like: A pattern of what it may be instead, where that is spelled in several ways.
    """

    method: str
    name: str
    values: tuple[str, ...]
    other: str
    allowed: tuple[object, ...]
    also: tuple[str, tuple[str, ...]] | None = None
    like: str = ""


_FITS = (
    _Fits("quantize", "format", ("w8a8",), "solver", ("auto", "rtn", "gptq")),
    _Fits("quantize", "format", ("mixed",), "solver", ("auto", "rtn", "gptq")),
    _Fits("quantize", "format", ("fp8",), "solver", ("auto", "rtn")),
    _Fits("quantize", "format", ("int8", "w8a8", "fp8"), "bits", (8, 8.0)),
    _Fits("quantize", "format", ("int4",), "bits", (4, 4.0)),
    _Fits("quantize", "format", ("int8", "int4", "fp8", "mixed"), "smooth", (0.5,)),
    _Fits("quantize", "format", ("int4", "fp8", "mixed"), "symmetric", (True,)),
    _Fits("quantize", "solver", ("rtn", "awq"), "damping", (0.01,)),
    _Fits("quantize", "solver", ("auto",), "damping", (0.01,), also=("format", ("int8", "fp8"))),
    _Fits("prune", "what", ("weights",), "by", ("auto", "magnitude", "wanda", "sparsegpt")),
    _Fits("prune", "what", ("layers",), "by", ("auto", "influence")),
    _Fits("prune", "what", ("heads", "channels"), "by", ("auto", "magnitude", "activation", "gradient")),
    _Fits("prune", "what", ("layers", "heads", "channels"), "pattern", ("free",)),
    _Fits(
        "prune",
        "by",
        ("auto", "wanda", "sparsegpt", "activation", "gradient", "influence"),
        "scope",
        ("layer",),
    ),
    _Fits("prune", "what", ("layers", "heads", "channels"), "scope", ("layer",)),
    _Fits("prune", "pattern", ("2:4", "4:8"), "scope", ("layer",)),
    _Fits("prune", "pattern", ("2:4", "4:8"), "share", (0.5,), like=_HALF),
    _Fits("prune", "what", ("layers",), "damping", (0.01,)),
    _Fits("prune", "by", ("magnitude", "wanda"), "damping", (0.01,)),
    _Fits("factorize", "by", ("magnitude", "wanda", "sparsegpt", "gradient", "influence"), "by", ()),
    _Fits("export", "to", ("onnx",), "type", ("auto", "f32", "int8")),
    _Fits("export", "to", ("gguf",), "type", ("auto", "f32", "f16", "q8_0", "q4_0")),
    _Fits("export", "to", ("torch", "bf16", "fp16"), "type", ("auto",)),
)


def check_compression(root: Node, meant: tuple[str, ...]) -> Iterator[Problem]:
    """What does not go together in the `compress` section."""
    node = find(root, (SECTION,))
    section = node.plain() if node is not None else None
    if not isinstance(section, dict):
        return
    steps = section.get("steps")
    if isinstance(steps, list):
        for number, step in enumerate(steps):
            if isinstance(step, dict):
                yield from _step(root, (SECTION, "steps", number), step)
        yield from _exported_in_few_bits(root, steps)
    elif isinstance(steps, dict):
        yield from _step(root, (SECTION, "steps"), steps)
    yield from _target(root, section)


def _exported_in_few_bits(root: Node, steps: Sequence[Any]) -> Iterator[Problem]:
    """No other runtime reads the rounded weights of `quantize`: as plain numbers they would be larger, not smaller."""
    methods = [step.get("method") if isinstance(step, dict) else None for step in steps]
    for number, method in enumerate(methods):
        if method == "export" and "quantize" in methods[:number]:
            rounding = {"onnx": "`type: int8`", "gguf": "`type: q8_0` or `q4_0`"}.get(
                str(steps[number].get("to")), "`to: onnx, type: int8` or `to: gguf, type: q4_0`"
            )
            message = "`export` after `quantize`: no other form keeps the rounded weights, and plain ones are larger"
            hint = f"leave `quantize` out: the export rounds by itself, {rounding}"
            yield Problem(key_spot(root, (SECTION, "steps", number, "method")), message, hint)


def _step(root: Node, path: tuple[str | int, ...], step: Mapping[str, Any]) -> Iterator[Problem]:
    method = step.get("method")
    if not isinstance(method, str) or method not in METHODS:
        return
    known = METHODS[method]
    for name in step:
        readers = [other for other, one in METHODS.items() if name in one.settings]
        if step[name] is not None and readers and name not in known.settings:
            message = f"`{name}`: `{method}` reads no such setting"
            yield Problem(key_spot(root, (*path, name)), message, f"it goes with {listing(readers)}")
    for name in known.needs:
        if step.get(name) is None:
            message = f"`{method}` needs `{name}`"
            example = {"share": "share: 50%", "to": "to: onnx"}[name]
            yield Problem(key_spot(root, path), message, f"add `{example}`")
    whole = with_method_defaults(step)
    for rule in _FITS:
        yield from _misfit(root, path, rule, whole)
    if _more_than_one(step.get("stages")) and step.get("recover") is None:
        message = "`stages`: without `recover` several stages take the same as one"
        yield Problem(key_spot(root, (*path, "stages")), message, "add `recover: {}`, or leave `stages` out")


def _misfit(
    root: Node, path: tuple[str | int, ...], rule: _Fits, step: Mapping[str, Any]
) -> Iterator[Problem]:
    value, other = step.get(rule.name), step.get(rule.other)
    if step.get("method") != rule.method or value not in rule.values:
        return
    if rule.also is not None and step.get(rule.also[0]) not in rule.also[1]:
        return
    if other is None or other in rule.allowed or isinstance(other, dict):
        return
    if rule.like and re.match(rule.like, str(other)):
        return
    if isinstance(other, str) and rule.other == "bits":
        return  # no number: said elsewhere
    allowed = [shown(one) for one in dict.fromkeys(map(_number, rule.allowed))]
    about = f"`{rule.method}`" if rule.name == rule.other else f"`{rule.name}: {value}`"
    message = f"`{rule.other}: {shown(other)}` does not go with {about}"
    is_default = rule.allowed == (METHODS[rule.method].settings[rule.other],)
    hint = f"leave `{rule.other}` out" if is_default or not allowed else f"it goes with {listing(allowed)}"
    yield Problem(key_spot(root, (*path, rule.other)), message, hint)


def _number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _more_than_one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _target(root: Node, section: Mapping[str, Any]) -> Iterator[Problem]:
    target = section.get("target")
    if not isinstance(target, dict):
        return
    if section.get("steps") not in (None, []):
        message = "`steps` and `target` both say what to do"
        yield Problem(key_spot(root, (SECTION, "target")), message, "keep one of them")
    if all(target.get(name) is None for name in _TARGETS):
        message = "`target` says nothing that must be reached"
        yield Problem(key_spot(root, (SECTION, "target")), message, "add `size: 50%` or `latency: 60%`")


def add_compression_rules(blocks: Json, env: Json) -> None:
    """Add the rules to the blocks of the schema.

    Args:
        blocks: The schema's blocks by name; `Step`, `Compress` and `Target` get rules.
        env: What an environment expression looks like: where one stands, the value is not known here.
    """
    rules = blocks["Step"].setdefault("allOf", [])
    settings = dict.fromkeys(name for one in METHODS.values() for name in one.settings)
    for method, known in METHODS.items():
        unread = {name: {"const": None} for name in settings if name not in known.settings}
        needed: Json = {"allOf": [_set(name) for name in known.needs]} if known.needs else {}
        rules.append({"if": _is("method", (method,)), "then": {"properties": unread, **needed}})
    rules += [_rule(rule, env) for rule in _FITS]
    more = {"required": ["stages"], "properties": {"stages": {"type": "integer", "minimum": 2}}}
    rules.append({"if": more, "then": _set("recover")})
    blocks["Compress"].setdefault("allOf", []).append(
        {"not": {"allOf": [_set("target"), _set("steps", {"enum": [None, []]})]}}
    )
    both = {"allOf": [{"contains": _is("method", (name,))} for name in ("quantize", "export")]}
    blocks["Compress"]["allOf"].append(
        {"not": {"required": ["steps"], "properties": {"steps": {"type": "array", **both}}}}
    )
    blocks["Target"]["anyOf"] = [_set(name) for name in _TARGETS]


def _is(name: str, values: Sequence[object]) -> Json:
    return {"required": [name], "properties": {name: {"enum": list(values)}}}


def _set(name: str, unset: Json | None = None) -> Json:
    return {"required": [name], "properties": {name: {"not": unset or {"const": None}}}}


def _rule(rule: _Fits, env: Json) -> Json:
    decided = [_decides(rule.method, rule.name, rule.values)]
    if rule.also is not None:
        decided.append(_decides(rule.method, *rule.also))
    spelled = [{"type": "string", "pattern": rule.like}] if rule.like else []
    then = {"properties": {rule.other: {"anyOf": [{"enum": [None, *rule.allowed]}, *spelled, env]}}}
    return {"if": {"allOf": [_is("method", (rule.method,)), *decided]}, "then": then}


def _decides(method: str, name: str, values: Sequence[str]) -> Json:
    """What a setting looks like that has one of these values, said or not."""
    if name == "format":
        return {"anyOf": [_is(name, values), {"allOf": [{"not": _set(name)}, _bits(values)]}]}
    if METHODS[method].settings.get(name) in values:
        return {"properties": {name: {"enum": [None, *values]}}}
    return _is(name, values)


def _bits(formats: Sequence[str]) -> Json:
    """What `bits` looks like where it says that one of these formats is meant."""
    said = {"required": ["bits"], "properties": {"bits": {"type": "number", "not": {"enum": [4, 8]}}}}
    known: dict[str, Json] = {
        "int8": {"properties": {"bits": {"enum": [None, 8]}}},
        "int4": _is("bits", (4,)),
        "mixed": said,
    }
    return {"anyOf": [known[one] for one in formats if one in known] or [{"not": {}}]}
