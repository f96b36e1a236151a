"""A loaded recipe written out: `resolved.yaml`, `llmkit recipe show`, and the difference of two recipes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.recipe.block import Block
from llmkit.recipe.emit import Expression, to_yaml
from llmkit.recipe.finetune_checks import ROWS_ONLY, TEXT_DATA
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.load import Loaded, leaves
from llmkit.recipe.objectives import other_sections
from llmkit.recipe.schema import Finetune, Pretrain
from llmkit.recipe.tasks import other_task_sections
from llmkit.recipe.units import Amount
from llmkit.registry import TASKS

_HEAD = """\
# Written by llmkit: the whole recipe with its defaults; what was `auto` says why it is what it is.
# It is a recipe itself and runs as it is.
"""


@dataclass(frozen=True)
class Difference:
    """A setting that two recipes have differently; None where one does not have it (or has null).

    Attributes:
        key: The dotted key.
        a: Its value in the first recipe, as a recipe spells it.
        b: Its value in the second.
    """

    key: str
    a: Any
    b: Any


def resolved_yaml(loaded: Loaded, choices: Mapping[str, tuple[object, str]] | None = None) -> str:
    """The full recipe with its defaults, which loads back to the same recipe with the choices made.

    Args:
        loaded: The recipe.
        choices: Dotted key -> (the value that was chosen, why); it replaces the recipe's value and the reason
            becomes a comment.

    Raises:
        ValueError: A choice is made for a key that the recipe does not have.
    """
    choices = choices or {}
    unknown = set(choices) - set(values(loaded))
    if unknown:
        raise ValueError(f"no such settings in the recipe: {', '.join(sorted(unknown))}")
    chosen = {key: value for key, (value, _) in choices.items()}
    reasons = {key: why for key, (_, why) in choices.items()}
    return _HEAD + to_yaml(_written(loaded.recipe, "", loaded.expressions, chosen), reasons)


def without_secrets(loaded: Loaded) -> dict[str, Any]:
    """The recipe as a mapping that `load_recipe` takes, for a file: secrets as the expressions they came from."""
    return _written(loaded.recipe, "", loaded.expressions, {})


def show_yaml(loaded: Loaded) -> str:
    """The full recipe, each setting with where its value came from as a comment."""
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    return to_yaml(_written(loaded.recipe, "", loaded.expressions, {}), origins)


def values(loaded: Loaded) -> dict[str, Any]:
    """Every setting by dotted key, as a recipe spells it; secrets as their expression."""
    found = {}
    for path in leaves(loaded.recipe):
        value: Any = loaded.recipe
        for part in path:
            value = value[part] if isinstance(part, int) else getattr(value, part)
        key = ".".join(map(str, path))
        found[key] = _spelt(value, key, loaded.expressions)
    return found


def diff(a: Loaded, b: Loaded) -> list[Difference]:
    """The settings in which two recipes differ, in the schema's order."""
    ours, theirs = values(a), values(b)
    keys = dict.fromkeys([*ours, *theirs])
    pairs = [Difference(key, ours.get(key), theirs.get(key)) for key in keys]
    return [pair for pair in pairs if pair.a != pair.b]


def _spelt(value: Any, key: str, expressions: Mapping[str, str]) -> Any:
    """A value as a recipe spells it: amounts as text, tuples as lists, secrets as their expression."""
    if key in expressions:
        return Expression(expressions[key])
    if isinstance(value, Amount):
        return str(value)
    if isinstance(value, list | tuple):
        return [_spelt(item, f"{key}.{number}", expressions) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: _spelt(item, f"{key}.{name}", expressions) for name, item in value.items()}
    return value


def _written(
    block: Block, prefix: str, expressions: Mapping[str, str], chosen: Mapping[str, object]
) -> dict[str, Any]:
    """A block as a nested mapping, without what is null by default and the settings of other objectives."""
    tree: dict[str, Any] = {}
    idle: Collection[str] = ()
    if isinstance(block, Pretrain):
        idle = other_sections(block.objective)
    elif isinstance(block, Finetune):
        idle = (*other_task_sections(block.task), *(() if block.task in TASKS else ROWS_ONLY))
    for name, info in type(block).model_fields.items():
        if name in idle:
            continue
        key, value = prefix + name, getattr(block, name)
        if isinstance(value, Block):
            tree[name] = _written(value, key + ".", expressions, chosen)
            if isinstance(value, Labelled) and isinstance(block, Finetune) and block.task not in TASKS:
                tree[name] = {one: said for one, said in tree[name].items() if one in TEXT_DATA}
        elif isinstance(value, list) and value and isinstance(value[0], Block):
            items = enumerate(value)
            tree[name] = [_written(item, f"{key}.{i}.", expressions, chosen) for i, item in items]
        elif (value := chosen.get(key, value)) is not None or info.default is not None:
            tree[name] = _spelt(value, key, {} if key in chosen else expressions)
    return tree
