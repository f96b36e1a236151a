"""The page's sections on an evaluation: figures with their intervals, comparisons, gates, tables, errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.registry import lower_is_better
from llmkit.report.confusion import confusion
from llmkit.report.evaluation_tables import (
    by_part,
    calibration,
    change,
    classes,
    errors,
    figure,
    interval,
    is_number,
    noise,
    other_table,
    references,
    retrieved,
    rows_of,
    settings,
    shown,
    small_bar,
)
from llmkit.report.page import Facts, Html, details, inner, objects, section, table, words
from llmkit.report.svg import escape

_MOST_CARDS = 8
_KNOWN = (
    *("per_source", "per_length", "references", "classes", "confusion", "errors", "calibration"),
    *("noise", "tasks", "speed", "retrieved", "explained"),
)
"""The tables that have a form of their own here; any other is shown as it is."""


def is_evaluation(report: Facts) -> bool:
    """Whether the report says how far its figures can be trusted, as those of `llmkit eval` do."""
    return isinstance(report.get("figures"), Mapping) and bool(report["figures"])


def evaluation(report: Facts) -> str:
    """All sections of an evaluation in the order of the page; empty for other reports."""
    if not is_evaluation(report):
        return ""
    tables = inner(report, "tables")
    parts = (
        _gates(objects(report.get("gates"))),
        _comparison(objects(report.get("comparison"))),
        _figures(report),
        classes(objects(tables.get("classes"))),
        confusion(inner(tables, "confusion")),
        calibration(objects(tables.get("calibration"))),
        by_part(tables),
        references(report, inner(tables, "references")),
        noise(report, objects(tables.get("noise"))),
        rows_of("Tasks of lm-evaluation-harness", objects(tables.get("tasks"))),
        rows_of("Speed and size", objects(tables.get("speed"))),
        errors(objects(tables.get("errors"))),
        retrieved(objects(tables.get("retrieved"))),
        *(other_table(name, value) for name, value in tables.items() if name not in _KNOWN),
        settings(report),
    )
    return "".join(parts)


# --- the top


def sentence(report: Facts) -> str:
    """What was measured, in a sentence."""
    model, task = str(inner(report, "model").get("folder") or ""), str(report.get("task") or "")
    held_out = inner(report, "settings").get("held_out")
    on = " on what its run held out" if held_out else ""
    return f"{model or 'A model'}, measured{f' as {task}' if task else ''}{on}."


def warnings(report: Facts) -> str:
    """What a person should know before believing the figures."""
    said = report.get("warnings")
    lines = said if isinstance(said, Sequence) and not isinstance(said, str) else []
    return "".join(f'<p class="problem warned">{escape(line)}</p>' for line in lines)


def headline(report: Facts) -> str:
    """The first figures as cards, each with its interval."""
    cards = "".join(_card(name, inner(report, "figures", name)) for name in shown(report)[:_MOST_CARDS])
    return f'<section class="cards">{cards}</section>' if cards else ""


def _card(name: str, found: Facts) -> str:
    ends = interval(found)
    why = f"95%: {ends}" if ends else "lower is better" if lower_is_better(name) else ""
    return (
        f'<div class="card"><p class="what">{escape(words(name))}</p>'
        f'<p class="value">{escape(figure(name, found.get("value")))}</p><p class="why">{escape(why)}</p></div>'
    )


# --- what was asked of the figures


def _gates(gates: Sequence[Facts]) -> str:
    rows = [
        [
            words(str(gate.get("metric"))),
            figure(str(gate.get("metric")), gate.get("value")),
            str(gate.get("said") or gate.get("limit")),
            Html(
                f'<b class="{"good" if gate.get("held") else "bad"}">{"held" if gate.get("held") else "not held"}</b>'
            ),
        ]
        for gate in gates
    ]
    failed = sum(not gate.get("held") for gate in gates)
    lead = f"{failed} of {len(gates)} did not hold." if failed else "All of them held."
    return section("Gates", table(["figure", "value", "must be", ""], rows, numeric=[1]), lead=lead)


def _comparison(found: Sequence[Facts]) -> str:
    """Each figure beside the other model's, a table for each pair of models."""
    several: dict[tuple[str, str], list[Facts]] = {}
    for one in found:
        several.setdefault((str(one.get("subject", "")), str(one.get("baseline", ""))), []).append(one)
    parts = []
    for (subject, baseline), group in several.items():
        rows = [_pair(one) for one in group]
        head = ["figure", subject or "this", baseline or "the other", "difference", "95% interval", ""]
        parts.append(table(head, rows, numeric=range(1, 5)))
    return section(
        "Compared",
        *parts,
        lead="Differences of the same rows, drawn again a thousand times: p is how often chance alone makes one of "
        "this size.",
    )


def _pair(one: Facts) -> list[str]:
    name = str(one.get("metric"))
    found = one.get("difference")
    return [
        words(name),
        figure(name, one.get("value")),
        figure(name, one.get("other")),
        change(name, float(found)) if is_number(found) else "–",
        interval(one) or "–",
        _verdict(one),
    ]


def _verdict(one: Facts) -> Html:
    said = verdict(one)
    tone = {"better": "good", "worse": "bad"}.get(said.partition(",")[0], "")
    return Html(f'<b class="{tone}">{escape(said)}</b>' if tone else escape(said))


def verdict(one: Facts) -> str:
    """A difference in words: `better, p = 0.003`; `no difference seen, p = 0.4`."""
    told, p = str(one.get("verdict") or ""), one.get("p")
    if not told and is_number(p) and is_number(one.get("difference")):
        is_less = float(one["difference"]) < 0
        better = is_less == lower_is_better(str(one.get("metric")))
        told = "no difference seen" if p >= 0.05 else "better" if better else "worse"
    parts = [told or "not paired", *([_p("p", p)] if is_number(p) else [])]
    if is_number(one.get("mcnemar")):
        parts.append(_p("McNemar's p", one["mcnemar"]))
    return ", ".join(parts)


def _p(name: str, p: Any) -> str:
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.2g}"


def _figures(report: Facts) -> str:
    """Every figure; those between 0 and 1 also as bars, the interval in another tone."""
    metrics, rows = inner(report, "figures"), []
    for name in shown(report):
        found = inner(metrics, name)
        drawn = "" if lower_is_better(name) else _drawn(found)
        rows.append([words(name), figure(name, found.get("value")), interval(found) or "–", drawn])
    head = ["figure", "value", "95% interval", ""]
    return section(
        "All figures",
        details(f"{len(rows)} figures", table(head, rows, numeric=[1, 2]), opened=len(rows) <= 20),
    )


def _drawn(found: Facts) -> str:
    value, low, high = (found.get(key) for key in ("value", "low", "high"))
    if not is_number(value) or not 0 <= value <= 1:
        return ""
    low, high = (low, high) if is_number(low) and is_number(high) else (value, value)
    return small_bar([("f1", max(0.0, low)), ("unsure", high - low)])
