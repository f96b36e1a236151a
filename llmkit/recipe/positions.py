"""Values that know where they were written: the tree between a recipe's text and its schema."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from llmkit.recipe.credentials import starred

Kind = Literal["file", "extends", "smoke", "command line"]
Path = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Text:
    """A text that values come from.

    Attributes:
        label: How messages name it: the file as given, or `command line`.
        content: The whole text.
        kind: What part it plays in a recipe.
    """

    label: str
    content: str
    kind: Kind = "file"

    def line(self, number: int) -> str:
        """The text of a line, counted from 1, stars in the place of secrets; empty past the end."""
        return self._lines[number - 1] if number <= len(self._lines) else ""

    @cached_property
    def _lines(self) -> list[str]:
        return starred(self.content).splitlines()


@dataclass(frozen=True)
class Spot:
    """A place in a text: line and column count characters from 1, `width` is the length to underline."""

    text: Text
    line: int = 1
    column: int = 1
    width: int = 1

    def __str__(self) -> str:
        if self.text.kind == "command line":
            return f"command line:{self.column}"
        return f"{self.text.label}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Origin:
    """Where a value came from; `str()` is what people see: `default`, `tiny.yaml:12`, `extends base.yaml:3`.

    Attributes:
        kind: The layer of the recipe that set it.
        label: The file's name; empty for defaults, smoke and words.
        line: The line in that file, from 1; 0 where there is none.
    """

    kind: Literal["default", "file", "extends", "smoke", "command line"] = "default"
    label: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.label}:{self.line}"
        return f"extends {self.label}:{self.line}" if self.kind == "extends" else self.kind


@dataclass
class Node:
    """A value and its place.

    Attributes:
        value: A scalar, a list of nodes, or keys (each with its own place) to nodes.
        spot: Where the value stands.
        expression: The value as written where `${env:NAME}` stood in it, else None.
        quoted: Whether the value is text by its quotes, whatever it looks like.
    """

    value: Any
    spot: Spot
    expression: str | None = None
    quoted: bool = False

    @property
    def origin(self) -> Origin:
        """The layer and line this value came from."""
        text = self.spot.text
        named = text.kind in ("file", "extends")
        return Origin(text.kind, text.label if named else "", self.spot.line if named else 0)

    def plain(self) -> Any:
        """The value as dictionaries, lists and scalars."""
        if isinstance(self.value, Keys):
            return {name: node.plain() for name, node in self.value.nodes.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass
class Keys:
    """The content of a mapping: nodes by key, and where each key stands."""

    nodes: dict[str, Node] = field(default_factory=dict)
    spots: dict[str, Spot] = field(default_factory=dict)


def child(node: Node, part: str | int) -> Node | None:
    """The node one step down; index 0 of a value that is no list is the value itself (`data: {...}`)."""
    if isinstance(node.value, Keys):
        return node if part == 0 else node.value.nodes.get(str(part))
    if isinstance(node.value, list):
        return node.value[part] if isinstance(part, int) and part < len(node.value) else None
    return node if part == 0 else None


def find(root: Node, path: Path) -> Node | None:
    """The node at a path, or None where nothing was written."""
    node: Node | None = root
    for part in path:
        node = child(node, part) if node is not None else None
    return node


def deepest(root: Node, path: Path) -> tuple[Path, Node]:
    """As much of `path` as was written, and the node there."""
    node = root
    for count, part in enumerate(path):
        below = child(node, part)
        if below is None:
            return path[:count], node
        node = below
    return path, node


def key_spot(root: Node, path: Path) -> Spot:
    """Where the last key of a path stands; the value itself for an element of a list, line 1 for the root."""
    parent = find(root, path[:-1]) if path else None
    if parent is not None and isinstance(parent.value, Keys) and path[-1] in parent.value.spots:
        return parent.value.spots[str(path[-1])]
    node = find(root, path)
    return node.spot if node is not None and path else Spot(root.spot.text)


_ALTERNATIVES = ("preset", "architecture", "name", "config")


def merged(base: Node, top: Node, path: Path = ()) -> Node:
    """`top` laid over `base`: mappings merge key by key, everything else is replaced.

    A word of the command line may also reach into a list: `pretrain.data.0.weight=2`.
    """
    if not isinstance(top.value, Keys):
        return top
    if top.spot.text.kind in ("command line", "smoke") and all(name.isdigit() for name in top.value.nodes):
        return _merged_elements(base, top, path)
    if not isinstance(base.value, Keys):
        return top
    nodes, spots = dict(base.value.nodes), dict(base.value.spots)
    if path[-1:] == ("model",) and _names_a_model(top.value):
        nodes = {name: node for name, node in nodes.items() if name not in _ALTERNATIVES}
    for name, node in top.value.nodes.items():
        below = nodes.get(name)
        nodes[name] = _unwrapped(node) if below is None else merged(below, node, (*path, name))
        if below is None or not isinstance(below.value, Keys):
            spots[name] = top.value.spots[name]
    return Node(Keys(nodes, spots), top.spot)


def _names_a_model(block: Keys) -> bool:
    """Naming a model in one way un-names it in the others; fields of a configuration alone name none."""
    config = block.nodes.get("config")
    whole = config is not None and (not isinstance(config.value, Keys) or "model_type" in config.value.nodes)
    return whole or any(name in block.nodes for name in _ALTERNATIVES if name != "config")


def _unwrapped(node: Node) -> Node:
    """Element 0 of a list that is not there yet is written like a list of one: without the list."""
    if (
        isinstance(node.value, Keys)
        and list(node.value.nodes) == ["0"]
        and node.spot.text.kind in ("command line", "smoke")
    ):
        return node.value.nodes["0"]
    if isinstance(node.value, Keys):
        nodes = {name: _unwrapped(below) for name, below in node.value.nodes.items()}
        return replace(node, value=Keys(nodes, node.value.spots))
    return node


def _merged_elements(base: Node, top: Node, path: Path) -> Node:
    """Elements of a list replaced or merged by their number."""
    elements = [*base.value] if isinstance(base.value, list) else [base]
    for name, node in top.value.nodes.items():
        if int(name) >= len(elements):
            return top
        elements[int(name)] = merged(elements[int(name)], node, (*path, int(name)))
    return Node(elements, base.spot) if isinstance(base.value, list) else elements[0]


def scalars(node: Node) -> Iterator[Node]:
    """Every scalar below a node."""
    if isinstance(node.value, Keys):
        for below in node.value.nodes.values():
            yield from scalars(below)
    elif isinstance(node.value, list):
        for below in node.value:
            yield from scalars(below)
    else:
        yield node


def dotted(path: Path) -> str:
    """`("pretrain", "data", 0, "files")` -> `pretrain.data.0.files`."""
    return ".".join(str(part) for part in path)


def without(node: Node, name: str) -> Node:
    """A mapping without one of its keys."""
    assert isinstance(node.value, Keys)
    kept: Mapping[str, Node] = {key: below for key, below in node.value.nodes.items() if key != name}
    return Node(Keys(dict(kept), node.value.spots), node.spot)
