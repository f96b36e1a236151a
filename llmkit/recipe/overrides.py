"""Trailing words of the command line, `pretrain.train.optim.lr=3e-4`, as layers over the recipe."""

import re
from collections.abc import Sequence

from llmkit.recipe.positions import Keys, Kind, Node, Spot, Text, child
from llmkit.recipe.problems import Problem
from llmkit.recipe.reading import MAX_DEPTH, UnreadableError, read_yaml

_NAME = re.compile(r"[A-Za-z0-9_\-<]+")


def layer(word: str, kind: Kind = "command line") -> tuple[Node | None, list[Problem]]:
    """The tree that a word stands for, with places inside the word; the value is read as YAML."""
    text = Text(kind, word, kind)
    key, equals, value = word.partition("=")
    if not equals or not key:
        hint = f"write `{key}=...`" if key else "write `seed=1`"
        return None, [Problem(Spot(text, width=len(word)), f"`{word}` is no override `key=value`", hint)]
    parts = key.split(".")
    bad = next((part for part in parts if not _NAME.fullmatch(part)), None)
    if bad is not None or len(parts) > MAX_DEPTH:
        return None, [Problem(Spot(text, width=len(key)), f"`{key}` is no dotted key", "write `seed=1`")]
    if parts[0] == "extends":
        hint = "write it into the recipe"
        return None, [Problem(Spot(text, width=len(key)), "`extends` cannot be set by a word", hint)]
    try:
        node, problems = read_yaml(text, value, len(key) + 1)
    except UnreadableError as error:
        return None, [error.problem]
    column = len(key) + 2
    leaf = node or Node(None, Spot(text, 1, column, max(1, len(value))))
    return _nested(parts, leaf, text), problems


def _nested(parts: Sequence[str], leaf: Node, text: Text) -> Node:
    """`a.b=x` as the mapping {a: {b: x}}; each key stands at its place in the word."""
    node, end = leaf, sum(len(part) + 1 for part in parts)
    for part in reversed(parts):
        start = end - len(part) - 1
        spot = Spot(text, 1, start + 1, len(part))
        node, end = Node(Keys({part: node}, {part: spot}), spot), start
    return node


def out_of_reach(root: Node, top: Node) -> list[Problem]:
    """A word that reaches into a list must name an element that is there."""
    node: Node | None = root
    while isinstance(top.value, Keys) and len(top.value.nodes) == 1 and node is not None:
        name, below = next(iter(top.value.nodes.items()))
        if isinstance(node.value, list):
            last = len(node.value) - 1
            if not name.isdigit() or int(name) > last:
                hint = f"say which: a number from 0 to {last}" if last >= 0 else "the list is empty"
                return [Problem(top.value.spots[name], f"`{name}` is no element of this list", hint)]
            node = node.value[int(name)]
        else:
            node = child(node, int(name) if name == "0" else name)
        top = below
    return []
