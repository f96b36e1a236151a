"""Changes of a text by words: some become others of the same meaning, change places, go, or are added.

A text is cut into units: words with what stands between them, so that joining them gives the text again. Where words
are not parted by spaces each Han character is a unit, but for words that the thesaurus knows.

**Source**: Wei and Zou, "EDA: Easy Data Augmentation Techniques", 2019, section 2.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from llmkit.data.augment.thesaurus import Thesaurus

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+(?:['’-][^\W{_HAN}]+)*|\s+|[^\w\s]|_+")
_WORD = re.compile(r"\w")
_HAN_WORD = re.compile(rf"[{_HAN}]+")

T = TypeVar("T")
Units = list[str]
Change = Callable[[Units, int, np.random.Generator, Thesaurus], Units]


def changed(
    text: str, change: Change, ratio: float, chance: np.random.Generator, thesaurus: Thesaurus
) -> str:
    """The text with a share of its words changed, one at least; a text without words as it is."""
    units = units_of(text, thesaurus)
    words = places_of_words(units)
    if not words:
        return text
    after = "".join(change(units, max(1, round(ratio * len(words))), chance, thesaurus))
    return after if _WORD.search(after) else text


def units_of(text: str, thesaurus: Thesaurus) -> Units:
    """Words and what stands between them; joined they are the text."""
    units: Units = []
    place = 0
    while place < len(text):
        known = thesaurus.at(text, place)
        found = _UNIT.match(text, place)
        unit = known or (found.group() if found else text[place])
        units.append(unit)
        place += len(unit)
    return units


def places_of_words(units: Sequence[str]) -> list[int]:
    """The places of those units that are words."""
    return [place for place, unit in enumerate(units) if _WORD.search(unit)]


def synonyms(units: Units, count: int, chance: np.random.Generator, thesaurus: Thesaurus) -> Units:
    """Words that the thesaurus knows become others of the same meaning, in the same case."""
    known = [place for place in places_of_words(units) if thesaurus.others(units[place])]
    after = list(units)
    for place in _some(known, count, chance):
        after[place] = _like(_one(thesaurus.others(units[place]), chance), units[place])
    return after


def insert(units: Units, count: int, chance: np.random.Generator, thesaurus: Thesaurus) -> Units:
    """Words of the same meaning as some of the text's are added somewhere."""
    known = [place for place in places_of_words(units) if thesaurus.others(units[place])]
    after = list(units)
    for place in _some(known, count, chance):
        word = _one(thesaurus.others(units[place]), chance).lower()
        words = places_of_words(after)
        after[_one(words, chance) : 0] = [word] if _HAN_WORD.fullmatch(word) else [word, " "]
    return after


def swap(units: Units, count: int, chance: np.random.Generator, thesaurus: Thesaurus) -> Units:
    """Two words change places, so many times."""
    after, words = list(units), places_of_words(units)
    for _ in range(count if len(words) > 1 else 0):
        one, two = _some(words, 2, chance)
        after[one], after[two] = after[two], after[one]
    return after


def delete(units: Units, count: int, chance: np.random.Generator, thesaurus: Thesaurus) -> Units:
    """Words go, but never all of them, each with a space beside it."""
    words = places_of_words(units)
    gone: set[int] = set()
    for place in _some(words, min(count, len(words) - 1), chance):
        after_it, before_it = place + 1, place - 1
        gone.add(place)
        if after_it < len(units) and units[after_it].isspace():
            gone.add(after_it)
        elif before_it >= 0 and units[before_it].isspace():
            gone.add(before_it)
    return [unit for place, unit in enumerate(units) if place not in gone]


CHANGES: Mapping[str, Change] = {"synonyms": synonyms, "insert": insert, "swap": swap, "delete": delete}


def _some(places: Sequence[int], count: int, chance: np.random.Generator) -> list[int]:
    """So many different ones, or all."""
    return [int(n) for n in chance.permutation(np.asarray(places, dtype=np.int64))[: max(0, count)]]


def _one(choices: Sequence[T], chance: np.random.Generator) -> T:
    return choices[int(chance.integers(len(choices)))]


def _like(word: str, model: str) -> str:
    """The word in the case of another: `Big` for `Large`, `BIG` for `LARGE`."""
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word
