"""Charts as inline SVG: no script, no library, sharp at any width, readable in print.

The drawing stretches with the page (`preserveAspectRatio="none"`, strokes keep their width); the labels are
HTML placed over it in per cent, so that text keeps its size on a phone. Colours come from the page's style.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from itertools import accumulate, pairwise
from typing import Literal

from llmkit.report.formatting import format_count, format_number, visible

Point = tuple[float, float | None]
Kind = Literal["line", "faint", "area", "dots"]
_SIZE = 1000.0  # the drawing's inner units, both ways
_MAX_POINTS = 600
_MAX_HITS = 120


def escape(value: object) -> str:
    """Any text, safe in HTML and its attributes; control and direction characters are written out."""
    return escape_html(visible(str(value)), quote=True)


@dataclass(frozen=True)
class Series:
    """A line of a chart. Points are (x, y) sorted by x; a y that is None or not finite leaves a gap.

    Attributes:
        kind: `line`, `faint` (thin and pale, for raw values), `area` (filled down to the axis) or `dots`.
        color: Which of the page's chart colours.
        hover: Whether its values are named under the pointer.
    """

    name: str
    points: Sequence[Point]
    kind: Kind = "line"
    color: int = 1
    hover: bool = True

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare with, such as the loss of guessing at random."""

    label: str
    value: float


@dataclass(frozen=True)
class _Frame:
    """The values at the drawing's edges."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return (value - self.left) / (self.right - self.left) * _SIZE

    def y(self, value: float) -> float:
        return (self.top - value) / (self.top - self.bottom) * _SIZE


def chart(
    title: str,
    series: Sequence[Series],
    *,
    references: Sequence[Reference] = (),
    format_y: Callable[[float], str] = format_number,
    x_name: str = "step",
    from_zero: bool = False,
    tall: bool = False,
) -> str:
    """A figure with axes, a legend where there is more than one line, and values under the pointer.

    Returns an empty text when no point is finite.
    """
    drawn = [s for s in series if s.finite()]
    if not drawn:
        return ""
    references = [r for r in references if math.isfinite(r.value)]
    frame = _frame(drawn, references, from_zero=from_zero)
    y_ticks = ticks(frame.bottom, frame.top, 5 if tall else 4)
    x_ticks = ticks(frame.left, frame.right, 6 if tall else 4)
    body = [
        *(_across("grid", frame.y(value)) for value in y_ticks),
        *(_across("ref", frame.y(reference.value)) for reference in references),
        *(_draw(s, frame) for s in drawn),
        *_hits(drawn, frame, format_y, x_name),
    ]
    labels = [
        *(_label("y", "top", frame.y(v), _tick(v, y_ticks, format_y)) for v in y_ticks),
        *(_label("x", "left", frame.x(v), format_count(v)) for v in x_ticks),
        *(_label("reflabel", "top", frame.y(r.value), f"{r.label} {format_y(r.value)}") for r in references),
    ]
    caption = f"<figcaption><b>{escape(title)}</b>{_legend(drawn)}</figcaption>"
    svg = (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(_spoken(title, drawn, format_y))}">{"".join(body)}</svg>'
    )
    size = "chart tall" if tall else "chart"
    return f'<figure class="{size}">{caption}<div class="plot">{svg}{"".join(labels)}</div></figure>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / max(count, 1)
    if not math.isfinite(rough) or rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over the points around each one, about a fiftieth of all; centred, so that it does not lag."""
    reach = len(points) // 100
    values = [y if y is not None and math.isfinite(y) else None for _, y in points]
    sums = [0.0, *accumulate(v or 0.0 for v in values)]
    counts = [0, *accumulate(int(v is not None) for v in values)]
    out: list[Point] = []
    for i, (x, _) in enumerate(points):
        # The window shrinks evenly at both ends, else the steep start would pull its first points down.
        near = min(reach, i, len(points) - 1 - i)
        low, high = i - near, i + near + 1
        count = counts[high] - counts[low]
        out.append((x, (sums[high] - sums[low]) / count if count and values[i] is not None else None))
    return out


def thin(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points: each stretch keeps its least and greatest, so spikes stay visible."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(2 * len(points) / limit)
    out: list[Point] = []
    for start in range(0, len(points), stretch):
        part = [p for p in points[start : start + stretch] if p[1] is not None and math.isfinite(p[1])]
        if not part:
            out.append((points[start][0], None))
            continue
        extremes = {min(part, key=lambda p: p[1] or 0.0), max(part, key=lambda p: p[1] or 0.0)}
        out += sorted(extremes, key=lambda p: p[0])
    return out


def stacked_bar(parts: Sequence[tuple[str, float]], format_value: Callable[[float], str]) -> str:
    """One horizontal bar cut into shares, with a key below it; parts that are not positive are left out."""
    shown = [(name, value) for name, value in parts if math.isfinite(value) and value > 0]
    total = sum(value for _, value in shown)
    if not shown:
        return ""
    cells = "".join(
        f'<span class="c{i % 6 + 1}" style="flex:{value / total:.4f} 0 0" '
        f'title="{escape(name)} {escape(format_value(value))}"></span>'
        for i, (name, value) in enumerate(shown)
    )
    keys = "".join(
        f'<li><i class="c{i % 6 + 1}"></i>{escape(name)} <b>{escape(format_value(value))}</b></li>'
        for i, (name, value) in enumerate(shown)
    )
    return f'<div class="stack">{cells}</div><ul class="key">{keys}</ul>'


def bar(shares: Sequence[tuple[str, float]]) -> str:
    """One horizontal bar for a row of a table that holds the numbers as text; screen readers pass over it.

    Args:
        shares: Stretches from the left, each a style of the page (`f1`, `lost`) and its share of the whole
            width, 0..1; what goes beyond the whole is cut off.
    """
    left, drawn = 0.0, []
    for style, share in shares:
        width = min(max(share, 0.0), 1.0 - left) if math.isfinite(share) else 0.0
        if width > 0:
            drawn.append(
                f'<rect class="{style}" x="{left * _SIZE:.1f}" y="0" width="{width * _SIZE:.1f}" height="10"/>'
            )
        left += width
    frame = 'class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {frame}>{''.join(drawn)}</svg>"


def _frame(series: Sequence[Series], references: Sequence[Reference], *, from_zero: bool) -> _Frame:
    xs = [x for s in series for x, _ in s.finite()]
    ys = [y for s in series for _, y in s.finite()] + [r.value for r in references]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = min(0.0, low) if from_zero else low - room
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return _Frame(min(xs), right, bottom, high + room)


def _draw(series: Series, frame: _Frame) -> str:
    if series.kind == "dots" or len(series.finite()) == 1:
        dots = "".join(f"M{frame.x(x):.1f} {frame.y(y):.1f}h0" for x, y in series.finite())
        line = _path(series.points, frame) if len(series.finite()) > 1 else ""
        return (
            f'<path class="line s{series.color}" d="{line}"/>' if line else ""
        ) + f'<path class="dots s{series.color}" d="{dots}"/>'
    line = _path(thin(series.points), frame)
    kind = "faint" if series.kind == "faint" else "line"
    drawn = f'<path class="{kind} s{series.color}" d="{line}"/>'
    if series.kind == "area":
        return f'<path class="area f{series.color}" d="{_filled(series, frame)}"/>' + drawn
    return drawn


def _path(points: Sequence[Point], frame: _Frame) -> str:
    return "".join(
        "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in part) for part in _unbroken(points)
    )


def _filled(series: Series, frame: _Frame) -> str:
    floor = frame.y(max(frame.bottom, 0.0) if frame.top > 0 else frame.bottom)
    return "".join(
        f"M{frame.x(part[0][0]):.1f} {floor:.1f}"
        + "".join(f"L{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in part)
        + f"L{frame.x(part[-1][0]):.1f} {floor:.1f}Z"
        for part in _unbroken(thin(series.points))
    )


def _unbroken(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    """The stretches between gaps."""
    part: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None and math.isfinite(y) and math.isfinite(x):
            part.append((x, y))
        elif part:
            yield part
            part = []
    if part:
        yield part


def _hits(
    series: Sequence[Series], frame: _Frame, format_y: Callable[[float], str], x_name: str
) -> Iterator[str]:
    """Invisible upright bands; the one under the pointer shows a guide line and the values there."""
    named = [s for s in series if s.hover]
    xs = sorted({x for s in named for x, _ in s.finite()})
    if len(xs) > _MAX_HITS:
        xs = xs[:: math.ceil(len(xs) / _MAX_HITS)]
    edges = [frame.left, *((a + b) / 2 for a, b in pairwise(xs)), frame.right]
    for x, start, end in zip(xs, edges, edges[1:], strict=False):
        words = [f"{x_name} {format_number(x, 9)}"]
        for one in named:
            value = _nearest(one.finite(), x, reach=max(end - start, 1e-9))
            words += [] if value is None else [f"{one.name}: {format_y(value)}"]
        left, width = frame.x(start), max(frame.x(end) - frame.x(start), 1)
        yield (
            f'<g class="hit"><title>{escape(chr(10).join(words))}</title>'
            f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="1000"/>'
            f'<line x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="0" y2="1000"/></g>'
        )


def _nearest(points: Sequence[tuple[float, float]], x: float, reach: float) -> float | None:
    index = bisect_left(points, (x, -math.inf))
    near = min(points[max(index - 1, 0) : index + 1], key=lambda p: abs(p[0] - x), default=None)
    return near[1] if near is not None and abs(near[0] - x) <= reach else None


def _legend(series: Sequence[Series]) -> str:
    named = [s for s in series if s.hover]
    if len(named) < 2:
        return ""
    items = "".join(f'<li><i class="c{s.color}"></i>{escape(s.name)}</li>' for s in named)
    return f'<ul class="key">{items}</ul>'


def _spoken(title: str, series: Sequence[Series], format_y: Callable[[float], str]) -> str:
    """What a screen reader says in place of the picture."""
    parts = [
        f"{s.name} from {format_y(s.finite()[0][1])} to {format_y(s.finite()[-1][1])}"
        for s in series
        if s.hover
    ]
    return f"{title}: {'; '.join(parts)}"


def _across(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="0" x2="1000" y1="{y:.1f}" y2="{y:.1f}"/>'


def _label(kind: str, side: str, units: float, text: str) -> str:
    """A text over the drawing, `units` from its `side`."""
    return f'<span class="{kind}" style="{side}:{units / _SIZE * 100:.2f}%">{escape(text)}</span>'


def _tick(value: float, all_ticks: Sequence[float], format_y: Callable[[float], str]) -> str:
    # -1e-17 for a tick at 0 would be written in full.
    step = abs(all_ticks[1] - all_ticks[0]) if len(all_ticks) > 1 else 1.0
    return "0" if abs(value) < step * 1e-6 else format_y(value)
