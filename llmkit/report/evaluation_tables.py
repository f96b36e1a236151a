"""The tables of an evaluation as sections of the page, and how its figures are written."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from llmkit.registry import EVALUATIONS, TASKS
from llmkit.report.formatting import format_bytes, format_number, format_percent, format_value
from llmkit.report.page import (
    Facts,
    Html,
    details,
    headed,
    inner,
    listed,
    objects,
    pairs,
    records,
    section,
    table,
    words,
)
from llmkit.report.svg import Series, bar, chart, escape

_MOST_CLASSES = 30
_FIRST = 10
_MOST_TEXT = 600


def shown(report: Facts) -> list[str]:
    """The figures of an evaluation, the one that tells a better model first, counts left out."""
    task, metrics = str(report.get("task")), inner(report, "figures")
    known = TASKS[task].metrics if task in TASKS else EVALUATIONS[task].metrics if task in EVALUATIONS else ()
    order = dict.fromkeys([str(report.get("best")), *known, *metrics])
    return [name for name in order if name in metrics and not name.startswith("num_")]


def small_bar(shares: Sequence[tuple[str, float]]) -> Html:
    """A bar beside the number that it draws."""
    return Html(f'<span class="small">{bar(shares)}</span>')


def interval(found: Facts) -> str:
    """A figure's interval in words; empty where it has none."""
    low, high = found.get("low"), found.get("high")
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{format_number(low)} to {format_number(high)}"


def classes(rows: Sequence[Facts]) -> str:
    """Per class: how many of what was called so is, how many of what is so was found."""

    def lines(some: Sequence[Facts]) -> str:
        cells = [
            [
                str(row.get("label", "")),
                *(_number(row.get(key)) for key in ("precision", "recall", "f1")),
                f"{row.get('support', 0):,}",
                small_bar([("f1", float(row["f1"]))]) if is_number(row.get("f1")) else "",
            ]
            for row in some
        ]
        return table(["label", "precision", "recall", "F1", "rows", ""], cells, numeric=range(1, 5))

    if len(rows) <= _MOST_CLASSES:
        return section("Class by class", lines(rows))
    worst = sorted(rows, key=lambda row: (_order(row.get("f1")), str(row.get("label"))))[:_FIRST]
    return section(
        "Class by class",
        lines(worst),
        details(f"All {len(rows)} classes", lines(rows)),
        lead=f"The {len(worst)} of {len(rows)} classes with the lowest F1.",
    )


def calibration(rows: Sequence[Facts]) -> str:
    """How often the model is right by how sure it is; on the diagonal both are the same."""
    used = [
        row
        for row in rows
        if row.get("num") and is_number(row.get("confidence")) and is_number(row.get("accuracy"))
    ]
    if not used:
        return ""
    points = sorted((float(row["confidence"]), float(row["accuracy"])) for row in used)
    drawn = chart(
        "How often it is right, by how sure it is",
        [
            Series("as sure as right", [(0.0, 0.0), (1.0, 1.0)], "faint", 6, hover=False),
            Series("right", points, "dots", 1),
        ],
        x_name="sure",
        format_y=format_percent,
        from_zero=True,
        tall=True,
    )
    bins = [
        [
            f"{_number(row.get('low'))} to {_number(row.get('high'))}",
            f"{row.get('num', 0):,}",
            _number(row.get("confidence")),
            _number(row.get("accuracy")),
        ]
        for row in rows
    ]
    counted = table(["sure", "rows", "mean probability", "right"], bins, numeric=range(1, 4))
    return section(
        "Calibration",
        drawn,
        details(f"All {len(rows)} bins", counted),
        lead="Below the diagonal the model is surer than it is right.",
    )


def by_part(tables: Facts) -> str:
    """The figures of each source, and of short and long documents."""
    parts = [
        headed(title, records(objects(tables.get(name))))
        for title, name in (("By source", "per_source"), ("By length of the document", "per_length"))
    ]
    return section("Part by part", *parts)


def references(report: Facts, lines: Facts) -> str:
    """What the loss is to be compared with, the model's own among them, the lowest first."""
    known = {str(name): float(value) for name, value in lines.items() if is_number(value)}
    own = inner(report, "figures", "loss").get("value")
    if not known or not is_number(own):
        return ""
    rows = sorted([("this model", float(own)), *known.items()], key=lambda row: row[1])
    top = max(value for _, value in rows) or 1.0
    cells = [
        [name, format_number(value), small_bar([("f2" if name == "this model" else "f1", value / top)])]
        for name, value in rows
    ]
    return section("The loss beside simple guesses", table(["", "nats each", ""], cells, numeric=[1]))


def noise(report: Facts, rows: Sequence[Facts]) -> str:
    """The figures under typing errors, their mean over the copies, and how far those are apart."""
    # Their plain row has no seed, and the rows of mean and deviation have a word for it.
    copies = [row for row in rows if is_number(row.get("seed"))]
    names = list(dict.fromkeys(name for row in copies for name in inner(row, "metrics")))
    if not names:
        return ""
    plain = inner(report, "figures")
    best = [name for name in shown(report) if name in names][:6] or names[:6]
    cells = [["as they are", *(figure(name, inner(plain, name).get("value")) for name in best)]]
    for typos in dict.fromkeys(row.get("typos") for row in copies):
        alike = [inner(row, "metrics") for row in copies if row.get("typos") == typos]
        cells.append([_share(typos), *(_spread(name, alike) for name in best)])
    every = [{**{k: v for k, v in row.items() if k != "metrics"}, **inner(row, "metrics")} for row in copies]
    head = ["characters wrong", *map(words, best)]
    return section(
        "With typing errors",
        table(head, cells, numeric=range(1, len(head))),
        details(f"All {len(copies)} copies", records(every)),
        lead="The mean over the copies, in brackets the least and the greatest.",
    )


def _share(typos: object) -> str:
    return format_percent(float(typos)) if isinstance(typos, int | float) else str(typos)


def _spread(name: str, rows: Sequence[Facts]) -> str:
    values = [float(row[name]) for row in rows if is_number(row.get(name))]
    if not values:
        return "–"
    mean = figure(name, math.fsum(values) / len(values))
    return f"{mean} ({figure(name, min(values))} to {figure(name, max(values))})"


def rows_of(title: str, rows: Sequence[Facts]) -> str:
    """Like rows under a heading, a column for each of their fields."""
    return section(title, records(rows))


def errors(rows: Sequence[Facts]) -> str:
    """The errors that the model was surest of."""
    head = ["where", "text", "right", "said", "score"]
    cells = [
        [
            str(row.get("place", "")),
            *(_text(row.get(key)) for key in ("text", "target", "prediction")),
            _number(row.get("score")),
        ]
        for row in rows
    ]
    return section(
        "What it got wrong",
        table(head, cells[:_FIRST], numeric=[4]),
        details(f"{len(cells) - _FIRST} more", table(head, cells[_FIRST:], numeric=[4])),
        lead="The worst first: the errors that the model was surest of, or what is furthest off.",
    )


def retrieved(rows: Sequence[Facts]) -> str:
    """Examples of what was found: whatever fields they have, texts as they are."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(key)) for key in keys] for row in rows]
    return section(
        "What was found",
        table(list(map(words, keys)), cells[:_FIRST]),
        details(f"{len(cells) - _FIRST} more", table(list(map(words, keys)), cells[_FIRST:])),
    )


def other_table(name: str, value: object) -> str:
    """A table that has no form of its own: as rows, or as names and values."""
    if isinstance(value, Mapping):
        return section(words(name).capitalize(), pairs(value))
    return section(words(name).capitalize(), records(objects(value)))


def settings(report: Facts) -> str:
    """How the figures came about: windows, decoding, signatures, the data's address."""
    rows = [
        (words(key), _setting(key, value))
        for key, value in flat(inner(report, "settings"))
        if value not in (None, "")
    ]
    address = str(report.get("data_address") or "")
    rows += [("data", address)] if address else []
    return section("How it was measured", listed(rows))


def flat(facts: Facts, prefix: str = "") -> list[tuple[str, Any]]:
    """Names and plain values, those of objects inside by dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in facts.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def _setting(key: str, value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else format_value(key, value)


def _text(value: object) -> Html:
    """A text of the user's as a cell; what is no text as JSON, what is long cut."""
    text = (
        value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)
    )
    cut = text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…"
    return Html(f'<span class="quoted" dir="auto">{escape(cut)}</span>')


def figure(name: str, value: object) -> str:
    """A figure as its name says; one that happens to be whole is a fraction all the same, but counts are not."""
    if value is None:
        return "–"
    counts = name.startswith("num_")
    return format_value(name, float(value) if isinstance(value, int) and not counts else value)


def change(name: str, value: float) -> str:
    """How far a figure lies above another's, in its unit where that is one of size: `+0.012`, `-12.3 MB`."""
    if name.endswith("bytes") and math.isfinite(value):
        return f"{'' if value < 0 else '+'}{format_bytes(value)}"
    return f"{value:+.4g}"


def _number(value: object) -> str:
    return (
        format_number(float(value))
        if isinstance(value, int | float)
        else "–"
        if value is None
        else str(value)
    )


def _order(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
