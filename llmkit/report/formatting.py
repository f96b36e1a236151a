"""Numbers as people read them, the same in the terminal, in logs and in the report."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

UNKNOWN = "?"
_COUNT_UNITS = ("", "k", "M", "B", "T")
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def _scaled(value: float, units: Sequence[str]) -> tuple[str, str]:
    """`value` in the largest unit below it: at most three digits, one decimal under 100, no trailing `.0`."""
    size, unit = abs(value), 0
    # 999.5 would be written as 1000: what rounds up to the next unit is written in the next unit.
    while size >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    text = f"{size:.0f}" if size >= 99.95 else f"{size:.1f}".removesuffix(".0")
    return ("-" if value < 0 and text != "0" else "") + text, units[unit]


def format_count(value: float) -> str:
    """A count in short: `950`, `8.1k`, `12.3M`, `1.5B`."""
    if not math.isfinite(value):
        return UNKNOWN
    return "".join(_scaled(value, _COUNT_UNITS))


def format_bytes(value: float) -> str:
    """Bytes in decimal units, as recipes write them: `512 B`, `1.2 GB`."""
    if not math.isfinite(value):
        return UNKNOWN
    return " ".join(_scaled(value, _BYTE_UNITS))


def format_rate(value: float, unit: str = "tok") -> str:
    """How many a second: `12.3k tok/s`."""
    return f"{format_count(value)} {unit}/s"


def format_duration(seconds: float) -> str:
    """A time in at most two units: `120ms`, `3.4s`, `45s`, `3m10s`, `1h05m`, `2d03h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return UNKNOWN
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms" if seconds else "0s"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // part:02d}{part_name}"
    return f"{whole}s"


def format_number(value: float, digits: int = 4) -> str:
    """A measured number to `digits` significant digits: `4.213`, `0.0123`, `1,234`, `5.9e-04`."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if size >= 10**6 or 0 < size < 1e-3:
        return f"{value:.{digits - 1}e}" if size >= 10**6 else f"{value:.1e}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def format_percent(ratio: float) -> str:
    """A share of 1 in per cent: `20%`, `3.4%`."""
    if not math.isfinite(ratio):
        return UNKNOWN
    percent = ratio * 100
    return (f"{percent:.0f}" if abs(percent) >= 9.95 else f"{percent:.1f}".removesuffix(".0")) + "%"


def format_value(key: str, value: object) -> str:
    """A value as the unit in its name says: `lr`, `*_bytes`, `*_s`, `*_per_s`, `*_ratio`, `mfu`, `num_*`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    name = key.rsplit("/", 1)[-1]
    if name == "lr":
        return f"{value:.1e}"
    if name.endswith("_per_s"):
        return format_rate(value, _rate_unit(name))
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("_s") or "seconds" in name:
        return format_duration(value)
    if name == "mfu" or name.endswith("_ratio"):
        return format_percent(value)
    if name.startswith("num_") or isinstance(value, int):
        return f"{value:,}" if math.isfinite(value) else UNKNOWN
    return format_number(value)


def _rate_unit(name: str) -> str:
    unit = name.removesuffix("_per_s")
    return {"tokens": "tok", "bytes": "B"}.get(unit, unit)


def labelled(key: str, value: object) -> str:
    """A value with its short name, as a progress line holds it: `loss 4.21`, but `12.3k tok/s`."""
    name = key.rsplit("/", 1)[-1]
    text = format_value(key, value)
    if name.endswith("_per_s"):
        return text
    return f"{name.removesuffix('_s').removesuffix('_bytes')} {text}"


def one_line(text: str) -> str:
    r"""`text` on one line with nothing a terminal obeys: newlines and control characters as `\n`, `\x1b`."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


def visible(text: str) -> str:
    r"""`text` with newlines and tabs; other control and direction characters written out, as `\x1b`."""
    return "".join(c if c in "\n\t" or not _obeyed(c) else _escape(c) for c in text)


def _obeyed(char: str) -> bool:
    # Cc: control; Cf: invisible format characters, of which the bidirectional ones reorder a terminal line;
    # Cs: lone surrogates, which no stream can encode. Joiners (U+200C, U+200D) belong to words and emoji.
    return unicodedata.category(char) in ("Cc", "Cf", "Cs") and char not in "\u200c\u200d"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def cell_width(text: str) -> int:
    """How many terminal columns `text` takes: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def jsonable(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities become null, other objects their text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # also those of numpy
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [jsonable(v) for v in value]
    return jsonable(value.to_dict()) if hasattr(value, "to_dict") else str(value)
