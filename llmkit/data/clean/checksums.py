"""Check digits of numbers that people are known by; each takes the characters without separators."""

from datetime import date
from functools import cache
from typing import Final

_CHINESE_WEIGHTS: Final = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CHINESE_PROVINCES: Final = frozenset(
    map(
        str,
        (
            *range(11, 16),
            *range(21, 24),
            *range(31, 38),
            *range(41, 47),
            *range(50, 55),
            *range(61, 66),
            71,
            81,
            82,
            83,
        ),
    )
)
_SPANISH_LETTERS: Final = "TRWAGMYFPDXBNJZSQVHLCKE"
_ITALIAN_ODD: Final = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16,
         10, 22, 25, 24, 23),
        strict=True,
    )
)  # fmt: skip

_IBAN_COUNTRIES: Final = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
IBAN_LENGTHS: Final = {
    country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()
}
"""How long an account number is, by country. Source: SWIFT, IBAN Registry."""

_CARD_KINDS: Final = (
    ((4,), (13, 16, 19)),  # Visa
    ((range(51, 56), range(2221, 2721)), (16,)),  # Mastercard
    ((34, 37), (15,)),  # American Express
    ((6011, range(644, 650), 65), (16, 19)),  # Discover
    ((range(300, 306), 36, 38, 39), (14, 16, 19)),  # Diners Club
    ((range(3528, 3590),), (16, 19)),  # JCB
    ((62,), (16, 17, 18, 19)),  # UnionPay
)
"""Prefixes and lengths of payment cards. Source: the networks' published ranges (ISO/IEC 7812)."""


def luhn(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit. **Source**: ISO/IEC 7812-1, annex B."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


@cache
def _card_prefixes() -> dict[str, tuple[int, ...]]:
    table = dict[str, tuple[int, ...]]()
    for prefixes, lengths in _CARD_KINDS:
        for prefix in prefixes:
            for number in prefix if isinstance(prefix, range) else (prefix,):
                table[str(number)] = lengths
    return table


def payment_card(digits: str) -> bool:
    """Whether 13 to 19 digits are a card number: a known network's prefix and length, and the Luhn digit."""
    table = _card_prefixes()
    lengths = next((table[digits[:n]] for n in (4, 3, 2, 1) if digits[:n] in table), ())
    return len(digits) in lengths and luhn(digits)


def iban(text: str) -> bool:
    """Whether capitals and digits are an account number: the country's length, and 1 modulo 97.

    **Source**: ISO 13616-1 (IBAN), ISO 7064 (MOD 97-10).
    """
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def chinese_resident(number: str) -> bool:
    """Whether 18 characters are a resident's number: a province, a date of birth, the check character.

    **Source**: GB 11643-1999 (ISO 7064 MOD 11-2).
    """
    if number[:2] not in _CHINESE_PROVINCES or not _is_date(number[6:14]):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_CHINESE_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def _is_date(digits: str) -> bool:
    try:
        day = date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))
    except ValueError:
        return False
    return date(1880, 1, 1) <= day < date(2100, 1, 1)


def us_social_security(number: str) -> bool:
    """Whether nine digits can have been issued: no 000, 666 or 9xx area, no group 00, no serial 0000.

    **Source**: US Social Security Administration, number randomisation (2011).
    """
    area, group, serial = number[:3], number[3:5], number[5:]
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def german_tax(digits: str) -> bool:
    """Whether eleven digits are a German tax number: one digit twice or three times in the first ten, and the check.

    **Source**: Bundeszentralamt für Steuern, Steuer-ID (ISO 7064 MOD 11,10).
    """
    body = digits[:10]
    repeated = sorted(body.count(digit) for digit in set(body))
    if digits[0] == "0" or repeated[-1] not in (2, 3) or (len(repeated) > 1 and repeated[-2] != 1):
        return False
    product = 10
    for digit in body:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def french_insee(number: str) -> bool:
    """Whether 15 characters are a French social security number: its key is 97 less the number modulo 97.

    **Source**: INSEE, numéro d'inscription au répertoire.
    """
    month = int(number[3:5])
    if not (1 <= month <= 12 or 20 <= month <= 42 or month >= 50):
        return False
    # Corsica's departments 2A and 2B count as 19 and 18.
    department = {"2A": "19", "2B": "18"}.get(number[5:7], number[5:7])
    return 97 - int(number[:5] + department + number[7:13]) % 97 == int(number[13:])


def spanish_identity(number: str) -> bool:
    """Whether nine characters are a Spanish DNI or NIE: the letter is the number modulo 23.

    **Source**: Ministerio del Interior, cálculo del dígito de control del NIF/NIE.
    """
    first = {"X": "0", "Y": "1", "Z": "2"}.get(number[0], number[0])
    return _SPANISH_LETTERS[int(first + number[1:8]) % 23] == number[8]


def italian_fiscal(code: str) -> bool:
    """Whether 16 characters are an Italian fiscal code: the last letter checks the others.

    **Source**: Decreto ministeriale 23 dicembre 1976, articolo 7.
    """
    odd = sum(_ITALIAN_ODD[character] for character in code[0:15:2])
    even = sum(int(c) if c.isdigit() else ord(c) - ord("A") for c in code[1:15:2])
    return chr(ord("A") + (odd + even) % 26) == code[15]
