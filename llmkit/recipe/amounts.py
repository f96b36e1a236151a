"""A number with its unit, and how numbers, sizes and times are read and written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["tokens", "samples", "epochs", "steps", "seconds", "percent", "never"]

POWERS: Mapping[str, int] = {
    "": 1,
    "k": 1000,
    "K": 1000,
    "M": 1000**2,
    "B": 1000**3,
    "T": 1000**4,
    "Ki": 1024,
    "Mi": 1024**2,
    "Gi": 1024**3,
    "Ti": 1024**4,
}
BYTES: Mapping[str, int] = {
    "B": 1,
    "kB": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}
_SECONDS: Mapping[str, int] = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True)
class Amount:
    """A number and its unit; `str()` gives the canonical spelling, which parses back to the same value.

    Attributes:
        value: The number in the plain unit: tokens, samples, epochs, steps, seconds, or percent as 0-100.
            0 for `never`. Whole for tokens, samples and steps.
        unit: What `value` counts.
    """

    value: float
    unit: Unit

    def __str__(self) -> str:
        if self.unit == "never":
            return "never"
        if self.unit == "percent":
            return f"{_plain(self.value)}%"
        if self.unit == "seconds":
            return format_duration(self.value)
        number = _plain(self.value) if self.unit == "epochs" else format_count(int(self.value))
        return f"{number} {self.unit[:-1] if number == '1' else self.unit}"


def format_count(value: int) -> str:
    """The shortest exact spelling of a whole number: 32000 -> `32k`, 32768 -> `32Ki`, 1001 -> `1001`."""
    spellings = [str(value)]
    for name, power in POWERS.items():
        mantissa = Decimal(value) / power
        if name not in ("", "K") and mantissa >= 1 and mantissa * power == value:
            spellings.append(f"{mantissa.normalize():f}{name}")
    # A long mantissa is no better to read, and the parser stops at six digits.
    return min(
        (one for one in spellings if one.isdigit() or re.match(r"[0-9]{1,6}(?:\.[0-9]{1,9})?[kKMBTG]", one)),
        key=len,
    )


def format_size(value: int) -> str:
    """The shortest exact spelling of a number of bytes: 100000000 -> `100MB`, 4096 -> `4KiB`."""
    spellings = [f"{value}B"]
    for name, power in BYTES.items():
        mantissa = Decimal(value) / power
        if name != "KB" and mantissa >= 1 and mantissa * power == value:
            spellings.append(f"{mantissa.normalize():f}{name}")
    return min(spellings, key=len)


def format_duration(seconds: float) -> str:
    """A time as hours, minutes and seconds without zero parts: 5400 -> `1h30m`, 0.5 -> `0.5s`."""
    if seconds >= 3600 * 10**9:
        return f"{_plain(seconds)}s"
    whole, rest = divmod(Decimal(repr(seconds)), 60)
    hours, minutes = divmod(int(whole), 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else ""]
    return "".join([*parts, f"{rest.normalize():f}s" if rest or not whole else ""])


def _plain(value: float) -> str:
    """A number without an exponent and without a trailing `.0`."""
    return f"{Decimal(repr(value)).normalize():f}"


def _number(text: str, powers: Mapping[str, int] = POWERS) -> Decimal:
    """`1.5k` -> 1500; the caller has matched the text against a pattern."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([A-Za-z]*)", text)
    assert match, text
    return Decimal(match[1]) * powers[match[2]]


def whole_number(text: str, powers: Mapping[str, int] = POWERS) -> int:
    """The nearest whole number, and 1 for a positive amount that would round to 0."""
    exact = _number(text, powers)
    return max(int(exact.to_integral_value()), 1 if exact > 0 else 0)


def _float(value: Decimal) -> float:
    return int(value) if value == value.to_integral_value() else float(value)


def seconds_of(text: str) -> float:
    """`1h30m` -> 5400."""
    parts = re.findall(r"([0-9.]+)([dhms])", text)
    return _float(sum((Decimal(number) * _SECONDS[letter] for number, letter in parts), Decimal(0)))


def amount_of(text: str, unit: Unit) -> Amount:
    """The amount that `text`, already matched against the unit's pattern, stands for."""
    if unit == "never":
        return Amount(0, "never")
    if unit == "seconds":
        return Amount(seconds_of(text), "seconds")
    number = re.sub(r" *(?:tokens?|samples?|steps?|epochs?|%)$", "", text)
    if unit in ("epochs", "percent"):
        return Amount(_float(Decimal(number)), unit)
    return Amount(whole_number(number), unit)
