"""YAML 1.2 text to a tree with positions. Strict: no tags, no duplicate keys, bounded depth and size."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from llmkit.recipe.positions import Keys, Node, Spot, Text
from llmkit.recipe.problems import Problem

MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_BYTES = 256 * 1024

_INT = re.compile(r"[-+]?[0-9]{1,19}|0x[0-9a-fA-F]{1,15}|0o[0-7]{1,20}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,4})?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class UnreadableError(Exception):
    """The text cannot be read any further; holds the problem. It never leaves this package."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def scalar(text: str) -> Any:
    """What a plain scalar means in YAML 1.2; a number too large for JSON stays text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    if _FLOAT.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else text
    return text


def decode(content: bytes, label: str) -> str:
    """The text of a recipe.

    Raises:
        UnreadableError: It is not UTF-8, holds NUL bytes, or is too large; the problem names the place.
    """
    if len(content) > MAX_BYTES:
        message = f"{len(content):,} bytes are no recipe: at most {MAX_BYTES:,} are read"
        raise UnreadableError(Problem(Spot(Text(label, "")), message))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        good = content[: error.start].decode("utf-8")
        byte = content[error.start]
        hint = "save the recipe as UTF-8"
        message = f"not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        raise UnreadableError(Problem(_end_of(Text(label, good)), message, hint)) from error
    if "\0" in text:
        hint = "a recipe is plain text; this looks like another kind of file"
        spot = _end_of(Text(label, text), text.index("\0"))
        raise UnreadableError(Problem(spot, "a NUL character", hint))
    return text


def _end_of(text: Text, offset: int | None = None) -> Spot:
    """The spot `offset` characters into a text, or at its end."""
    before = text.content[:offset]
    line = before.count("\n") + 1
    return Spot(text, line, len(before) - (before.rfind("\n") + 1) + 1)


@dataclass
class _Open:
    """A list or mapping whose end has not been read."""

    node: Node
    anchor: str | None
    size: int = 1
    height: int = 1
    key: tuple[str, Spot] | None = None


@dataclass
class _Builder:
    """Builds the tree from YAML events, without recursion."""

    text: Text
    offset: int
    problems: list[Problem] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int, int] | None] = field(default_factory=dict)
    root: Node | None = None
    num_documents: int = 0

    def spot(self, event: Event) -> Spot:
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else 1
        column = start.column + 1 + (self.offset if start.line == 0 else 0)
        return Spot(self.text, start.line + 1, column, max(1, width))

    def stop(self, event: Event, message: str, hint: str = "") -> UnreadableError:
        return UnreadableError(Problem(self.spot(event), message, hint))

    def take(self, event: Event) -> None:
        """One event."""
        if isinstance(event, DocumentStartEvent):
            self.num_documents += 1
            if self.num_documents > 1:
                raise self.stop(event, "a second document starts here", "one file holds one recipe")
        elif isinstance(event, MappingStartEvent | SequenceStartEvent):
            self._begin(event)
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            self._end(event)
        elif isinstance(event, AliasEvent):
            self._alias(event)
        elif isinstance(event, ScalarEvent):
            self._scalar(event)

    def _check_tag(self, event: Any) -> None:
        if event.tag is not None and str(event.tag) != "!":
            hint = "remove it; put quotes around a value that is meant as text"
            self.problems.append(Problem(self.spot(event), "tags (`!...`) have no meaning in a recipe", hint))

    def _begin(self, event: Any) -> None:
        self._check_tag(event)
        if len(self.stack) >= MAX_DEPTH:
            raise self.stop(event, f"nested more than {MAX_DEPTH} levels deep")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        empty: Keys | list[Node] = Keys() if isinstance(event, MappingStartEvent) else []
        self.stack.append(_Open(Node(empty, self.spot(event)), event.anchor))

    def _end(self, event: Event) -> None:
        done = self.stack.pop()
        if done.anchor is not None:
            self.anchors[done.anchor] = (done.node, done.size, done.height)
        self._place(done.node, done.size, done.height, event)

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            raise self.stop(event, f"`*{event.anchor}` has no anchor `&{event.anchor}` before it")
        known = self.anchors[event.anchor]
        if known is None:
            raise self.stop(event, f"`*{event.anchor}` stands inside its own anchor")
        self._place(known[0], known[1], known[2], event)

    def _scalar(self, event: Any) -> None:
        self._check_tag(event)
        plain = event.style is None
        if self._wants_key():
            self._set_key(event.value, self.spot(event))
            return
        node = Node(scalar(event.value) if plain else event.value, self.spot(event), quoted=not plain)
        node.expression = event.value if "${" in event.value else None
        if event.anchor is not None:
            self.anchors[event.anchor] = (node, 1, 0)
        self._place(node, 1, 0, event)

    def _wants_key(self) -> bool:
        top = self.stack[-1] if self.stack else None
        return top is not None and isinstance(top.node.value, Keys) and top.key is None

    def _set_key(self, name: str, spot: Spot) -> None:
        top = self.stack[-1]
        first = top.node.value.spots.get(name)
        if first is not None:
            message = f"`{name}` is here a second time; it first stands in line {first.line}"
            self.problems.append(Problem(spot, message, "remove one of the two"))
        top.key = (name, spot)

    def _place(self, node: Node, size: int, height: int, event: Event) -> None:
        """Put a finished value where it belongs; aliases count with all they stand for."""
        if not self.stack:
            self.root = node
            return
        top = self.stack[-1]
        top.size += size
        top.height = max(top.height, height + 1)
        if top.size > MAX_NODES:
            raise self.stop(event, f"more than {MAX_NODES:,} values, counting what aliases stand for")
        if len(self.stack) + height > MAX_DEPTH:
            raise self.stop(event, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(top.node.value, list):
            top.node.value.append(node)
        elif top.key is None:
            raise self.stop(event, "a list, mapping or alias cannot be a key")
        else:
            name, spot = top.key
            top.key = None
            top.node.value.nodes.setdefault(name, node)
            top.node.value.spots.setdefault(name, spot)


def _events(text: str) -> Iterator[Event]:
    yield from YAML(typ="safe", pure=True).parse(text)


def read_yaml(text: Text, content: str | None = None, offset: int = 0) -> tuple[Node | None, list[Problem]]:
    """Read a text, or `content`, a part of its first line that starts `offset` characters in.

    Returns:
        The tree (None for an empty text) and the problems that do not stop the reading.

    Raises:
        UnreadableError: The text is no YAML, too deep, or too large.
    """
    builder = _Builder(text, offset)
    source = text.content if content is None else content
    try:
        for event in _events(source):
            builder.take(event)
    except YAMLError as error:
        raise UnreadableError(_syntax_problem(text, error, offset, source)) from error
    except (ValueError, OverflowError, AssertionError, IndexError) as error:
        # ruamel meets odd escapes and directives with these
        raise UnreadableError(Problem(Spot(text), f"not valid YAML: {error}")) from error
    return builder.root, builder.problems


_SYNTAX_HINTS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda p: "'\\t'" in p, "tabs cannot indent YAML; use spaces"),
    (lambda p: "mapping values are not allowed" in p, "a value that holds `: ` needs quotes"),
    (lambda p: "expected ',' or" in p, "a bracket is not closed, or a comma is missing"),
    (lambda p: "expected <block end>" in p, "the indent of this line fits no line above"),
    (lambda p: "could not find expected ':'" in p, "a `:` and a space belong after a key"),
)


# Found out at the end of the text or a line on; the place to look at is where the thing began.
_SEEN_TOO_LATE = ("end of stream", "<stream end>", "could not find expected ':'")


def _syntax_problem(text: Text, error: YAMLError, offset: int, source: str) -> Problem:
    said = str(getattr(error, "problem", None) or error)
    mark, began = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    unclosed = mark and began and "expected ',' or" in said and mark.line != began.line
    if mark is None or unclosed or any(words in said for words in _SEEN_TOO_LATE):
        mark = began or mark
    position = getattr(error, "position", None)
    if mark is not None:
        spot = Spot(text, mark.line + 1, mark.column + 1 + (offset if mark.line == 0 else 0))
    elif isinstance(position, int):
        inner = _end_of(Text(text.label, source), position)
        spot = Spot(text, inner.line, inner.column + (offset if inner.line == 1 else 0))
    else:
        spot = Spot(text)
    character = getattr(error, "character", None)
    if isinstance(character, int | str):
        code = character if isinstance(character, int) else ord(character[:1])
        return Problem(spot, f"the character U+{code:04X} cannot stand in a recipe")
    hint = next((hint for fits, hint in _SYNTAX_HINTS if fits(said)), "")
    return Problem(spot, f"not valid YAML: {said}", hint)
