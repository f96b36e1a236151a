"""Writing YAML that reads back to the same values, with a comment after any line."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from llmkit.recipe.reading import scalar
from llmkit.recipe.units import Amount

_SAFE = re.compile(r"[\w./*<>=()+^$~-][\w ./*<>=()+^$%~-]*")


class Expression(str):
    """`${env:NAME}`, written without quotes on a line of its own, so that the variable may become a number."""

    __slots__ = ()


def scalar_text(value: Any) -> str:
    """A scalar as YAML: words stand bare where they read back as the same text, else in quotes.

    Raises:
        TypeError: The value has no place in a recipe.
    """
    if isinstance(value, Expression) and not re.search(r": |\s#|\n|:$", value):
        return str(value)
    if isinstance(value, Amount | PathLike):
        value = str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if not isinstance(value, str):
        raise TypeError(f"{value!r} cannot stand in a recipe")
    bare = _SAFE.fullmatch(value) and value.isascii() and value == value.strip()
    if bare and value[0] not in "-*<>=~" and isinstance(scalar(value), str):
        return value
    return _quoted(value)


def _quoted(text: str) -> str:
    """JSON quotes, which YAML reads too; what is not printable is escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(text, ensure_ascii=False))


def _escaped(char: str) -> str:
    # JSON would write two surrogates for a character beyond the first plane, which YAML reads as two.
    return f"\\U{ord(char):08x}" if ord(char) > 0xFFFF else json.dumps(char)[1:-1]


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _quoted(value) if isinstance(value, Expression) else scalar_text(value)


def _key(key: Any) -> str:
    return scalar_text(str(key))


def to_yaml(value: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """A mapping as YAML text.

    Args:
        value: Mappings, lists and scalars; `Amount`s are written as their text.
        comments: Dotted key -> what to say behind its value.

    Returns:
        One line for a setting; a list of mappings has its elements below it.

    Raises:
        TypeError: A value has no place in a recipe.
    """
    return "".join(f"{line}\n" for line in _lines(value, "", "", comments or {}))


def _lines(value: Mapping[str, Any], indent: str, prefix: str, comments: Mapping[str, str]) -> Iterator[str]:
    for key, item in value.items():
        dotted = f"{prefix}{key}"
        comment = f"  # {' '.join(comments[dotted].split())}" if dotted in comments else ""
        if isinstance(item, Mapping) and item:
            yield f"{indent}{_key(key)}:{comment}"
            yield from _lines(item, indent + "  ", dotted + ".", comments)
        elif _is_list_of_mappings(item):
            yield f"{indent}{_key(key)}:{comment}"
            yield from _elements(item, indent, dotted, comments)
        else:
            text = scalar_text(item) if isinstance(item, Expression) else _flow(item)
            yield f"{indent}{_key(key)}: {text}{comment}"


def _is_list_of_mappings(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) and v for v in value)
    )


def _elements(
    items: Sequence[Mapping[str, Any]], indent: str, dotted: str, comments: Mapping[str, str]
) -> Iterator[str]:
    for number, item in enumerate(items):
        lines = list(_lines(item, indent + "    ", f"{dotted}.{number}.", comments))
        yield f"{indent}  - {lines[0].lstrip()}"
        yield from lines[1:]
