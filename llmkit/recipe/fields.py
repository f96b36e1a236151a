"""The schema as data: every dotted key with its block, default, text and what it accepts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmkit.recipe.block import Block
from llmkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Setting:
    """One key of the schema.

    Attributes:
        key: Dotted, without the numbers of list elements: `pretrain.data.files`.
        info: Pydantic's description of the field.
        owner: The block that declares it.
        block: The block it holds, for a section or a list of sections; else None.
    """

    key: str
    info: FieldInfo
    owner: type[Block]
    block: type[Block] | None

    @property
    def text(self) -> str:
        """What the setting is, in one or more sentences."""
        return " ".join((self.info.description or "").split())

    @property
    def default(self) -> Any:
        """The default value; `PydanticUndefined` when one is required."""
        return self.info.default

    @property
    def required(self) -> bool:
        """Whether its section cannot do without it."""
        return self.info.default is PydanticUndefined


def _block_in(annotation: Any) -> type[Block] | None:
    """The block that an annotation holds, directly or in a list, union or Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    return next((block for inner in get_args(annotation) if (block := _block_in(inner))), None)


def _walk(block: type[Block], prefix: str) -> Iterator[Setting]:
    for name, info in block.model_fields.items():
        setting = Setting(prefix + name, info, block, _block_in(info.annotation))
        yield setting
        if setting.block is not None:
            yield from _walk(setting.block, f"{prefix}{name}.")


@cache
def settings() -> Mapping[str, Setting]:
    """Every key of the schema, in its order."""
    return {setting.key: setting for setting in _walk(Recipe, "")}


def keys_of(section: str) -> list[str]:
    """The names of a section's keys; of the whole recipe for the empty section."""
    block = Recipe if not section else settings()[section].block
    return list(block.model_fields) if block is not None else []


@cache
def _raw_schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def accepts(key: str) -> Mapping[str, Any]:
    """The JSON Schema of one key, as pydantic makes it."""
    setting = settings()[key]
    raw = _raw_schema()
    owner = raw if setting.owner is Recipe else raw["$defs"][setting.owner.__name__]
    return owner["properties"][key.rpartition(".")[2]]


_LIMITS = (
    ("minimum", "of at least"),
    ("ge", "of at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("le", "at most"),
    ("exclusiveMaximum", "below"),
    ("lt", "below"),
)
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "`true` or `false`",
    "object": "a mapping",
    "string": "text",
}


def describe(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema of one key accepts, in words: `a number above 0`, `one of cpu, cuda`; null unsaid."""
    if "anyOf" in schema:
        parts = [part for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(describe(part) for part in parts))
    if "enum" in schema:
        return f"one of {_words(list(map(str, schema['enum'])))}"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return f"a section ({schema['$ref'].rpartition('/')[2]})"
    if "examples" in schema:
        return " or ".join(f"`{example}`" for example in schema["examples"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}: {describe(schema['prefixItems'][0])}"
        return f"a list: {describe(schema.get('items', {}))}"
    limits = [
        f"{word} {schema[limit]:g}" for limit, word in _LIMITS if limit in schema and schema[limit] < 1e15
    ]
    return " ".join([_TYPES.get(schema.get("type", ""), "a value"), " and ".join(limits)]).strip()


_MANY = 20


def _words(words: list[str]) -> str:
    """`cpu, cuda`; many names of two parts by their first ones: `gpt-(tiny, mini), (bert, t5)-(tiny, base)`."""
    if len(words) <= _MANY or not all("-" in word for word in words):
        return ", ".join(words)
    endings: dict[str, list[str]] = {}
    for word in words:
        endings.setdefault(word.rpartition("-")[0], []).append(word.rpartition("-")[2])
    starts: dict[str, list[str]] = {}
    for start, ends in endings.items():
        starts.setdefault(", ".join(ends), []).append(start)
    return ", ".join(
        f"{found[0] if len(found) == 1 else '(' + ', '.join(found) + ')'}-({ends})"
        for ends, found in starts.items()
    )


def element(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON Schema of a list's elements; the schema itself where there is no list in it."""
    for part in (schema, *schema.get("anyOf", [])):
        inner = part.get("items") or (part.get("prefixItems") or [None])[0]
        if inner:
            return inner
    return schema


def enum_values(schema: Mapping[str, Any]) -> list[str]:
    """The words that a JSON Schema of one key allows, wherever in it they stand."""
    found = [str(value) for value in schema.get("enum", [])]
    found += [str(schema["const"])] if isinstance(schema.get("const"), str) else []
    for part in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        found += enum_values(part)
    return list(dict.fromkeys(found))
