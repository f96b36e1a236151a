"""What a sweep tried: `report.json` with every number, `report.html` with a table, curves, a chart of each setting."""

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkit.durable import write_file, write_json
from llmkit.report.environment import mask_command
from llmkit.report.formatting import format_duration, format_number, jsonable
from llmkit.report.html import document
from llmkit.report.page import Facts, section, table
from llmkit.report.svg import Point, Series, chart, escape

SCHEMA = 1
_COLORS = 6
_MOST_CURVES = 6


def write_trials(
    folder: Path,
    trials: Sequence[Facts],
    reports: Mapping[int, Facts],
    *,
    metric: str,
    log_axes: Collection[str] = (),
    command: str = "",
) -> list[dict[str, Any]]:
    """Write `report.json` and `report.html` of a sweep into `folder`.

    Args:
        folder: The sweep's.
        trials: The best first; each has `number`, `name`, `params`, `state`, `value`, `curve`, `error`.
        reports: What `report.json` of each run holds, by the trial's number; empty where there is none.
        metric: What they were compared by.
        log_axes: Settings that are searched in the logarithm.
        command: What was typed.

    Returns:
        The rows of the table, as report.json holds them.
    """
    rows = [_row(trial, reports.get(trial["number"], {})) for trial in trials]
    made = jsonable(
        {
            "schema": SCHEMA,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "name": folder.absolute().parent.name,
            "kind": "sweep",
            "command": " ".join(mask_command(command.split(" "))),
            "metric": metric,
            "log_axes": list(log_axes),
            "trials": rows,
        }
    )
    write_json(folder / "report.json", made)
    write_file(folder / "report.html", render(made).encode("utf-8", "replace"))
    return rows


def _row(trial: Facts, report: Facts) -> dict[str, Any]:
    return {
        **{key: trial[key] for key in ("number", "name", "params", "state", "value", "curve", "error")},
        "seconds": (report.get("headline") or {}).get("seconds"),
        "num_trained": (report.get("model") or {}).get("num_trained"),
    }


def as_table(rows: Sequence[Facts], metric: str) -> list[tuple[str, ...]]:
    """The trials as text under a line of headings, the best first."""
    keys = list(rows[0]["params"]) if rows else []
    names = [key.rpartition(".")[2] for key in keys]
    short = names if len(set(names)) == len(names) else keys
    lines = [
        (
            row["name"],
            _outcome(row),
            *(_value(row["params"][key]) for key in keys),
            "-" if row["seconds"] is None else format_duration(row["seconds"]),
        )
        for row in rows
    ]
    return [("trial", metric, *short, "time"), *lines]


def _outcome(row: Facts) -> str:
    figure = "" if row["value"] is None else format_number(row["value"])
    return {"done": figure, "pruned": f"{figure} (given up)", "failed": "failed"}.get(row["state"], "stopped")


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def render(sweep: Facts) -> str:
    """The page of a sweep as `write_trials` makes it."""
    rows, metric = sweep["trials"], sweep["metric"]
    head, *lines = as_table(rows, metric)
    day = str(sweep["made"])[:16].replace("T", " ")
    best = next((row for row in rows if row["state"] == "done"), None)
    lead = f"{len(rows)} trials"
    if best is not None:
        lead += f"; the best is {best['name']} with {metric} {format_number(best['value'])}"
    failed = [row for row in rows if row["state"] == "failed"]
    return document(
        f"{sweep['name']} · sweep",
        f'<header><p class="eyebrow">llmkit sweep {escape(day)} UTC</p><h1>{escape(sweep["name"])}</h1>'
        f'<p class="lead">{escape(lead)}.</p></header>',
        section("All trials, the best first", table(head, lines, numeric=range(1, len(head)))),
        section("By setting", *_by_setting(rows, metric, sweep["log_axes"])),
        section("How the best of them learned", _curves(rows, metric)),
        section("What failed", table(("trial", "what it said"), [(r["name"], r["error"]) for r in failed])),
        section("The command", f"<pre><code>{escape(sweep['command'])}</code></pre>")
        if sweep["command"]
        else "",
    )


def _by_setting(rows: Sequence[Facts], metric: str, log_axes: Collection[str]) -> list[str]:
    """A chart for each setting in numbers: its value, or the decimal logarithm, and the metric at the end."""
    done = [row for row in rows if row["state"] == "done"]
    charts = []
    for key in done[0]["params"] if done else ():
        values = [row["params"][key] for row in done]
        if not all(isinstance(value, int | float) for value in values):
            continue
        log = key in log_axes
        points: list[Point] = sorted(
            (math.log10(value) if log else float(value), row["value"])
            for value, row in zip(values, done, strict=True)
        )
        name = f"log10 of {key}" if log else key
        charts.append(chart(f"{metric} by {name}", [Series(metric, points, "dots")], x_name=name))
    return charts


def _curves(rows: Sequence[Facts], metric: str) -> str:
    several = [row for row in rows if len(row["curve"]) > 1][:_MOST_CURVES]
    lines = [
        Series(row["name"], [(float(step), value) for step, value in row["curve"]], "line", n % _COLORS + 1)
        for n, row in enumerate(several)
    ]
    return chart(f"{metric} by step", lines, tall=True)
