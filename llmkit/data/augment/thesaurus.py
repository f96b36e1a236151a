"""Words of the same meaning: a line of a file names some, `big, large, huge`."""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from llmkit.errors import DataError, MissingError
from llmkit.recipe.tasks import Augment

_SHIPPED = ("en", "zh")
_SEPARATOR = ","


class Thesaurus:
    """Words by their meaning; case does not count.

    Args:
        groups: Words that may stand for each other.
    """

    def __init__(self, groups: Sequence[Sequence[str]] = ()) -> None:
        self._others: dict[str, list[str]] = {}
        for group in groups:
            for word in group:
                mine = self._others.setdefault(word.lower(), [])
                mine += [other for other in group if other != word and other not in mine]
        # Words of scripts without spaces are found in running text, the longest first.
        joined = sorted(
            (word for word in self._others if not word.isascii()), key=lambda word: (-len(word), word)
        )
        self._by_first: dict[str, list[str]] = {}
        for word in joined:
            self._by_first.setdefault(word[0], []).append(word)

    def others(self, word: str) -> list[str]:
        """Words of the same meaning, in their order; none where it is not known."""
        return self._others.get(word.lower(), [])

    def at(self, text: str, place: int) -> str:
        """The longest known word of another script than Latin that stands there, or nothing."""
        known = self._by_first.get(text[place], ())
        return next((word for word in known if text.startswith(word, place)), "")


def load_thesaurus(path: str | None, language: str) -> Thesaurus:
    """A thesaurus of the user's own, or the small one that ships for the language.

    Raises:
        MissingError: There is no such file, or none ships for the language.
        DataError: The file holds no two words of the same meaning.
    """
    text = _read(path, language)
    groups = [
        [word.strip() for word in line.replace("，", _SEPARATOR).split(_SEPARATOR) if word.strip()]
        for line in text.splitlines()
        if not line.startswith("#")
    ]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        raise DataError(
            f"{path}: no line has two words of the same meaning",
            hint="write a line for each meaning: big, large",
        )
    return Thesaurus(groups)


def fingerprint(steps: Sequence[Augment]) -> list[str]:
    """Hashes of the files that these steps read: with the recipe, all that decides what they do.

    Raises:
        MissingError: One is not there.
    """
    paths = [step.thesaurus for step in steps if step.thesaurus is not None]
    return [hashlib.sha256(_read(path, "").encode()).hexdigest() for path in paths]


def _read(path: str | None, language: str) -> str:
    if path is None:
        name = language.split("-")[0]
        if name not in _SHIPPED:
            raise MissingError(
                f"no words of the same meaning ship for language {language!r}, only for {' and '.join(_SHIPPED)}",
                hint="name a file: `thesaurus: words.txt`, with a line for each meaning: big, large",
            )
        return (files("llmkit.data.augment") / f"{name}.txt").read_text("utf-8")
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"thesaurus: {path} cannot be read ({error})", hint="name a text file in UTF-8"
        ) from error
