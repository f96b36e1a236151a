"""Parameters and modules chosen by patterns of their names."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

_NEAR_NAMES = 5


def alternatives(pattern: str) -> list[str]:
    """What stands between the `|` of a pattern."""
    return [part.strip() for part in pattern.split("|") if part.strip()]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a recipe means the parameter or module of this name.

    `*`, `?` and `[...]` are as in file names, and `|` stands between alternatives. Each alternative must fit the whole
    name or some of its parts, from dot to dot: `norm*` means `layers.0.norm1.weight`, but `orm1` does not.
    """
    return any(fnmatchcase(f".{name}.", f"*.{part}.*") for part in alternatives(pattern))


def near_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names with the parts that are most alike, one of each kind: layers differ in their number only."""
    word = pattern.replace("*", "").lower()

    def likeness(name: str) -> float:
        parts = [name, *name.split(".")]
        return max(difflib.SequenceMatcher(None, word, part.lower()).ratio() for part in parts)

    kinds = {"".join("#" if c.isdigit() else c for c in name): name for name in reversed(list(names))}
    return sorted(kinds.values(), key=likeness, reverse=True)[:_NEAR_NAMES]
