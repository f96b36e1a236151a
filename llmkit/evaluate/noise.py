"""Damaged copies of labelled rows: how much a model's figures owe to clean text.

A share of the characters is dropped, doubled, swapped with the next one or replaced by another of the same kind of
writing from the rows themselves: a small letter by a small one, a Han character by a Han one. What is asked is damaged
(text, question, source, the person's turns, anchor), never what is right; a word of a tagged sentence keeps its place
and at least a character. Each copy is a function of (seed, copy, row) alone.

**Source**: Belinkov and Bisk, "Synthetic and Natural Noise Both Break Neural Machine Translation", 2018, section 3.2;
Pruthi et al., "Combating Adversarial Misspellings with Robust Word Recognition", 2019, section 3.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmkit.metrics.scripts import HAN

_HAN = re.compile(f"[{HAN}]")
_KINDS: Sequence[tuple[str, Callable[[str], bool]]] = (
    ("han", lambda one: bool(_HAN.match(one))),
    ("digit", str.isdigit),
    ("lower", str.islower),
    ("upper", str.isupper),
    ("letter", str.isalpha),
)
_CHANGES = ("drop", "double", "swap", "replace")
_HAN_CHANGES = ("drop", "replace")
"""Of characters that are words of their own: those who type them seldom double or swap them."""

Damaged = Callable[[str], str]


class Damage:
    """Damages the rows of a task.

    Args:
        task: The rows' task.
        rows: Whole rows, none of them a window.
        share: The share of characters that are changed.
        seed: All chance follows from it.

    Attributes:
        share: As given.
    """

    def __init__(self, task: str, rows: Sequence[Mapping[str, Any]], *, share: float, seed: int) -> None:
        self.share = share
        self._task = task
        self._rows = rows
        self._seed = seed
        self._letters: dict[str, list[str]] = {}
        seen = sorted({one for row in rows for text in _texts(task, row) for one in text})
        for one in seen:
            self._letters.setdefault(_kind(one), []).append(one)

    def rows(self, copy: int) -> list[dict[str, Any]]:
        """The rows, damaged; other numbers of the copy damage them otherwise."""
        return [self._row(dict(row), copy, number) for number, row in enumerate(self._rows)]

    def _row(self, row: dict[str, Any], copy: int, number: int) -> dict[str, Any]:
        chance = np.random.default_rng([self._seed, copy, number])
        return _DAMAGED[self._task](row, lambda text: self.text(text, chance))

    def text(self, text: str, chance: np.random.Generator) -> str:
        """A text, damaged; one that is not empty does not become so.

        Args:
            text: Any text; white space stays as it is.
            chance: Decides what happens where.
        """
        hit = chance.random(len(text)) < self.share
        made: list[str] = []
        place = 0
        while place < len(text):
            one = text[place]
            if hit[place] and not one.isspace():
                changes = _HAN_CHANGES if _kind(one) == "han" else _CHANGES
                kind = changes[int(chance.integers(len(changes)))]
                after = text[place + 1] if place + 1 < len(text) else ""
                made.append(self._changed(kind, one, after, chance))
                place += 2 if kind == "swap" and after and not after.isspace() else 1
            else:
                made.append(one)
                place += 1
        found = "".join(made)
        return found if found.strip() or not text.strip() else text

    def _changed(self, kind: str, one: str, after: str, chance: np.random.Generator) -> str:
        if kind == "drop":
            return ""
        if kind == "double":
            return one * 2
        if kind == "swap":
            return after + one if after and not after.isspace() else one
        others = [other for other in self._letters.get(_kind(one), ()) if other != one]
        return others[int(chance.integers(len(others)))] if others else one


def _kind(one: str) -> str:
    return next((name for name, holds in _KINDS if holds(one)), "sign")


def _texts(task: str, row: Mapping[str, Any]) -> list[str]:
    """What would be damaged of a row."""
    seen: list[str] = []

    def note(text: str) -> str:
        seen.append(text)
        return text

    _DAMAGED[task](dict(row), note)
    return seen


def _named(*names: str) -> Callable[[dict[str, Any], Damaged], dict[str, Any]]:
    def damage(row: dict[str, Any], damaged: Damaged) -> dict[str, Any]:
        return {**row, **{name: damaged(row[name]) for name in names if name in row}}

    return damage


def _tokens(row: dict[str, Any], damaged: Damaged) -> dict[str, Any]:
    return {**row, "tokens": [damaged(token) for token in row["tokens"]]}


def _turns(name: str) -> Callable[[dict[str, Any], Damaged], dict[str, Any]]:
    """What the person says in these messages."""

    def damage(row: dict[str, Any], damaged: Damaged) -> dict[str, Any]:
        def turn(message: Mapping[str, Any]) -> Mapping[str, Any]:
            if message.get("role") != "user" or not isinstance(message.get("content"), str):
                return message
            return {**message, "content": damaged(message["content"])}

        return {**row, name: [turn(message) for message in row[name]]}

    return damage


_DAMAGED: Mapping[str, Callable[[dict[str, Any], Damaged], dict[str, Any]]] = {
    "cls": _named("text", "other"),
    "regression": _named("text", "other"),
    "tag": _tokens,
    "qa": _named("question"),
    "seq2seq": _named("source"),
    "sft": _turns("messages"),
    "dpo": _turns("prompt"),
    "embed": _named("anchor"),
}
