"""Runs side by side on one page: figures with the best marked, curves, settings that differ, tables of evaluations.

`comparison.py` does this for the variants of one recipe, which were all trained the same way; here any runs go, of any
stages, and what only some of them have is left open for the others.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkit.durable import write_file, write_json
from llmkit.errors import UsageError
from llmkit.registry import FIGURES, lower_is_better
from llmkit.report.environment import mask_command, mask_text
from llmkit.report.evaluation_tables import interval
from llmkit.report.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_value,
    jsonable,
)
from llmkit.report.html import document
from llmkit.report.page import Facts, Html, details, headed, inner, objects, section, table, words
from llmkit.report.svg import Point, Series, chart, escape, smooth

SCHEMA = 1
_KIND = "side by side"
_COLORS = 6
_MOST_CURVES = 6
_MOST_DOTS = 60
_CURVES = ("eval/loss", "eval/bits_per_byte", "train/loss", "eval/accuracy", "eval/f1")
_CLASSES = 30


def write_side_by_side(
    page: Path, runs: Sequence[Facts], settings: Sequence[Facts], *, command: str = ""
) -> dict[str, Any]:
    """Write a page and, beside it under the same name, every number of it as JSON.

    Args:
        page: The page, `*.html`.
        runs: Each with `name`, `status`, `num_parameters`, `model_bytes`, `seconds`, and `stages`: a list of `name`,
            `figures` (by name, without `eval/`), `intervals` and `report` (what its report.json holds).
        settings: In which settings they differ: each with `key` and `values`, one for each run.
        command: What was typed.

    Returns:
        What the JSON holds.

    Raises:
        UsageError: The JSON file would take the place of another one; nothing was written.
    """
    check_page(page)
    made = jsonable(
        {
            "schema": SCHEMA,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": _KIND,
            "command": " ".join(mask_command(command.split(" "))),
            "runs": [{**run, "stages": list(map(_without_report, run["stages"]))} for run in runs],
            "figures": figures(runs),
            "settings": [{**one, "values": [_masked(value) for value in one["values"]]} for one in settings],
            "curves": {key: found for key in _CURVES if (found := _curves(runs, key))},
        }
    )
    write_json(page.with_suffix(".json"), made)
    write_file(page, render(made, runs).encode("utf-8", "replace"))
    return made


def check_page(page: Path) -> None:
    """Refuse a page whose JSON file would take the place of one that is something else, such as a run's own report.

    Raises:
        UsageError: It would.
    """
    numbers = page.with_suffix(".json")
    if numbers.exists() and not _is_ours(numbers):
        raise UsageError(
            f"{page}: its numbers go to {numbers}, and that file is no report of runs side by side",
            hint=f"give the page another name: -o {page.with_stem(f'{page.stem}-side-by-side')}",
        )


def _is_ours(numbers: Path) -> bool:
    try:
        found = json.loads(numbers.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, Mapping) and found.get("kind") == _KIND


def _without_report(stage: Facts) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != "report"}


def _masked(value: Any) -> Any:
    return mask_text(value) if isinstance(value, str) else value


def figures(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """Every figure of every stage: its value and interval in each run, and which runs have the best of it.

    None is the best where the direction of a figure is unknown, where only one run has it, or all have the same; nor
    of losses per token where the runs were measured on different tokens.
    """
    found = []
    for stage in dict.fromkeys(stage["name"] for run in runs for stage in run["stages"]):
        own: list[Facts] = [next((one for one in run["stages"] if one["name"] == stage), {}) for run in runs]
        for name in dict.fromkeys(name for one in own for name in one.get("figures", ())):
            if not name.startswith("num_"):
                values = [one.get("figures", {}).get(name) for one in own]
                ends = [one.get("intervals", {}).get(name) for one in own]
                best = _best(name, values) if _compares(name, own) else []
                found.append(
                    {"stage": stage, "name": name, "values": values, "intervals": ends, "best": best}
                )
    return found


def _best(name: str, values: Sequence[float | None]) -> list[int]:
    known = [value for value in values if value is not None]
    if name not in FIGURES or len(known) < 2 or min(known) == max(known):
        return []
    wanted = min(known) if lower_is_better(name) else max(known)
    return [number for number, value in enumerate(values) if value == wanted]


def _compares(name: str, stages: Sequence[Facts]) -> bool:
    """Whether a figure means the same in all of these stages."""
    reports = [stage["report"] for stage in stages if name in stage.get("figures", ())]
    if len({str(report.get("task")) for report in reports}) > 1:
        return False
    if len({str(report.get("data_address")) for report in reports}) > 1:
        return False
    per_token = name in ("loss", "perplexity")
    return not per_token or all(
        inner(report, "references") == inner(reports[0], "references") for report in reports
    )


def _curves(runs: Sequence[Facts], key: str) -> dict[str, list[Point]]:
    """(step, value) of each run that recorded `key` more than once."""
    found = {}
    for run in runs:
        for stage in run["stages"]:
            records = objects(stage["report"].get("metrics"))
            points: list[Point] = [(float(r.get("step") or 0), r[key]) for r in records if key in r]
            if len(points) > 1:
                several = sum(bool(objects(one["report"].get("metrics"))) for one in run["stages"]) > 1
                found[f"{run['name']} {stage['name']}" if several else str(run["name"])] = points
    return found


def render(made: Facts, runs: Sequence[Facts]) -> str:
    """The page of what `write_side_by_side` makes, with the tables of the runs' own reports."""
    names = [str(run["name"]) for run in runs]
    day = str(made["made"])[:16].replace("T", " ")
    return document(
        f"{' · '.join(names)}",
        f'<header><p class="eyebrow">llmkit report {escape(day)} UTC</p><h1>{escape(", ".join(names))}</h1>'
        f'<p class="lead">{len(names)} runs side by side.</p></header>',
        _overview(runs),
        _figures(made["figures"], names),
        section("How they learned", *(_chart(key, lines) for key, lines in made["curves"].items())),
        section(
            "Settings that differ",
            table(["setting", *names], [_setting(one) for one in made["settings"]]),
            lead="As the runs ran, defaults included.",
        ),
        _classes(runs),
        _errors(runs),
        section("The command", f"<pre><code>{escape(made['command'])}</code></pre>")
        if made["command"]
        else "",
    )


def _overview(runs: Sequence[Facts]) -> str:
    head = ["run", "status", "parameters", "model", "time", "did"]
    rows = [
        [
            str(run["name"]),
            str(run["status"]),
            *(
                "–" if run.get(key) is None else form(run[key])
                for key, form in (
                    ("num_parameters", format_count),
                    ("model_bytes", format_bytes),
                    ("seconds", format_duration),
                )
            ),
            ", ".join(str(stage["name"]) for stage in run["stages"]),
        ]
        for run in runs
    ]
    return section("The runs", table(head, rows, numeric=[2, 3, 4]))


def _figures(found: Sequence[Facts], names: Sequence[str]) -> str:
    """A table for each stage, the best of each figure marked; intervals below their figures."""
    parts: list[str] = []
    alone: list[str] = []
    for stage in dict.fromkeys(str(one["stage"]) for one in found):
        own = [one for one in found if one["stage"] == stage]
        rows = [[words(one["name"]), *(_cell(one, number) for number in range(len(names)))] for one in own]
        drawn = table(["figure", *names], rows, numeric=range(1, len(names) + 1))
        able = [
            name for number, name in enumerate(names) if any(one["values"][number] is not None for one in own)
        ]
        if len(able) > 1:
            parts.append(headed(stage, drawn))
        else:
            alone.append(details(f"{stage}, of {able[0]} alone", drawn))
    return section(
        "Figures",
        *parts,
        *alone,
        lead="The best of each figure is marked, where it means the same in all runs.",
    )


def _cell(one: Facts, number: int) -> Html:
    value, ends = one["values"][number], one["intervals"][number]
    if value is None:
        return Html("–")
    shown = escape(format_value(one["name"], float(value)))
    mark = f'<b class="best">{shown}</b>' if number in one["best"] else shown
    said = interval({"low": ends[0], "high": ends[1]}) if ends else ""
    return Html(f'{mark}<br><span class="lead">{escape(said)}</span>' if said else mark)


def _chart(key: str, lines: Mapping[str, Sequence[Point]]) -> str:
    drawn = [
        Series(name, smooth(points), "line" if len(points) > _MOST_DOTS else "dots", number % _COLORS + 1)
        for number, (name, points) in enumerate(list(lines.items())[:_MOST_CURVES])
    ]
    where = "training" if key.startswith("train/") else "held-out"
    left = f" ({_MOST_CURVES} of {len(lines)} runs)" if len(lines) > _MOST_CURVES else ""
    return chart(f"{words(key)}, {where}, by step{left}".capitalize(), drawn, tall=True)


def _setting(one: Facts) -> list[str]:
    return [str(one["key"]), *("–" if value is None else str(value) for value in one["values"])]


def _tables(runs: Sequence[Facts], name: str) -> dict[str, list[Facts]]:
    """A table of each run's last evaluation that has it, by the run's name."""
    found = {}
    for run in runs:
        own = [rows for one in run["stages"] if (rows := objects(inner(one["report"], "tables").get(name)))]
        if own:
            found[str(run["name"])] = own[-1]
    return found


def _classes(runs: Sequence[Facts]) -> str:
    """F1 of each class in each run, those first that differ most."""
    found = _tables(runs, "classes")
    if len(found) < 2:
        return ""
    by = {name: {str(row.get("label")): row.get("f1") for row in rows} for name, rows in found.items()}
    labels = dict.fromkeys(label for rows in by.values() for label in rows)
    lines = []
    for label in labels:
        values = [by[name].get(label) for name in found]
        known = [float(value) for value in values if isinstance(value, int | float)]
        apart = max(known) - min(known) if len(known) > 1 else 0.0
        cells = ["–" if not isinstance(value, int | float) else format_number(value) for value in values]
        lines.append((-apart, [label, *cells]))
    rows = [cells for _, cells in sorted(lines, key=lambda line: (line[0], line[1][0]))]
    head = ["label", *found]
    return section(
        "F1, class by class",
        table(head, rows[:_CLASSES], numeric=range(1, len(head))),
        details(f"{len(rows) - _CLASSES} more", table(head, rows[_CLASSES:], numeric=range(1, len(head)))),
        lead="The classes first in which the runs differ most.",
    )


def _errors(runs: Sequence[Facts]) -> str:
    """How many of the errors a run is surest of the others make too."""
    found = {name: {str(row.get("place")) for row in rows} for name, rows in _tables(runs, "errors").items()}
    if len(found) < 2:
        return ""
    rows = [
        [name, f"{len(own)}", *(f"{len(own & other)}" for other in found.values())]
        for name, own in found.items()
    ]
    head = ["the errors told of", "", *(f"also told of {name}" for name in found)]
    return section(
        "The same errors",
        table(head, rows, numeric=range(1, len(head))),
        lead="Of the errors in each run's report (at most fifty), how many stand in the other's too.",
    )
