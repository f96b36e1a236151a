"""Numbers that people are known by: phones, national ids, payment cards, account numbers.

Two scans find the places worth looking at, runs of digits and separators and runs of capitals with digits; all
patterns read only there, and all are bounded, so the time is linear in the text.
"""

import re
from collections.abc import Callable, Iterator
from typing import Final

from llmkit.data.clean import checksums
from llmkit.data.clean.finds import Find

_AREA = re.compile(r"[0-9][0-9 ().\-/\u00a0]{5,}")
_BEFORE: Final = 6
_AFTER: Final = 16
"""How far a number may reach over a run of digits: `+`, brackets and letters before; letters and the rest after."""

# What may not stand beside a number: it would be a piece of a longer number, a name or a decimal fraction.
_NOT_AFTER = r"(?<![0-9A-Za-z_])(?<![0-9][.,])"
_NOT_BEFORE = r"(?![0-9A-Za-z_%])(?![.,][0-9])"
_GAP = r"[ .\-/\u00a0]"

_CARD = re.compile(
    rf"{_NOT_AFTER}(?:[0-9]{{13,19}}|[0-9]{{4}}([ \-])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{1,4}}(?:\1[0-9]{{1,3}})?"
    rf"|[0-9]{{4}}([ \-])[0-9]{{6}}\2[0-9]{{4,5}}){_NOT_BEFORE}"
)
_CHINESE_ID = re.compile(rf"{_NOT_AFTER}[1-9][0-9]{{16}}[0-9Xx]{_NOT_BEFORE}")
_US_ID = re.compile(rf"{_NOT_AFTER}(?<!-)([0-9]{{3}})-([0-9]{{2}})-([0-9]{{4}}){_NOT_BEFORE}(?!-)")
_GERMAN_ID = re.compile(
    rf"{_NOT_AFTER}[1-9][0-9](?:[0-9]{{9}}| [0-9]{{3}} [0-9]{{3}} [0-9]{{3}}){_NOT_BEFORE}"
)
_FRENCH_ID = re.compile(
    rf"{_NOT_AFTER}[1-478]( ?)[0-9]{{2}}\1[0-9]{{2}}\1(?:[0-9]{{2}}|2[AB])\1[0-9]{{3}}\1[0-9]{{3}} ?[0-9]{{2}}"
    rf"{_NOT_BEFORE}"
)
_SPANISH_ID = re.compile(rf"{_NOT_AFTER}(?:[0-9]{{8}}|[XYZ]-?[0-9]{{7}})-?[A-HJ-NP-TV-Z]{_NOT_BEFORE}")

_INTERNATIONAL = re.compile(
    rf"(?<![0-9A-Za-z_+])(?<![0-9]-)(?:\+[1-9]|(?<![0-9A-Fa-f][ ])00[1-9][0-9]{{0,2}}(?=[ \-/()]))"
    rf"(?:(?:{_GAP}|[()]){{0,3}}[0-9]){{7,14}}(?![0-9])"
)
_PLAIN_NUMBER = re.compile(r"\+[0-9]+(?:\.[0-9]+)?")
_NORTH_AMERICA = re.compile(
    rf"(?<![0-9A-Za-z_+.])(?:1[ .\-])?(?:\([2-9][0-9]{{2}}\)[ .\-]?|[2-9][0-9]{{2}}([.\-]))"
    rf"[2-9][0-9]{{2}}(?(1)\1|[.\- ])[0-9]{{4}}{_NOT_BEFORE}(?!-)"
)
_CHINESE_MOBILE = re.compile(
    rf"{_NOT_AFTER}(?<![0-9]-)(?:(?:\+|00)?86[ \-]?)?1[3-9][0-9]([ \-]?)[0-9]{{4}}\1[0-9]{{4}}{_NOT_BEFORE}(?!-[0-9])"
)
_CHINESE_LANDLINE = re.compile(
    rf"{_NOT_AFTER}(?<!-)\(?0[1-9][0-9]{{1,2}}\)?-[2-9][0-9]{{6,7}}{_NOT_BEFORE}(?!-[0-9])"
)
_ANNOUNCED = re.compile(r"\(?[0-9](?:(?:[ .\-/\u00a0]|[()]){0,3}[0-9]){6,14}(?![0-9A-Za-z_])")
_ANNOUNCEMENT = re.compile(
    r"(?:(?<![a-z])(?:tel|telephone|phone|fax|mobile|cell|telefon|handy|tél)|电话|電話|手机|手機|传真|傳真)"
    r"[ .:：\u00a0]{0,4}(?:number|no|nr|is|号码|號碼|号)?[ .:：\u00a0]{0,3}[(+]?\Z",
    re.IGNORECASE,
)

# What may not stand before comes after the first character: so the search is several times as fast.
_IBAN = re.compile(
    r"[A-Z](?<![0-9A-Za-z].)[A-Z][0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,4})?)"
)
_ITALIAN_ID = re.compile(
    r"[A-Z](?<![0-9A-Za-z].)[A-Z]{5}[0-9LMNP-V]{2}[ABCDEHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z](?![0-9A-Za-z])"
)

Check = Callable[[str], bool]
_CHECKED_IDS: Final[tuple[tuple[re.Pattern[str], Check], ...]] = (
    (_CHINESE_ID, checksums.chinese_resident),
    (_US_ID, checksums.us_social_security),
    (_GERMAN_ID, checksums.german_tax),
    (_FRENCH_ID, checksums.french_insee),
    (_SPANISH_ID, checksums.spanish_identity),
)


def areas(text: str) -> list[tuple[int, int]]:
    """Where numbers may stand: runs of at least six digits and separators, with a little before and after."""
    return [(max(0, m.start() - _BEFORE), min(len(text), m.end() + _AFTER)) for m in _AREA.finditer(text)]


def phones(text: str, places: list[tuple[int, int]]) -> Iterator[Find]:
    """Phone numbers: international, North American, Chinese mobiles and lines, and what a word announces as one."""
    for start, stop in places:
        for pattern in (_INTERNATIONAL, _NORTH_AMERICA, _CHINESE_MOBILE, _CHINESE_LANDLINE):
            for match in pattern.finditer(text, start, stop):
                if pattern is not _INTERNATIONAL or _is_international(match.group()):
                    yield Find(*match.span(), "phone")
        announced = _ANNOUNCED.search(text, start, stop)
        if announced and _ANNOUNCEMENT.search(text, max(0, announced.start() - 24), announced.start()):
            yield Find(*announced.span(), "phone")


def _is_international(number: str) -> bool:
    """At most 15 digits (ITU-T E.164); at least 10 unless grouped, as `+1234567` and `+1234567.8` are arithmetic."""
    digits = sum(map(str.isdigit, number.removeprefix("00")))
    return digits <= 15 and (digits >= 10 or not _PLAIN_NUMBER.fullmatch(number))


def national_ids(text: str, places: list[tuple[int, int]]) -> Iterator[Find]:
    """National numbers whose check digits, or ranges, hold: Chinese, US, German, French, Spanish, Italian."""
    for start, stop in places:
        for pattern, holds in _CHECKED_IDS:
            for match in pattern.finditer(text, start, stop):
                if holds(_plain(match.group())):
                    yield Find(*match.span(), "id")
    for match in _ITALIAN_ID.finditer(text):
        if checksums.italian_fiscal(match.group()):
            yield Find(*match.span(), "id")


def cards(text: str, places: list[tuple[int, int]]) -> Iterator[Find]:
    """Payment card numbers: a network's prefix and length, and the Luhn digit."""
    for start, stop in places:
        for match in _CARD.finditer(text, start, stop):
            if checksums.payment_card(_plain(match.group())):
                yield Find(*match.span(), "card")


def account_numbers(text: str) -> Iterator[Find]:
    """International bank account numbers, in one piece or in groups of four."""
    for match in _IBAN.finditer(text):
        compact = _plain(match.group())
        length = checksums.IBAN_LENGTHS.get(compact[:2], 0)
        # Words in capitals may follow: `DE89 3704 0044 0532 0130 00 BIC`.
        if len(compact) >= length > 0 and checksums.iban(compact[:length]):
            stop = _place_of(match.group(), length) + match.start()
            if not text[stop : stop + 1].isalnum():
                yield Find(match.start(), stop, "iban")


def _place_of(grouped: str, length: int) -> int:
    """Where the first `length` characters, blanks not counted, end."""
    count = 0
    for place, character in enumerate(grouped):
        count += character != " "
        if count == length:
            return place + 1
    return len(grouped)


def _plain(number: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", number)
