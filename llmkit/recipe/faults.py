"""Pydantic's errors as problems: the exact key or value, what it should be, the nearest that works."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from pydantic import ValidationError

from llmkit.recipe import fields
from llmkit.recipe.positions import Keys, Node, Path, Spot, Text, deepest, dotted, find, key_spot
from llmkit.recipe.problems import MOST_SHOWN, Problem
from llmkit.recipe.translate import FOREIGN
from llmkit.recipe.units import shown
from llmkit.registry import nearest

_OTHER_WORDS = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "float32": "fp32", "bfloat16": "bf16"}
"""What else some words of a recipe are called."""


def problems_of(error: ValidationError, root: Node) -> list[Problem]:
    """One problem for each wrong key or value; the branches of a union count once.

    What comes after the first hundred is counted and not looked into, as nobody will read it.
    """

    def place(item: Any) -> tuple[int, int]:
        spot = deepest(root, tuple(item["loc"]))[1].spot
        return spot.line, spot.column

    found = sorted(_of_branches(error, root), key=place)
    rest = [
        Problem(deepest(root, tuple(item["loc"]))[1].spot, str(item["msg"])) for item in found[MOST_SHOWN:]
    ]
    found = found[:MOST_SHOWN]
    unknown = [_unknown_key(tuple(e["loc"]), root) for e in found if e["type"] == "extra_forbidden"]
    meant = [key for problem in unknown for key in problem.instead]
    problems: dict[Path, Problem] = {}
    for item in found:
        if item["type"] == "extra_forbidden":
            continue
        if item["type"] == "missing":
            path = (*deepest(root, tuple(item["loc"][:-1]))[0], item["loc"][-1])
            if not _covered(section_of(path), meant):
                problems.setdefault(path, _missing_key(path, root))
        else:
            path, node = deepest(root, tuple(item["loc"]))
            problems.setdefault(path, _wrong_value(item, path, node))
    return [*unknown, *problems.values(), *rest]


def _of_branches(error: ValidationError, root: Node) -> list[Any]:
    """The errors, by the path of what was written: pydantic puts the block's name in where a word may stand instead.

    Of such a pair only those of the branch that was meant are told: a mapping is meant as the block.
    """
    found: list[Any] = list(error.errors(include_url=False))
    told = [{**item, "loc": _written(item["loc"], root)} for item in found]
    places = [(item["type"], deepest(root, tuple(item["loc"]))[0]) for item in told]
    words = {path for kind, path in places if kind == "literal_error"}
    inside = {path[:length] for _, path in places for length in range(len(path))}

    def is_meant(item: Any) -> bool:
        path, node = deepest(root, tuple(item["loc"]))
        if isinstance(node.value, Keys):
            return item["type"] != "literal_error" or path not in inside
        return item["type"] != "model_type" or path not in words

    return [item for item in told if is_meant(item)]


def _written(loc: Sequence[str | int], root: Node) -> Path:
    """A path of pydantic's without the names of blocks that stand for branches: keys are never written so."""
    path: list[str | int] = []
    for part in loc:
        is_branch = isinstance(part, str) and part[:1].isupper() and find(root, (*path, part)) is None
        path += [] if is_branch else [part]
    return tuple(path)


def _covered(key: str, meant: Sequence[str]) -> bool:
    """Whether an unknown key was probably meant for `key`, so that its absence is no second problem."""
    return any(one == key or one.startswith(key + ".") for one in meant)


def section_of(path: Path) -> str:
    """The schema's dotted key of a path: without the numbers of list elements."""
    return dotted(tuple(part for part in path if isinstance(part, str)))


def _unknown_key(path: Path, root: Node) -> Problem:
    """A key that is not in its section: another tool's, misplaced, misspelt, or nobody's."""
    name, section = str(path[-1]), section_of(path[:-1])
    spot = key_spot(root, path)
    where = f"`{section}`" if section else "a recipe"
    if name == "<<":
        return Problem(spot, "`<<`: YAML 1.2 has no merge key", "use `extends: other.yaml`")
    unknown = f"`{name}` is not a key of {where}"
    if name in FOREIGN:
        key, note = FOREIGN[name]
        return Problem(spot, f"`{name}`: in llmkit this is `{key}`", note, (key,))
    siblings = fields.keys_of(section)
    close = nearest(name, siblings)
    elsewhere = _same_name(name, section)
    if elsewhere is not None:
        return Problem(
            spot, f"{unknown}; it belongs in {_home(elsewhere)}", f"write `{elsewhere}`", (elsewhere,)
        )
    if close is not None:
        key = f"{section}.{close}" if section else close
        return Problem(spot, unknown, f"did you mean `{close}`?", (key,))
    foreign = nearest(name, FOREIGN) if len(name) > 5 else None
    if foreign is not None:
        key, note = FOREIGN[foreign]
        return Problem(spot, unknown, f"`{foreign}` of other tools is `{key}` here. {note}".strip(), (key,))
    far = _nearest_anywhere(name, section)
    if far is not None:
        return Problem(spot, unknown, f"did you mean `{far}`?", (far,))
    return Problem(spot, unknown, f"its keys are {', '.join(siblings)}")


def _home(key: str) -> str:
    section = key.rpartition(".")[0]
    return f"`{section}`" if section else "the top level of the recipe"


def _shared(a: str, b: str) -> int:
    """How many leading parts two dotted keys share."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1)


def _same_name(name: str, section: str) -> str | None:
    """The key of this name in another section, the closest one in the tree."""
    keys = [key for key in fields.settings() if key.rpartition(".")[2] == name]
    return max(keys, key=lambda key: (_shared(key, section + "."), -key.count(".")), default=None)


def _nearest_anywhere(name: str, section: str) -> str | None:
    """The key whose last name is nearly `name`, in any section; not for names of up to three letters."""
    ratios = {
        key: SequenceMatcher(None, name.lower(), key.rpartition(".")[2]).ratio() for key in fields.settings()
    }
    best = max(ratios, key=lambda key: (ratios[key], _shared(key, section + ".")))
    return best if ratios[best] >= 0.8 and len(name) > 3 else None


def _missing_key(path: Path, root: Node) -> Problem:
    name, section = str(path[-1]), section_of(path[:-1])
    setting = fields.settings()[section_of(path)]
    where = f"`{section}`" if section else "a recipe"
    if name == "llmkit":
        return Problem(
            key_spot(root, ()), "a recipe needs `llmkit: 1`, the version of its schema", "add the line"
        )
    return Problem(key_spot(root, path[:-1]), f"{where} needs `{name}`", f"`{name}`: {setting.text}")


def no_version(text: Text) -> Problem:
    """Every file says which version of the schema it is written for, also one that extends another."""
    return Problem(Spot(text), "a recipe needs `llmkit: 1`, the version of its schema", "add the line")


def _wrong_value(item: Any, path: Path, node: Node) -> Problem:
    """A value of the wrong type, outside its range, or not one of the known words."""
    value = node.expression if node.expression is not None else node.plain()
    context = item.get("ctx", {})
    if item["type"] == "llmkit":
        text = str(context["message"])
        if node.expression is not None:
            text = f"what `{node.expression}` stands for does not fit"
        return Problem(node.spot, f"{_named(path)}{text}", str(context["hint"]))
    key = section_of(path)
    setting = fields.settings().get(key)
    if setting is None:
        return Problem(node.spot, f"{_named(path)}`{shown(value)}`: {item['msg']}")
    if setting.block is not None:
        return _not_a_section(path, node, key)
    if item["type"] == "string_pattern_mismatch":
        return Problem(node.spot, f"{_named(path)}`{shown(value)}` does not fit", setting.text)
    schema = fields.accepts(key)
    if isinstance(path[-1], int):
        schema = fields.element(schema)
    words = fields.enum_values(schema)
    close = nearest(value, words) if isinstance(value, str) else None
    if _OTHER_WORDS.get(str(value).lower()) in words:
        close = _OTHER_WORDS[str(value).lower()]
    what = "a list or mapping" if isinstance(node.value, Keys | list) else f"`{shown(value)}`"
    expected = fields.describe(schema)
    return Problem(
        node.spot, f"{_named(path)}{what} is not {expected}", f"did you mean `{close}`?" if close else ""
    )


def _named(path: Path) -> str:
    """`lr: `, the key in front of a message about its value."""
    names = [part for part in path if isinstance(part, str)]
    return f"`{names[-1]}`: " if names else ""


def _not_a_section(path: Path, node: Node, key: str) -> Problem:
    what = "a list" if isinstance(node.value, list) else f"`{shown(node.plain())}`"
    hint = f"its keys are {', '.join(fields.keys_of(key))}"
    words = fields.enum_values(fields.accepts(key))
    if words and isinstance(node.value, str):  # one word is enough here, or the section
        close = nearest(node.value, words)
        message = f"{_named(path)}{what} is not one of {', '.join(words)}, nor a section (keys and values)"
        return Problem(node.spot, message, f"did you mean `{close}`?" if close else hint)
    return Problem(node.spot, f"{_named(path)}{what} stands where a section (keys and values) belongs", hint)


def written(root: Node, key: str) -> bool:
    """Whether a dotted key was written with a value other than null and the empty list."""
    node = find(root, tuple(key.split(".")))
    return node is not None and node.value is not None and node.value != []
