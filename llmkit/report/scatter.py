"""Points with names as inline SVG: what a thing costs against what it is worth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmkit.report.formatting import cell_width
from llmkit.report.svg import escape, ticks

_WIDTH, _HEIGHT = 930.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 20.0, 22.0, 44.0
_LETTER, _LINE = 6.6, 15.0


@dataclass(frozen=True)
class Dot:
    """A point with a name.

    Attributes:
        name: What it stands for.
        x: What it costs; less is better.
        y: What it is worth.
        color: Which of the page's chart colours.
        chosen: Whether there is a ring around it.
    """

    name: str
    x: float
    y: float
    color: int = 1
    chosen: bool = False


def scatter(
    title: str,
    dots: Sequence[Dot],
    *,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    lower: bool = False,
) -> str:
    """A figure with axes, every point named, and a line through those that no other point beats both ways.

    Args:
        title: What is drawn, as text.
        dots: The points; empty where there are fewer than two.
        format_x: How values along are written.
        format_y: How values upwards are written.
        lower: Whether a lower value upwards is the better one.
    """
    if len(dots) < 2:
        return ""
    left, right = _room([dot.x for dot in dots])
    bottom, top = _room([dot.y for dot in dots])

    def x_of(value: float) -> float:
        return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _TOP + (top - value) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    body = []
    heights = ticks(bottom, top, 5)
    for value, said in zip(heights, _apart(heights, format_y), strict=True):
        y = y_of(value)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(said)}</text>')
    for value in ticks(left, right, 6):
        x = x_of(value)
        body.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{escape(format_x(value))}</text>'
        )
    front = " ".join(f"{x_of(dot.x):.1f},{y_of(dot.y):.1f}" for dot in frontier(dots, lower=lower))
    body.append(f'<polyline class="front" points="{front}"/>')
    taken: list[tuple[float, float, float, float]] = []
    for dot in sorted(dots, key=lambda one: (not one.chosen, one.x)):
        body.append(_drawn(dot, x_of(dot.x), y_of(dot.y), format_x, format_y, taken))
    spoken = f"{title}: " + "; ".join(f"{d.name} {format_x(d.x)}, {format_y(d.y)}" for d in dots)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<div class="scroll"><svg class="scatter" width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" '
        f'viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(spoken)}">{"".join(body)}</svg></div>'
        "</figure>"
    )


def frontier(dots: Sequence[Dot], *, lower: bool) -> list[Dot]:
    """The points that no other beats both ways, from the cheapest on."""
    found: list[Dot] = []
    sign = -1.0 if lower else 1.0
    for dot in sorted(dots, key=lambda one: (one.x, -sign * one.y)):
        if not found or sign * dot.y > sign * found[-1].y:
            found.append(dot)
    return found


def _drawn(
    dot: Dot,
    x: float,
    y: float,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    taken: list[tuple[float, float, float, float]],
) -> str:
    """A point with its name where there is room for it; `taken` holds where names are already."""
    width = cell_width(dot.name) * _LETTER
    places = [
        (x + 14, y + 4),
        (x - 14 - width, y + 4),
        *((x - width / 2, y + side) for side in (-15, 23, -30, 38)),
    ]
    fitting = [
        (tx, ty)
        for tx, ty in places
        if tx >= _LEFT - 40
        and tx + width <= _WIDTH
        and 10 <= ty <= _HEIGHT - 30
        and _is_free(tx, ty, width, taken)
    ]
    tx, ty = (fitting or places)[0]
    taken.append((tx, ty, tx + width, ty + _LINE))
    ring = f'<circle class="ring s{dot.color}" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if dot.chosen else ""
    weight = ' class="named"' if dot.chosen else ""
    told = f"{dot.name}: {format_x(dot.x)}, {format_y(dot.y)}"
    return (
        f'<g><title>{escape(told)}</title>{ring}<circle class="f{dot.color}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text{weight} x="{tx:.1f}" y="{ty:.1f}">{escape(dot.name)}</text></g>'
    )


def _is_free(x: float, y: float, width: float, taken: Sequence[tuple[float, float, float, float]]) -> bool:
    return all(
        x + width < left or x > right or y + _LINE <= top or y >= bottom for left, top, right, bottom in taken
    )


def _apart(values: Sequence[float], form: Callable[[float], str]) -> list[str]:
    """Values as `form` writes them; with more digits where that makes two of them the same."""
    found = [form(value) for value in values]
    for digits in range(4, 12):
        if len(set(found)) == len(values):
            break
        found = [f"{value:.{digits}g}" for value in values]
    return found


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    return low - room, high + room
