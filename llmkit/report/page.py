"""The building blocks of the page: sections, tables, lists; every text in them is escaped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmkit.report.formatting import format_percent, format_value
from llmkit.report.svg import escape

Facts = Mapping[str, Any]
Card = tuple[str, str, Callable[[float], str], str]
"""A number at the top of the page: its key in the headline, its name, its form, a few words about it."""


class Html(str):
    """Markup that was made here, so a table's cell that holds it is not escaped once more."""

    __slots__ = ()


def section(title: str, *parts: str, lead: str = "") -> str:
    """A part of the page under a heading; empty when all its parts are.

    Args:
        title: The heading, as text.
        parts: Markup.
        lead: A sentence under the heading, as text.
    """
    body = "".join(parts)
    if not body:
        return ""
    said = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def headed(title: str, body: str) -> str:
    """Markup under a small heading; empty when there is none."""
    return f"<h3>{escape(title)}</h3>{body}" if body else ""


def details(summary: str, body: str, *, opened: bool = False) -> str:
    """Markup that opens under the words of `summary`; empty when there is nothing in it."""
    if not body:
        return ""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """A table of texts (or `Html`); the columns in `numeric` are set to the right. Empty when there are no rows."""
    marks = [' class="n"' if i in numeric else "" for i in range(len(head))]
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{_cell(c)}</td>" for m, c in zip(marks, row, strict=True)) + "</tr>"
        for row in rows
    )
    cells = "".join(f'<th scope="col"{m}>{escape(h)}</th>' for m, h in zip(marks, head, strict=True))
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
        if body
        else ""
    )


def _cell(content: str) -> str:
    return content if isinstance(content, Html) else escape(content)


def pairs(facts: Facts) -> str:
    """Names and values as a definition list; values that are empty or nested are left out."""
    return listed(
        [
            (words(key), format_value(key, value))
            for key, value in facts.items()
            if value not in (None, "") and not isinstance(value, list | dict)
        ]
    )


def listed(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, both as text, as a definition list; empty when there are none."""
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="pairs">{inner}</dl>' if inner else ""


_NAMED = {"memory_bytes": "peak memory", "file_bytes": "file size"}
"""What fields are called whose names alone say too little."""


def words(key: str) -> str:
    """A field's name as words: `num_documents` -> `documents`, `peak_memory_bytes` -> `peak memory`."""
    name = key.rsplit("/", 1)[-1].removeprefix("num_")
    if name in _NAMED or name.endswith("_per_s"):
        return _NAMED.get(name, name.replace("_", " "))
    for ending in ("_bytes", "_s", "_seconds"):
        name = name.removesuffix(ending)
    return name.replace("_", " ")


def records(rows: Sequence[Facts]) -> str:
    """A table of like records: a column for every plain field that any of them has."""
    keys = dict.fromkeys(
        k for r in rows for k, v in r.items() if not isinstance(v, list | dict) and v is not None
    )
    numeric = [i for i, k in enumerate(keys) if all(isinstance(r.get(k), int | float | None) for r in rows)]
    cells = [[format_value(k, r[k]) if r.get(k) is not None else "–" for k in keys] for r in rows]
    return table([words(k) for k in keys], cells, numeric=numeric)


def inner(facts: Facts, *keys: str) -> Facts:
    """The object under a key, under keys inside each other; empty where something else or nothing is there."""
    for key in keys:
        found = facts.get(key)
        facts = found if isinstance(found, Mapping) else {}
    return facts


def objects(value: object) -> list[Facts]:
    """The objects of a list in a report; anything else in its place counts as none."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, Sequence) else []


def counts(value: object) -> dict[str, int]:
    """The counts above nought of an object in a report, by name; anything else in its place counts as none."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): count for name, count in value.items() if isinstance(count, int) and count > 0}


def by_size(found: Mapping[str, int]) -> list[tuple[str, int]]:
    """The largest count first, equal ones by name."""
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


def share(ratio: float) -> str:
    """A share of 1 in per cent; a tiny one does not become nought."""
    return f"{100 * ratio:.2g}%" if 0 < ratio < 0.0005 else format_percent(ratio)
