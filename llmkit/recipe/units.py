"""Values with units: `50M tokens`, `3 epochs`, `1h30m`, `2%`, `8Ki`, `512MB`.

A unit is part of the value, so that a bare number can never be read as the wrong thing. `k M B T` are powers
of 1000, `Ki Mi Gi Ti` powers of 1024. The parser and the published JSON Schema share their expressions,
written in the common subset of Python and ECMA 262, so an editor accepts exactly what the loader accepts.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from llmkit.errors import UsageError
from llmkit.recipe.amounts import (
    BYTES,
    Amount,
    Unit,
    amount_of,
    format_count,
    format_duration,
    format_size,
    seconds_of,
    whole_number,
)
from llmkit.registry import nearest

__all__ = [
    "BATCH",
    "EVERY",
    "LENGTH",
    "WARMUP",
    "Amount",
    "Batch",
    "Count",
    "Duration",
    "Every",
    "Grammar",
    "Length",
    "Part",
    "Ratio",
    "Several",
    "Size",
    "Unit",
    "Warmup",
    "Whole",
    "duration_of",
    "format_count",
    "format_duration",
    "format_size",
    "listing",
    "parse_duration",
    "parse_size",
    "parse_whole",
    "shown",
    "unit_error",
]

_POSITIVE = r"(?=[^a-z%]*[1-9])"  # some digit before the unit is not 0
_DECIMAL = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
_POWER = r"(?:[kKMBT]|[KMGT]i)"
# At most 19 digits in all, so that the canonical spelling of every value is itself of this form.
_WHOLE = (
    rf"(?:[0-9]{{1,6}}(?:\.[0-9]{{1,9}})?{_POWER}|[1-9](?:\.[0-9]{{1,9}})?e(?:1[0-8]|[0-9])|[0-9]{{1,19}})"
)
_PERCENT = r"(?:100(?:\.0{1,9})?|[0-9]{1,2}(?:\.[0-9]{1,9})?)"
_PARTS = "".join(
    rf"(?: ?[0-9]{{1,{n}}}(?:\.[0-9]{{1,9}})?{letter})?"
    for letter, n in zip("dhms", (6, 9, 9, 15), strict=True)
)
_DURATION = rf"(?=[0-9])(?=.*[1-9]){_PARTS}"
_COUNT = rf"[1-9][0-9]{{0,5}}(?:\.[0-9]{{1,9}})?{_POWER}"
_SIZE = rf"[1-9][0-9]{{0,11}}(?:\.[0-9]{{1,9}})? ?(?:{'|'.join(BYTES)})"

_PATTERNS: Mapping[Unit, str] = {
    "tokens": rf"{_WHOLE} *tokens?",
    "samples": rf"{_WHOLE} *samples?",
    "steps": rf"{_WHOLE} *steps?",
    "epochs": rf"{_DECIMAL} *epochs?",
    "percent": rf"{_PERCENT} *%",
    "seconds": _DURATION,
    "never": "never",
}

# What people write for a unit of ours; used only to propose the right spelling.
_OTHER_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("rows", "row", "sequences", "sequence", "examples", "seqs"), "samples"),
    **dict.fromkeys(("iterations", "iters", "iter", "updates", "batches"), "steps"),
    **dict.fromkeys(("percent", "pct"), "%"),
    **dict.fromkeys(("hours", "hour", "hrs", "hr"), "h"),
    **dict.fromkeys(("minutes", "minute", "mins", "min"), "m"),
    **dict.fromkeys(("seconds", "second", "secs", "sec"), "s"),
}


@dataclass(frozen=True)
class Grammar:
    """What one kind of value with a unit looks like.

    Attributes:
        kind: What errors call it, such as `a length`.
        units: The units it may have.
        examples: Spellings for errors and docs.
        zero: Whether 0 is allowed.
    """

    kind: str
    units: tuple[Unit, ...]
    examples: tuple[str, ...]
    zero: bool = False

    def pattern(self, unit: Unit) -> str:
        """The regular expression of a value in `unit`."""
        free = self.zero or unit in ("never", "seconds")
        return _PATTERNS[unit] if free else _POSITIVE + _PATTERNS[unit]

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema that accepts what `parse` accepts."""
        pattern = "|".join(self.pattern(unit) for unit in self.units)
        return {"type": "string", "pattern": f"^(?:{pattern})$", "examples": list(self.examples)}

    def match(self, text: str) -> Amount | None:
        """The amount `text` stands for, or None when it is not of this grammar."""
        unit = next((unit for unit in self.units if re.fullmatch(self.pattern(unit), text)), None)
        return amount_of(text, unit) if unit else None

    def parse(self, value: object) -> Amount:
        """Read a value of a recipe.

        Raises:
            PydanticCustomError: It is no such value; the message proposes what would work.
        """
        if isinstance(value, Amount):
            value = str(value)
        amount = self.match(value) if isinstance(value, str) else None
        if amount is None:
            raise self._error(value)
        return amount

    def _error(self, value: object) -> PydanticCustomError:
        text = "" if isinstance(value, bool | dict | list | None) else str(value).strip()
        if re.fullmatch(r"[0-9.]+(?:e[0-9]+)?|[0-9.]+[kKMBT]i?", text):
            proposals = [f"{text}{'%' if unit == 'percent' else ' ' + unit}" for unit in self.units]
            proposals = [p for p in proposals if self.match(p)]
            if proposals:
                return unit_error(f"`{text}`: say what it counts: {listing(proposals)}")
        proposal = self._repair(text)
        hint = f"did you mean `{proposal}`?" if proposal else f"write {listing(self.examples)}"
        return unit_error(f"`{shown(value)}` is not {self.kind}", hint)

    def _repair(self, text: str) -> str | None:
        """The spelling that `text` probably means: another word for a unit, a slip, the wrong case."""
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([A-Za-z]{1,2}(?![A-Za-z]))? *([A-Za-z%]*)", text)
        if not match:
            return (
                "never" if "never" in self.units and text.lower() in ("no", "off", "none", "false") else None
            )
        number, power, word = match[1], match[2] or "", match[3].lower()
        known = [unit for unit in self.units if unit in ("tokens", "samples", "steps", "epochs")]
        unit = _OTHER_WORDS.get(word) or nearest(word, known) or ""
        space = "" if unit in ("%", "h", "m", "s") else " "
        candidates = [
            f"{number}{p}{space}{unit}" for p in (power, power.upper(), power.lower(), power.title())
        ]
        return next((c for c in candidates if self.match(c)), None)


def listing(words: tuple[str, ...] | list[str]) -> str:
    """`a`, `b` or `c`."""
    quoted = [f"`{word}`" for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def shown(value: object) -> str:
    """A value as the recipe spells it, shortened for a message."""
    words: Mapping[object, str] = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unit_error(message: str, hint: str = "") -> PydanticCustomError:
    """An error of ours inside pydantic; the loader shows `message` and `hint` as they are."""
    return PydanticCustomError("llmkit", "{message}", {"message": message, "hint": hint})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_whole(value: object) -> object:
    """2.0 is the whole number 2, as in JSON Schema; anything else is left to the type's own check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count_parser(minimum: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        """Read a whole number: 8000, `8k` or `8Ki`."""
        number = parse_whole(value)
        if isinstance(number, int) and not isinstance(number, bool):
            if number < minimum:
                raise unit_error(f"`{number}` is below {minimum}, the least that makes sense here")
            return number
        if isinstance(value, str) and re.fullmatch(_COUNT, value):
            return whole_number(value)
        hint = "write `8000`, `8k` (8,000) or `8Ki` (8,192)"
        raise unit_error(f"`{shown(value)}` is not a whole number", hint)

    return parse


def _count_schema(minimum: int) -> dict[str, Any]:
    return {"anyOf": [{"type": "integer", "minimum": minimum}, {"type": "string", "pattern": f"^{_COUNT}$"}]}


def parse_size(value: object) -> int:
    """Read a size in bytes: `512MB`, `4KiB`, or a positive whole number of bytes.

    Raises:
        PydanticCustomError: It is no size.
    """
    number = parse_whole(value)
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
        return number
    if isinstance(value, str) and re.fullmatch(_SIZE, value):
        return whole_number(value, BYTES)
    raise unit_error(f"`{shown(value)}` is not a size", "write `512MB`, `4KiB` or a number of bytes")


def parse_duration(value: object) -> float:
    """Read a time in seconds: `90s`, `10m`, `1h30m`.

    Raises:
        PydanticCustomError: It is no time.
    """
    if isinstance(value, str) and re.fullmatch(_DURATION, value):
        return seconds_of(value)
    if _is_number(value):
        raise unit_error(f"`{shown(value)}`: say what it counts: {listing([f'{value}s', f'{value}m'])}")
    raise unit_error(f"`{shown(value)}` is not a time", "write `90s`, `10m` or `1h30m`")


def duration_of(text: str, option: str) -> float:
    """The seconds that an option of the command line gives as `90s`, `10m`, `1h30m`.

    Raises:
        UsageError: It is no time.
    """
    try:
        return parse_duration(text)
    except PydanticCustomError as error:
        context = error.context or {}
        raise UsageError(f"{option}: {context['message']}", hint=context["hint"]) from None


def _ratio_parser(top: bool) -> Callable[[object], float]:
    def parse(value: object) -> float:
        """Read a share: 0.02 or `2%`."""
        share: float | None = None
        if isinstance(value, int | float) and not isinstance(value, bool):
            share = value
        elif isinstance(value, str) and re.fullmatch(rf"{_PERCENT} *%", value):
            share = float(Decimal(value.rstrip("% ")) / 100)
        if share is None or not (0 <= share < 1 or (top and share == 1)):
            limit = "from 0 to 1" if top else "from 0 to below 1"
            raise unit_error(f"`{shown(value)}` is not a share {limit}", "write `0.02` or `2%`")
        return float(share)

    return parse


LENGTH = Grammar(
    "a length", ("epochs", "steps", "tokens", "seconds"), ("50M tokens", "3 epochs", "20k steps", "1h30m")
)
EVERY = Grammar(
    "an interval",
    ("steps", "percent", "tokens", "epochs", "seconds", "never"),
    ("500 steps", "10%", "10M tokens", "1 epoch", "10m", "never"),
)
WARMUP = Grammar(
    "a warm-up",
    ("steps", "percent", "tokens", "never"),
    ("500 steps", "2%", "10M tokens", "never"),
    zero=True,
)
BATCH = Grammar("a batch", ("samples", "tokens"), ("32 samples", "64Ki tokens"))


def _as_warmup(value: object) -> Amount:
    """`never` is no warm-up at all: 0 steps."""
    amount = WARMUP.parse(value)
    return Amount(0, "steps") if amount.unit == "never" else amount


def _ratio_schema(top: bool) -> dict[str, Any]:
    limit = {"maximum": 1} if top else {"exclusiveMaximum": 1}
    pattern = rf"^{_PERCENT} *%$" if top else r"^[0-9]{1,2}(?:\.[0-9]{1,9})? *%$"
    return {"anyOf": [{"type": "number", "minimum": 0, **limit}, {"type": "string", "pattern": pattern}]}


_AS_TEXT = PlainSerializer(str, return_type=str)
_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{_SIZE}$"}]}

Length = Annotated[Amount, PlainValidator(LENGTH.parse), _AS_TEXT, WithJsonSchema(LENGTH.json_schema())]
Every = Annotated[Amount, PlainValidator(EVERY.parse), _AS_TEXT, WithJsonSchema(EVERY.json_schema())]
Warmup = Annotated[Amount, PlainValidator(_as_warmup), _AS_TEXT, WithJsonSchema(WARMUP.json_schema())]
Batch = Annotated[Amount, PlainValidator(BATCH.parse), _AS_TEXT, WithJsonSchema(BATCH.json_schema())]
Ratio = Annotated[float, PlainValidator(_ratio_parser(True)), WithJsonSchema(_ratio_schema(True))]
"""A share from 0 to 1, both included."""
Part = Annotated[float, PlainValidator(_ratio_parser(False)), WithJsonSchema(_ratio_schema(False))]
"""A share from 0 to below 1."""
Count = Annotated[int, PlainValidator(_count_parser(1)), WithJsonSchema(_count_schema(1))]
"""A whole number of 1 or more."""
Several = Annotated[int, PlainValidator(_count_parser(2)), WithJsonSchema(_count_schema(2))]
"""A whole number of 2 or more."""
Size = Annotated[int, PlainValidator(parse_size), WithJsonSchema(_SIZE_SCHEMA)]
Duration = Annotated[
    float, PlainValidator(parse_duration), WithJsonSchema({"type": "string", "pattern": f"^(?:{_DURATION})$"})
]
Whole = Annotated[int, BeforeValidator(parse_whole)]
