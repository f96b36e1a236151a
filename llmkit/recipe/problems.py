"""What is wrong with a recipe, and how it is shown: place, source line, caret, what would work."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from llmkit.errors import RecipeError
from llmkit.recipe.positions import Spot

_ORDER = {"file": 0, "extends": 1, "smoke": 2, "command line": 3}
_WIDEST = 100

MOST_SHOWN = 100
"""Problems that are shown in full; nobody reads more, and ten thousand guesses at misspelt keys take minutes."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        spot: The key or value to point at.
        message: What is wrong, with the value.
        hint: What would work; empty when the message says it.
        instead: The dotted keys that the author probably meant, for an unknown key.
    """

    spot: Spot
    message: str
    hint: str = ""
    instead: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.spot}: {self.message}", *_excerpt(self.spot)]
        return "\n".join([*lines, f"  {self.hint}"] if self.hint else lines)


def _cells(text: str) -> int:
    """The columns that a text takes on a terminal: 2 for a wide character, 0 for a combining one."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(bool(unicodedata.combining(letter)) for letter in text)


def _visible(text: str) -> str:
    """The text with what a terminal would act on replaced, one character for one."""
    return "".join(letter if letter.isprintable() else " " if letter == "\t" else "�" for letter in text)


def _excerpt(spot: Spot) -> list[str]:
    """The source line and the caret under it; a long line is cut around the place."""
    line = spot.text.line(spot.line)
    if not line.strip():
        return []
    start = max(0, spot.column - 1 - _WIDEST // 2) if len(line) > _WIDEST else 0
    before = _visible(line[start : spot.column - 1])
    rest = _visible(line[spot.column - 1 : start + _WIDEST])
    number = "" if spot.text.kind == "command line" else str(spot.line)
    carets = "^" * max(1, _cells(rest[: spot.width]))
    return [f"  {number:>4} | {before}{rest}", f"       | {' ' * _cells(before)}{carets}"]


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems as a reader meets them: the recipe, what it extends, the words; by line and column."""

    def place(problem: Problem) -> tuple[int, str, int, int]:
        spot = problem.spot
        return _ORDER[spot.text.kind], spot.text.label, spot.line, spot.column

    return sorted(dict.fromkeys(problems), key=place)


def as_error(label: str, problems: Iterable[Problem]) -> RecipeError:
    """The error that carries all problems, each as its full text."""
    ordered = in_order(problems)
    texts = [str(problem) for problem in ordered[:MOST_SHOWN]]
    if len(ordered) > MOST_SHOWN:
        texts.append(f"{label}: and {len(ordered) - MOST_SHOWN:,} further problems")
    count = f"{len(ordered):,} problems" if len(ordered) > 1 else "1 problem"
    return RecipeError(f"{label}: {count}", problems=texts)
