"""From a recipe's text to a checked, frozen `Recipe` that knows where each of its values came from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmkit.errors import RecipeError
from llmkit.recipe.block import Block
from llmkit.recipe.checks import check
from llmkit.recipe.emit import to_yaml
from llmkit.recipe.environment import interpolate, is_secret
from llmkit.recipe.faults import no_version, problems_of
from llmkit.recipe.locate import find_recipe, packaged_folder, read_stdin, read_text
from llmkit.recipe.overrides import layer, out_of_reach
from llmkit.recipe.positions import Keys, Kind, Node, Origin, Spot, Text, find, key_spot, merged, without
from llmkit.recipe.problems import Problem, as_error
from llmkit.recipe.reading import UnreadableError, read_yaml
from llmkit.recipe.schema import Recipe
from llmkit.recipe.smoke import smoke_words
from llmkit.recipe.variants import choose, named, over, without_choice


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it came from.

    Attributes:
        recipe: The checked recipe; `extends` is None, for what it extends is in it.
        origins: Dotted key (list elements by number: `pretrain.data.0.files`) -> where its value came from.
        path: The recipe's file; None for stdin and mappings.
        text: The recipe as given.
        expressions: Dotted keys whose value came from a variable and looks like a secret, as written.
        variants: The recipe of each of its variants; none where one was asked for, for this is that one's then.
    """

    recipe: Recipe
    origins: Mapping[str, Origin]
    path: Path | None
    text: str
    expressions: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, "Loaded"] = field(default_factory=dict)


def load_recipe(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    smoke: bool = False,
) -> Loaded:
    """Read, merge and check a recipe.

    Defaults < `extends` < the recipe < its variant < `smoke` < `overrides`.

    Args:
        source: A path, `-` for stdin, the name of a shipped recipe, or a mapping.
        overrides: Words such as `pretrain.train.optim.lr=3e-4`.
        env: What `${env:NAME}` reads; the process's environment by default.
        smoke: Shrink the recipe to about a minute on a laptop.

    Raises:
        RecipeError: The recipe is wrong; `problems` holds all that is wrong with it, in line order.
    """
    env = os.environ if env is None else env
    path, text = _open(source)
    problems: list[Problem] = []
    root = _read_chain(text, path, env, problems)
    words = _read_words(overrides, "command line", env, problems)
    chosen = choose(_laid(root, words, problems), problems)
    reading = _Reading(text, path, env, smoke)
    found = {
        name: reading.finish(over(chosen.plain, variant), without_choice(words), problems, variant=name)
        for name, variant in chosen.variants.items()
    }
    if not chosen.alone:
        found[""] = reading.finish(without(root, "variant"), words, problems)
    if problems:
        raise as_error(text.label, problems)
    made = {name: loaded for name, loaded in found.items() if loaded is not None}
    return made.popitem()[1] if chosen.alone else replace(made.pop(""), variants=made)


@dataclass(frozen=True)
class _Reading:
    """What is the same for a recipe and all its variants."""

    text: Text
    path: Path | None
    env: Mapping[str, str]
    smoke: bool

    def finish(
        self, root: Node, words: Sequence[Node], problems: list[Problem], *, variant: str = ""
    ) -> Loaded | None:
        """Lay the words over a tree and check it; None where that adds to the problems."""
        laid, known = _laid(root, words, problems), len(problems)
        recipe = _checked(laid, problems)
        if recipe is not None and self.smoke:
            shrunk = _laid(root, _read_words(smoke_words(recipe), "smoke", self.env, problems), problems)
            laid = _laid(shrunk, words, problems)
        if recipe is not None and (self.smoke or variant):
            laid = named(laid, variant) if variant else laid
            recipe = _checked(laid, problems)
        if recipe is None or len(problems) > known:
            return None
        origins, expressions = provenance(recipe, laid)
        return Loaded(recipe, origins, self.path, self.text.content, expressions)


def _open(source: str | Path | Mapping[str, Any]) -> tuple[Path | None, Text]:
    if isinstance(source, Mapping):
        try:
            return None, Text("recipe", to_yaml(source))
        except TypeError as error:
            raise RecipeError(str(error)) from error
    if str(source) == "-":
        return None, read_stdin()
    path = find_recipe(str(source))
    shipped = path.parent == packaged_folder() and not Path(source).is_file()
    return path, read_text(path, path.name if shipped else str(path), "file")


def _read(text: Text, env: Mapping[str, str], problems: list[Problem]) -> Node:
    """The tree of one file.

    Raises:
        RecipeError: It cannot be read, is empty or is no mapping: nothing else can be checked then.
    """
    try:
        root, found = read_yaml(text)
    except UnreadableError as error:
        raise as_error(text.label, [error.problem]) from error
    if root is None or root.value is None:
        hint = "a recipe begins with `llmkit: 1`; `llmkit init gpt my.yaml` makes one"
        raise as_error(text.label, [Problem(Spot(text), "the recipe is empty", hint)])
    if not isinstance(root.value, Keys):
        what = "a list" if isinstance(root.value, list) else "a single value"
        hint = "a recipe is keys and values: `llmkit: 1`, `name: ...`"
        raise as_error(text.label, [Problem(root.spot, f"{what} is no recipe", hint)])
    problems += found
    problems += interpolate(root, env)
    if "llmkit" not in root.value.nodes:
        problems.append(no_version(text))
    return root


def _read_chain(text: Text, path: Path | None, env: Mapping[str, str], problems: list[Problem]) -> Node:
    """A recipe laid over what it extends, and that over what it extends in turn."""
    root = _read(text, env, problems)
    seen = [path.resolve()] if path is not None else []
    layers = [without(root, "extends")]
    while (below := find(root, ("extends",))) is not None and below.value is not None:
        if not isinstance(below.value, str):
            message = "`extends` is a path or the name of a shipped recipe"
            problems.append(Problem(below.spot, message))
            break
        folder = path.parent if path is not None else Path()
        try:
            path = find_recipe(below.value, folder)
        except RecipeError as error:
            problems.append(Problem(below.spot, error.message, error.hint))
            break
        if path.resolve() in seen:
            chain = " -> ".join(one.name for one in [*seen, path.resolve()])
            problems.append(Problem(below.spot, f"the recipes extend each other in a circle: {chain}"))
            break
        seen.append(path.resolve())
        root = _read(read_text(path, path.name, "extends"), env, problems)
        layers.append(without(root, "extends"))
    result = layers[-1]
    for top in reversed(layers[:-1]):
        result = merged(result, top)
    return result


def _read_words(
    words: Sequence[str], kind: Kind, env: Mapping[str, str], problems: list[Problem]
) -> list[Node]:
    layers = []
    for word in words:
        top, found = layer(word, kind)
        problems += found
        if top is not None:
            problems += interpolate(top, env)
            layers.append(top)
    return layers


def _laid(root: Node, layers: Sequence[Node], problems: list[Problem]) -> Node:
    """`root` under each of the layers in turn."""
    for top in layers:
        reach = out_of_reach(root, top)
        problems += reach
        root = root if reach else replace(merged(root, top), spot=root.spot)
    return root


def _checked(root: Node, problems: list[Problem]) -> Recipe | None:
    """The recipe of a merged tree; what is wrong with it is added to the problems, and may leave none."""
    # A value whose variable is not set is not judged a second time as the text of its expression.
    told = {problem.spot for problem in problems}
    meant: tuple[str, ...] = ()
    recipe = None
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        wrong = problems_of(error, root)
        meant = tuple(key for problem in wrong for key in problem.instead)
        problems += [problem for problem in wrong if problem.spot not in told]
    problems += check(root, meant)
    return recipe


def provenance(recipe: Recipe, root: Node) -> tuple[dict[str, Origin], dict[str, str]]:
    """Where each value came from, and the expressions of those that are secret, by dotted key."""
    origins: dict[str, Origin] = {}
    expressions: dict[str, str] = {}
    for path in leaves(recipe):
        node = find(root, path)
        key = ".".join(map(str, path))
        if node is None:
            origins[key] = Origin()
            continue
        spot = key_spot(root, path)
        origins[key] = replace(node.origin, line=spot.line if node.origin.line else 0)
        expressions |= dict(_secret_expressions(node, key))
    return origins, expressions


def _secret_expressions(node: Node, key: str) -> Iterator[tuple[str, str]]:
    """The `${env:...}` expressions at and below a node that stand for secrets, by dotted key."""
    if isinstance(node.value, Keys):
        for name, below in node.value.nodes.items():
            yield from _secret_expressions(below, f"{key}.{name}")
    elif isinstance(node.value, list):
        for number, below in enumerate(node.value):
            yield from _secret_expressions(below, f"{key}.{number}")
    elif node.expression is not None and is_secret(node.expression, node.value):
        yield key, node.expression


def leaves(block: Block, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of a block's values: down to what is no block and no list of blocks."""
    found: list[tuple[str | int, ...]] = []
    for name in type(block).model_fields:
        value, path = getattr(block, name), (*prefix, name)
        if isinstance(value, Block):
            found += leaves(value, path)
        elif isinstance(value, list) and value and isinstance(value[0], Block):
            found += [leaf for i, item in enumerate(value) for leaf in leaves(item, (*path, i))]
        else:
            found.append(path)
    return found
