"""Personal data and secrets become marks. This reduces them in a text; it makes nobody anonymous.

What is not found: names, street addresses, dates of birth, numbers without a check digit or a known form, anything
spelled out ("john at example dot com"). A recipe's `detector` is the place for those.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, Final

from llmkit.data.clean.addresses import ip_addresses, mails
from llmkit.data.clean.credentials import secrets
from llmkit.data.clean.finds import Find, resolve
from llmkit.data.clean.person_numbers import account_numbers, areas, cards, national_ids, phones
from llmkit.errors import DataError, RecipeError
from llmkit.recipe.preparation import PersonalData, PersonalKind

Search = Callable[[str], Iterable[Find]]
Places = list[tuple[int, int]]

_BY_TEXT: Final[dict[PersonalKind, Search]] = {
    "mail": mails,
    "iban": account_numbers,
    "ip": ip_addresses,
    "secret": secrets,
}
_BY_PLACES: Final[dict[PersonalKind, Callable[[str, Places], Iterable[Find]]]] = {
    "phone": phones,
    "id": national_ids,
    "card": cards,
}
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


class PersonalDataMarker:
    """Replaces personal data by marks: `[MAIL] [PHONE] [ID] [CARD] [IBAN] [IP] [SECRET]`, and a detector's own.

    Args:
        spec: The recipe's `tokenize.prepare.personal_data`.

    Raises:
        RecipeError: There is no such detector.
    """

    def __init__(self, spec: PersonalData) -> None:
        kinds = sorted(set(spec.kinds))
        self._by_text = [_BY_TEXT[kind] for kind in kinds if kind in _BY_TEXT]
        self._by_places = [_BY_PLACES[kind] for kind in kinds if kind in _BY_PLACES]
        self._detector = Detector(spec.detector) if spec.detector is not None else None

    def __call__(self, text: str) -> tuple[str, dict[str, int]]:
        """The text with marks, and how many marks of each kind were set.

        Raises:
            DataError: The detector gave something other than (start, end, kind) inside the text.
        """
        finds = resolve(self.finds(text))
        if not finds:
            return text, {}
        pieces, place = list[str](), 0
        for start, stop, kind in finds:
            pieces += (text[place:start], f"[{kind.upper()}]")
            place = stop
        return "".join(pieces) + text[place:], dict(Counter(kind for _, _, kind in finds))

    def finds(self, text: str) -> Iterator[Find]:
        """All that is found, overlapping and in no order."""
        for search in self._by_text:
            yield from search(text)
        # One scan for digits spares most texts all the patterns for numbers.
        places = areas(text) if self._by_places else []
        for search_places in self._by_places:
            yield from search_places(text, places)
        if self._detector is not None:
            yield from self._detector(text)


class Detector:
    """A user's own function that finds personal data, such as names by a recogniser.

    Args:
        name: `package.module:function`. The function takes a text and gives (start, end, kind) triples: characters
            `start` to `end` (not included) are of a kind, one word.

    Raises:
        RecipeError: The name is not of this form, the module cannot be imported or has no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._find = _load(name)

    def __call__(self, text: str) -> Iterator[Find]:
        """What the function finds, checked.

        Raises:
            DataError: A triple is none, or outside the text, or its kind is not a word.
        """
        found = self._find(text)
        if not isinstance(found, Iterable):
            raise DataError(f"detector `{self.name}` gave {found!r}", hint=_TRIPLES)
        for triple in found:
            yield self._checked(triple, len(text))

    def _checked(self, triple: Any, length: int) -> Find:
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise DataError(f"detector `{self.name}` gave {triple!r}", hint=_TRIPLES)
        start, stop, kind = triple
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= length:
            raise DataError(
                f"detector `{self.name}` gave the place {start!r} to {stop!r} in a text of {length:,} characters",
                hint="places are whole numbers with 0 <= start < end <= len(text)",
            )
        if not isinstance(kind, str) or not _KIND.fullmatch(kind):
            raise DataError(
                f"detector `{self.name}` gave the kind {kind!r}",
                hint="a kind is one word of letters, digits and `_`, such as `name`",
            )
        return Find(start, stop, kind.lower())


_TRIPLES: Final = "it must give (start, end, kind) triples, such as `[(0, 4, 'name')]`"


def _load(name: str) -> Callable[[str], Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise RecipeError(
            f"`personal_data.detector`: {name!r} names no function",
            hint="write it as `package.module:function`",
        )
    try:
        function = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise RecipeError(
            f"`personal_data.detector`: {module!r} cannot be imported ({error})",
            hint="install it, or put its folder on PYTHONPATH",
        ) from error
    if not callable(function):
        raise RecipeError(f"`personal_data.detector`: {module!r} has no function {attribute!r}")
    return function
