"""Several runs side by side: `report.json` with every number, `report.html` with a table and their curves together."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkit.durable import write_file, write_json
from llmkit.report.environment import mask_command
from llmkit.report.formatting import (
    format_count,
    format_duration,
    format_number,
    format_rate,
    jsonable,
)
from llmkit.report.html import document
from llmkit.report.page import Facts, section, table
from llmkit.report.svg import Point, Reference, Series, chart, escape

SCHEMA = 1
_COLORS = 6

COLUMNS: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("num_parameters", "parameters", format_count),
    ("loss", "loss", format_number),
    ("perplexity", "perplexity", format_number),
    ("bits_per_byte", "bits per byte", format_number),
    ("tokens_per_s", "speed", format_rate),
    ("seconds", "time", format_duration),
)
"""A row's numbers: key, heading, form."""


def write_comparison(
    folder: Path, reports: Mapping[str, Facts], *, command: str = "", ranked: bool = True
) -> dict[str, Any]:
    """Write `report.json` and `report.html` of several runs into `folder`.

    Args:
        folder: The folder that holds the runs' own.
        reports: What `report.json` of each run holds, by the run's name.
        command: What was typed.
        ranked: The best comes first; False where the losses mean different things, as those of different objectives.

    Returns:
        What report.json holds.
    """
    metric = common_metric(list(reports.values()))
    rows = [row_of(name, report) for name, report in reports.items()]
    rows = in_order(rows) if ranked else rows
    made = jsonable(
        {
            "schema": SCHEMA,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "name": folder.absolute().name,
            "kind": "comparison",
            "command": " ".join(mask_command(command.split(" "))),
            "metric": metric,
            "ranked": ranked,
            "references": next(iter(reports.values()))["references"] if metric == "eval/loss" else {},
            "variants": rows,
            "curves": {row["variant"]: _curve(reports[row["variant"]], metric) for row in rows},
        }
    )
    write_json(folder / "report.json", made)
    write_file(folder / "report.html", render(made).encode("utf-8", "replace"))
    return made


def row_of(name: str, report: Facts) -> dict[str, Any]:
    """A run's line in the table; what it did not measure is None."""
    final, top = report.get("final") or {}, report["headline"]
    size = (report.get("model") or {}).get("num_parameters") or report["plan"].get("num_parameters")
    return {
        "variant": name,
        "status": report["status"],
        "num_parameters": size,
        **{key: final.get(f"eval/{key}") for key in ("loss", "perplexity", "bits_per_byte")},
        "tokens_per_s": top.get("tokens_per_s"),
        "seconds": top.get("seconds"),
        "num_tokens": top.get("num_tokens"),
    }


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best first: by bits per byte where every row has them, else by the loss; what has none comes last."""
    key = "bits_per_byte" if all(row["bits_per_byte"] is not None for row in rows) else "loss"
    return sorted(rows, key=lambda row: (row[key] is None, row[key] or 0.0))


def common_metric(reports: Sequence[Facts]) -> str:
    """What can be drawn in one chart: the loss where all runs read the same tokens, else bits per byte."""
    alike = all(report["references"] == reports[0]["references"] for report in reports)
    in_bits = all("eval/bits_per_byte" in (report.get("final") or {}) for report in reports)
    return "eval/loss" if alike or not in_bits else "eval/bits_per_byte"


def as_table(rows: Sequence[Facts]) -> list[tuple[str, ...]]:
    """The rows as text under a line of headings, without the columns that no row has."""
    used = [column for column in COLUMNS if any(row[column[0]] is not None for row in rows)]
    lines = [
        (
            str(row["variant"]),
            *("-" if row[key] is None else form(row[key]) for key, _, form in used),
        )
        for row in rows
    ]
    return [("variant", *(heading for _, heading, _ in used)), *lines]


def _curve(report: Facts, metric: str) -> list[Point]:
    """(tokens seen, value) of each evaluation; the one of all held-out rows comes last."""
    per_step = report["plan"].get("tokens_per_step") or 1
    return [
        (float(record.get("step") or 0) * per_step, record[metric])
        for record in report["metrics"]
        if metric in record
    ]


def render(comparison: Facts) -> str:
    """The page of a comparison as `write_comparison` makes it."""
    title = f"{comparison['name']} · comparison"
    head, *lines = as_table(comparison["variants"])
    day = str(comparison["made"])[:16].replace("T", " ")
    best = f"the best first: {comparison['variants'][0]['variant']}"
    order = best if comparison["ranked"] else "of different objectives, whose losses do not compare"
    return document(
        title,
        f'<header><p class="eyebrow">llmkit comparison {escape(day)} UTC</p><h1>{escape(comparison["name"])}</h1>'
        f'<p class="lead">{len(lines)} runs, {escape(order)}.</p></header>',
        section(
            "Side by side",
            table(head, lines, numeric=range(1, len(head))),
            lead="Measured on all held-out text. Bits per byte can be compared whatever the tokenizer; loss and "
            "perplexity are per token.",
        ),
        section("How they learned", _chart(comparison)),
        section("The command", f"<pre><code>{escape(comparison['command'])}</code></pre>")
        if comparison["command"]
        else "",
    )


def _chart(comparison: Facts) -> str:
    """The runs' curves; one that was measured only once is a line across."""
    curves: Mapping[str, Sequence[Point]] = comparison["curves"]
    several = {name: points for name, points in curves.items() if len(points) > 1}
    lines = [
        Series(name, points, "dots", number % _COLORS + 1)
        for number, (name, points) in enumerate(several.items())
    ]
    once = [
        Reference(name, points[-1][1])
        for name, points in curves.items()
        if len(points) == 1 and points[-1][1] is not None
    ]
    known = [Reference(name, value) for name, value in comparison["references"].items() if value is not None]
    unit = "nats per token" if comparison["metric"] == "eval/loss" else "bits per byte"
    return chart(
        f"Held-out loss by tokens seen, {unit}", lines, references=[*once, *known], x_name="tokens", tall=True
    )
