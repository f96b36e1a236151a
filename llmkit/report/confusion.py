"""What a classifier took for what: a heat map as inline SVG, and the pairs it confuses most."""

from collections.abc import Sequence

from llmkit.report.formatting import cell_width, format_percent, visible
from llmkit.report.page import Facts, details, headed, section, table
from llmkit.report.svg import escape

MOST_DRAWN = 30
"""Classes; with more of them only the worst pairs are listed."""
_MOST_PAIRS = 20
_LETTER, _LONGEST, _MARGIN = 7.0, 22, 8
"""A letter's width in the map's units, how many of a label are shown, and the room around labels."""


def confusion(found: Facts) -> str:
    """The section; empty where there is no matrix.

    Args:
        found: `labels`, and `counts`: a row for each true label, in it how often it was taken for which.
    """
    labels, counts = _matrix(found)
    if not labels:
        return ""
    worst = _pairs(labels, counts)
    if len(labels) > MOST_DRAWN:
        return section("What it takes for what", headed(f"The worst of {len(labels)} classes", worst))
    return section(
        "What it takes for what",
        _heat_map(labels, counts),
        details("The pairs it confuses most", worst),
        lead="A row is what is right, a column what the model said; the darker, the larger the share of the row.",
    )


def _matrix(found: Facts) -> tuple[list[str], list[list[int]]]:
    """Labels and counts; empty where they are no square matrix of counts."""
    labels, counts = found.get("labels"), found.get("counts")
    if not isinstance(labels, Sequence) or not isinstance(counts, Sequence) or len(counts) != len(labels):
        return [], []
    if any(not isinstance(row, Sequence) or len(row) != len(labels) for row in counts):
        return [], []
    return [str(label) for label in labels], [[int(count) for count in row] for row in counts]


def _pairs(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    found = sorted(
        (
            (-count, labels[true], labels[said], count / max(1, sum(row)))
            for true, row in enumerate(counts)
            for said, count in enumerate(row)
            if said != true and count
        ),
    )[:_MOST_PAIRS]
    rows = [[true, said, f"{-count:,}", format_percent(share)] for count, true, said, share in found]
    return table(["right", "said", "rows", "of that label"], rows, numeric=[2, 3])


def _heat_map(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The matrix drawn; texts beside and above it, a cell's numbers under the pointer."""
    cell = 40 if len(labels) <= 10 else 28 if len(labels) <= 20 else 20
    names = [_short(label) for label in labels]
    room = max(map(cell_width, names)) * _LETTER + 2 * _MARGIN
    size = room + cell * len(labels)
    body = [
        *(_side(name, number, room, cell) for number, name in enumerate(names)),
        *(_top(name, number, room, cell) for number, name in enumerate(names)),
        *(
            _cell(labels, counts, true, said, room, cell)
            for true, row in enumerate(counts)
            for said, count in enumerate(row)
            if count
        ),
        f'<rect class="grid" x="{room:.1f}" y="{room:.1f}" width="{size - room:.1f}" height="{size - room:.1f}"/>',
    ]
    right = sum(row[number] for number, row in enumerate(counts))
    told = f"{right:,} of {sum(map(sum, counts)):,} rows on the diagonal"
    return (
        f'<div class="scroll"><svg class="heat" width="{size:.0f}" height="{size:.0f}" '
        f'viewBox="0 0 {size:.1f} {size:.1f}" role="img" aria-label="{escape(told)}">{"".join(body)}</svg></div>'
    )


def _cell(
    labels: Sequence[str], counts: Sequence[Sequence[int]], true: int, said: int, room: float, cell: int
) -> str:
    count = counts[true][said]
    share = count / max(1, sum(counts[true]))
    x, y = room + said * cell, room + true * cell
    tip = f"{labels[true]} taken for {labels[said]}: {count:,} ({format_percent(share)})"
    tone = "right" if true == said else "wrong"
    fits = cell_width(f"{count:,}") * _LETTER < cell
    middle = f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}"'
    over = " over" if share > 0.55 else ""
    text = f'<text class="count{over}" {middle}>{count:,}</text>' if fits else ""
    return (
        f'<g><title>{escape(tip)}</title><rect class="{tone}" x="{x:.1f}" y="{y:.1f}" width="{cell}" '
        f'height="{cell}" fill-opacity="{0.06 + 0.94 * share:.3f}"/>{text}</g>'
    )


def _side(name: str, number: int, room: float, cell: int) -> str:
    y = room + number * cell + cell / 2 + 4
    return f'<text class="side" x="{room - _MARGIN:.1f}" y="{y:.1f}">{escape(name)}</text>'


def _top(name: str, number: int, room: float, cell: int) -> str:
    x, y = room + number * cell + cell / 2 + 4, room - _MARGIN
    return f'<text class="top" transform="translate({x:.1f} {y:.1f}) rotate(-90)">{escape(name)}</text>'


def _short(label: str) -> str:
    text = visible(label).replace("\n", " ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
