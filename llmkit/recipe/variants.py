"""`variants`: runs of one recipe that differ in a few settings. Each is the recipe with its own settings laid over."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmkit.recipe.positions import Keys, Node, child, find, merged, without
from llmkit.recipe.problems import Problem
from llmkit.registry import nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TAKEN = ("tokenize", "pretrain", "finetune", "eval", "compress")
"""Names of folders in a run's folder."""
FIXED = ("llmkit", "name", "extends", "variant", "variants")
"""What all variants of a recipe share."""


@dataclass(frozen=True)
class Chosen:
    """What a recipe with variants is about.

    Attributes:
        plain: The recipe without `variant` and `variants`.
        variants: What each variant changes, by name; of those asked for by `variant` only that one.
        alone: Whether one was asked for.
    """

    plain: Node
    variants: Mapping[str, Node]
    alone: bool


def choose(root: Node, problems: list[Problem]) -> Chosen:
    """Take a recipe's variants out of it.

    Args:
        root: The recipe, with the words of the command line laid over it.
        problems: Names and settings that cannot be are added here.
    """
    plain = without(without(root, "variant"), "variants")
    named, listed = child(root, "variant"), child(root, "variants")
    variants = _checked(listed, problems)
    if named is None or named.value is None:
        return Chosen(plain, variants, alone=False)
    if isinstance(named.value, str) and named.value in variants:
        return Chosen(plain, {named.value: variants[named.value]}, alone=True)
    known = ", ".join(variants) or "none"
    close = nearest(str(named.value), variants) if isinstance(named.value, str) else None
    message = (
        f"`{named.value}` is no variant of this recipe"
        if not isinstance(named.value, Keys | list)
        else ("`variant` is the name of one of `variants`")
    )
    problems.append(
        Problem(named.spot, message, f"did you mean `{close}`?" if close else f"its variants: {known}")
    )
    return Chosen(plain, {}, alone=True)


def _checked(listed: Node | None, problems: list[Problem]) -> dict[str, Node]:
    if listed is None or listed.value is None:
        return {}
    if not isinstance(listed.value, Keys):
        hint = "write `variants: {small: {pretrain: {model: {preset: gpt-tiny}}}}`"
        problems.append(
            Problem(listed.spot, "`variants` is names, each with the settings that it changes", hint)
        )
        return {}
    found = {}
    for name, node in listed.value.nodes.items():
        wrong = _wrong(name, node, listed.value)
        problems += wrong
        if not wrong:
            found[name] = node
    return found


def _wrong(name: str, node: Node, keys: Keys) -> list[Problem]:
    """What is wrong with one variant, before its settings are looked at."""
    spot = keys.spots[name]
    if not NAME.fullmatch(name) or name in TAKEN:
        hint = f"letters, digits, `.`, `_` and `-`; not {', '.join(TAKEN)}"
        return [Problem(spot, f"`{name}` cannot be the name of a variant's folder", hint)]
    if not isinstance(node.value, Keys):
        return (
            []
            if node.value is None
            else [Problem(node.spot, f"`{name}`: a variant is a mapping of settings", "write `{seed: 1}`")]
        )
    return [
        Problem(node.value.spots[key], f"`{key}` is the same for all variants", "set it in the recipe itself")
        for key in node.value.nodes
        if key in FIXED
    ]


def without_choice(words: Sequence[Node]) -> list[Node]:
    """Words but those that say something about variants: what is laid over every variant."""
    return [
        word
        for word in words
        if isinstance(word.value, Keys) and not {"variant", "variants"} & word.value.nodes.keys()
    ]


def over(plain: Node, variant: Node) -> Node:
    """The recipe with a variant's settings laid over it."""
    return plain if variant.value is None else replace(merged(plain, variant), spot=plain.spot)


def named(root: Node, variant: str) -> Node:
    """The recipe of a variant under its own name, `NAME/VARIANT`: so are its folder and its report."""
    assert isinstance(root.value, Keys)
    given = find(root, ("name",))
    base = given.value if given is not None and isinstance(given.value, str) else "run"
    spot = given.spot if given is not None else root.spot
    nodes = {**root.value.nodes, "name": Node(f"{base}/{variant}", spot, quoted=True)}
    return Node(Keys(nodes, {"name": spot, **root.value.spots}), root.spot)
