"""`llmkit recipe explain KEY`: what the schema says about one key, or about the whole recipe."""

import textwrap
from dataclasses import dataclass
from typing import Any

from llmkit.errors import UsageError
from llmkit.recipe import fields
from llmkit.recipe.block import Block
from llmkit.recipe.emit import to_yaml
from llmkit.recipe.schema import Recipe
from llmkit.recipe.units import Amount
from llmkit.registry import nearest


@dataclass(frozen=True)
class Explanation:
    """What the schema says about a key.

    Attributes:
        key: The dotted key; empty for the whole recipe.
        kind: What it accepts, with unit and range, in words.
        default: Its default as a recipe spells it; None for a section and where the default is null.
        required: Whether its section cannot do without it.
        text: What it is.
        children: For a section, its keys and the first sentence about each.
    """

    key: str
    kind: str
    default: str | None
    required: bool
    text: str
    children: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [
            self.key or "recipe",
            *textwrap.wrap(self.text, 96, initial_indent="  ", subsequent_indent="  "),
        ]
        lines += textwrap.wrap(f"accepts  {self.kind}", 96, initial_indent="  ", subsequent_indent=" " * 11)
        if self.required:
            lines.append("  required")
        elif self.default is not None:
            lines.append(f"  default  {self.default}")
        width = max((len(name) for name, _ in self.children), default=0)
        lines += [f"    {name:<{width}}  {text}" for name, text in self.children]
        return "\n".join(lines)


def explain(key: str = "") -> Explanation:
    """What a dotted key is; numbers of list elements may stand in it. A last part alone will do if it is unique.

    Raises:
        UsageError: There is no such key; the message names the nearest.
    """
    wanted = ".".join(part for part in key.split(".") if not part.isdigit())
    if not wanted:
        return Explanation("", "sections and keys", None, False, _text_of(Recipe), _children(Recipe, ""))
    known = fields.settings()
    if wanted not in known:
        wanted = _guess(wanted)
    setting = known[wanted]
    if setting.block is not None:
        text = f"{setting.text} {_text_of(setting.block)}".strip()
        kind = "a section, or a list of them" if wanted.endswith(".data") else "a section"
        words = fields.enum_values(fields.accepts(wanted))
        kind = f"one of {', '.join(words)}, or {kind}" if words else kind
        return Explanation(wanted, kind, None, setting.required, text, _children(setting.block, wanted + "."))
    schema = fields.accepts(wanted)
    kind = fields.describe(schema)
    if any(part.get("type") == "null" for part in schema.get("anyOf", [])):
        kind += ", or null"
    default = None if setting.required or setting.default is None else _spelt(setting.default)
    return Explanation(wanted, kind, default, setting.required, setting.text, ())


def _text_of(block: type[Block]) -> str:
    return " ".join((block.__doc__ or "").split())


def _children(block: type[Block], prefix: str) -> tuple[tuple[str, str], ...]:
    known = fields.settings()
    names = block.model_fields
    return tuple((name, known[prefix + name].text) for name in names)


def _spelt(value: Any) -> str:
    if isinstance(value, Amount):
        return str(value)
    return to_yaml({"x": value})[len("x: ") :].strip()


def _guess(key: str) -> str:
    """The one key that ends with `key`.

    Raises:
        UsageError: None or several do.
    """
    known = fields.settings()
    ends = [one for one in known if one.endswith("." + key)]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UsageError(f"`{key}` is the end of several keys", hint=f"say which: {', '.join(ends)}")
    section = key.rpartition(".")[0]
    close = nearest(key, known) or nearest(key.rpartition(".")[2], {one.rpartition(".")[2] for one in known})
    if close is not None:
        hint = f"did you mean `{close}`?"
    else:
        names = fields.keys_of(section) if section in known else fields.keys_of("")
        hint = f"known keys: {', '.join(names)}"
    raise UsageError(f"there is no key `{key}` in a recipe", hint=hint)
