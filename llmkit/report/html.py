"""`report.html`: one page without network, scripts or fonts of its own; every text in it is escaped."""

from collections.abc import Callable, Sequence
from pathlib import Path

from llmkit.registry import TASKS
from llmkit.report import compression, evaluation, html_text, html_tokenizer
from llmkit.report.explained import explained
from llmkit.report.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_rate,
    format_value,
)
from llmkit.report.page import Card, Facts, details, objects, pairs, records, section, table, words
from llmkit.report.spikes import Spike
from llmkit.report.svg import Kind, Reference, Series, chart, escape, smooth, stacked_bar

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(report: Facts) -> str:
    """The page for a report as `report.collect` makes it; what the report lacks is left out."""
    judged = evaluation.evaluation(report)
    made = compression.compression(report)
    title = f"{report['name']} · {report['kind']}"
    top = evaluation if judged else compression if made else None
    parts = (
        _header(report, top.sentence(report) if top else _sentence(report)),
        top.headline(report) if top else _headline(report),
        judged,
        made,
        html_text.preparation(report),
        html_text.dropped(report.get("dropped_examples")),
        html_text.skipped(report),
        _learning(report),
        _samples(report["samples"]),
        explained(report),
        _speed(report),
        _data(report["data"]),
        html_tokenizer.tokenizer(report),
        _plan(report["plan"]),
        _recipe(report["recipe"]),
        _environment(report["environment"]),
        _command(report),
    )
    return document(title, *parts)


def document(title: str, *parts: str) -> str:
    """A whole page of its own.

    Args:
        title: Its title, as text.
        parts: Markup, in order.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


# --- the top of the page


def _header(report: Facts, lead: str) -> str:
    status = str(report["status"])
    tone = {"done": "good", "failed": "bad"}.get(status, "wait")
    problems = [*([report["error"]] if report.get("error") else []), *report["damaged"]]
    boxes = "".join(f'<p class="problem">{escape(problem)}</p>' for problem in problems)
    boxes += evaluation.warnings(report)
    day = str(report["made"])[:16].replace("T", " ")
    return (
        f'<header><p class="eyebrow">llmkit {escape(report["kind"])} '
        f'<span class="pill {tone}">{escape(status)}</span> {escape(day)} UTC</p>'
        f'<h1>{escape(report["name"])}</h1><p class="lead">{escape(lead)}</p>{boxes}</header>'
    )


def _sentence(report: Facts) -> str:
    """The whole run in a sentence, of what is known."""
    top, plan, environment = report["headline"], report["plan"], report["environment"]
    size = plan.get("num_parameters")
    learnt = top.get("num_tokens")
    where = plan.get("device_name") or environment.get("device_name") or environment.get("processor")
    if size and learnt:
        said = f"A model of {format_count(size)} parameters learned from {format_count(learnt)} tokens"
    elif top.get("data_documents"):
        said = f"{top['data_documents']:,} documents"
        said += f", {format_bytes(top['data_bytes'])} of text" if top.get("data_bytes") else ""
        said += f", became {format_count(top['data_tokens'])} tokens" if top.get("data_tokens") else ""
    else:
        return f"On {where}." if where else ""
    took = f" in {format_duration(top['seconds'])}" if top.get("seconds") else ""
    return said + took + (f" on {where}." if where else ".")


def _headline(report: Facts) -> str:
    top = report["headline"]
    first, planned = top.get("eval_loss_first"), (report["plan"].get("memory") or {}).get("total")
    cards: list[Card] = [
        ("eval_loss", "held-out loss", format_number,
         f"nats each, at first {format_number(first)}" if first else "nats each"),
        ("perplexity", "perplexity", format_number, "like a pick among so many"),
        ("bits_per_byte", "bits per byte", format_number, "8 would be no compression"),
        ("num_tokens", "tokens seen", format_count, f"{top.get('num_steps', 0):,} steps"),
        *(html_text.cards(report) if "num_tokens" not in top else ()),
        ("seconds", "time", format_duration, "of training" if "num_steps" in top else ""),
        ("tokens_per_s", "speed", format_rate, "median after the start"),
        ("mfu", "of peak arithmetic", format_percent, "model FLOPs utilisation"),
        ("peak_memory_bytes", "peak memory", format_bytes,
         f"planned {format_bytes(planned)}" if planned else ""),
    ]  # fmt: skip
    measured = {key: report["final"][f"eval/{key}"] for key in _task_metrics(report)}
    top = {**top, **measured}
    cards[1:1] = [(key, words(f"eval/{key}"), format_number, "of the held-out rows") for key in measured]
    shown = "".join(
        f'<div class="card"><p class="what">{escape(name)}</p><p class="value">{escape(form(top[key]))}</p>'
        f'<p class="why">{escape(why)}</p></div>'
        for key, name, form, why in cards
        if key in top
    )
    return f'<section class="cards">{shown}</section>' if shown else ""


def _task_metrics(report: Facts) -> list[str]:
    """Of a run that trained for a task, what its model is judged by, and what was measured of it."""
    goal, final = TASKS.get(str(report.get("task"))), report.get("final") or {}
    known = [name for name in (goal.metrics if goal else ()) if name not in ("loss", "perplexity")]
    return [name for name in known if isinstance(final.get(f"eval/{name}"), int | float)][:_MOST_METRICS]


# --- learning


def _series(metrics: Sequence[Facts], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of every record that has `key`; null values are gaps."""
    return [(float(r.get("step") or 0), r[key]) for r in metrics if key in r]


def _learning(report: Facts) -> str:
    metrics = report["metrics"]
    raw, held_out = _series(metrics, "train/loss"), _series(metrics, "eval/loss")
    lines = [
        Series("each step", raw, "faint", 1, hover=False),
        Series("training", smooth(raw), "line", 1),
        Series("held-out", held_out, "dots", 2),
    ]
    references = [
        Reference(label, value) for label, value in report["references"].items() if value is not None
    ]
    per = "target" if report.get("task") else "token"
    loss = chart(f"Loss by step, nats per {per}", lines, references=references, tall=True)
    judged = _task_metrics(report)
    shown = ["eval/loss", *(f"eval/{name}" for name in judged)] if judged else list(_EVAL)
    rows = [
        [
            f"{int(r.get('step') or 0):,}",
            *(format_value(k, r[k]) if r.get(k) is not None else "–" for k in shown),
        ]
        for r in metrics
        if "eval/loss" in r
    ]
    every = table(["step", *(words(k) for k in shown)], rows, numeric=range(len(shown) + 1))
    drawn = [
        Series(words(f"eval/{name}"), _series(metrics, f"eval/{name}"), "dots", number % 6 + 1)
        for number, name in enumerate(judged)
    ]
    metric = chart("Metrics of the held-out rows", drawn) if drawn else ""
    return section(
        "How it learned", loss, metric, _spikes(report), details(f"All {len(rows)} evaluations", every)
    )


def _spikes(report: Facts) -> str:
    """Where the loss jumped, a line each, or that it never did; and steps that were left out."""
    if "spikes" not in report or not any("train/loss" in record for record in report["metrics"]):
        return ""
    told = [Spike(**spike).sentence() for spike in report["spikes"][:_MOST_SPIKES]]
    left = len(report["spikes"]) - len(told)
    more = [f"and {left:,} more spikes"] if left else []
    lines = [*told, *more]
    if not lines and report["status"] == "done":
        lines = ["No spikes: the training loss never jumped far above its usual level."]
    skipped = max((int(record.get("train/skipped") or 0) for record in report["metrics"]), default=0)
    if skipped:
        lines.append(f"{skipped:,} step(s) skipped, because the loss or the gradient was not finite.")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


_MOST_SPIKES = 12
_MOST_METRICS = 4
_EVAL = ("eval/loss", "eval/perplexity", "eval/bits_per_byte")


def _samples(samples: Sequence[Facts]) -> str:
    """First, middle and last sample of every prompt side by side; all of them below."""
    prompts = list(dict.fromkeys(str(s.get("prompt", "")) for s in samples))
    blocks = []
    for prompt in prompts:
        own = [s for s in samples if str(s.get("prompt", "")) == prompt]
        chosen = sorted({0, len(own) // 2, len(own) - 1})
        columns = "".join(_sample(own[i], prompt) for i in chosen)
        rest = "".join(_sample(s, prompt) for s in own)
        more = (
            details(f"All {len(own)} samples", f'<div class="samples">{rest}</div>') if len(own) > 3 else ""
        )
        blocks.append(f'<div class="samples">{columns}</div>{more}')
    lead = "The same prompts, early, halfway and at the end." if len(samples) > len(prompts) else ""
    return section("What it wrote", *blocks, lead=lead)


def _sample(sample: Facts, prompt: str) -> str:
    step = sample.get("step")
    return (
        f'<figure class="sample"><figcaption>step {escape(format_value("num_steps", step))}</figcaption>'
        f'<p dir="auto"><b>{escape(prompt)}</b>{escape(sample.get("text", ""))}</p></figure>'
    )


def _speed(report: Facts) -> str:
    metrics = report["metrics"]
    charts: tuple[tuple[str, str, str, Kind, Callable[[float], str], int], ...] = (
        ("Learning rate", "lr", "train/lr", "line", lambda v: f"{v:.1e}", 3),
        ("Tokens per second", "tokens/s", "tokens_per_s", "area", format_count, 4),
        ("Gradient norm", "norm", "train/grad_norm", "line", format_number, 5),
        ("Memory", "memory", "memory_bytes", "area", format_bytes, 6),
    )
    drawn = "".join(
        chart(title, [Series(name, _series(metrics, key), kind, color)], format_y=form, from_zero=True)
        for title, name, key, kind, form, color in charts
    )
    timings = [
        (str(k), float(v)) for k, v in (report.get("timings") or {}).items() if isinstance(v, int | float)
    ]
    parts = [(name, value) for name, value in timings if name != "total"]
    bar = f"<h3>Where the time went</h3>{stacked_bar(parts, format_duration)}" if len(parts) > 1 else ""
    return section("The machine at work", f'<div class="grid">{drawn}</div>' if drawn else "", bar)


# --- what went in


def _data(data: Facts) -> str:
    if data.get("task"):
        return _rows(data)
    sources = objects(data.get("sources") or data.get("per_source"))
    total = {k: v for k, v in data.items() if k not in ("unigram_entropy", "exact", "tokenizer")}
    tokens = [(str(s.get("name", "")), float(s.get("num_tokens") or 0)) for s in sources]
    bar = stacked_bar(tokens, lambda v: f"{format_count(v)} tokens") if len(tokens) > 1 else ""
    shown = [{k: v for k, v in source.items() if k != "address"} for source in sources]
    addresses = [[str(s.get("name", "")), str(s["address"])] for s in sources if s.get("address")]
    return section(
        "The data",
        pairs(total),
        bar,
        records(shown),
        html_text.lengths(data.get("lengths")),
        html_text.encoders(sources),
        details("Addresses in the cache", table(["source", "address"], addresses)),
    )


def _rows(data: Facts) -> str:
    """Labelled rows: what they were taken for, how many and how long they are, and their classes."""
    parts = {"to learn from": data.get("train") or {}, "held out": data.get("held_out") or {}}
    head = ["", *(words(key) for key in parts["to learn from"])]
    rows = [
        [name, *(format_value(key, value) for key, value in part.items())] for name, part in parts.items()
    ]
    classes = [[str(name), f"{count:,}"] for name, count in (data.get("classes") or {}).items()]
    counts = {
        **(data.get("counts") or {}),
        "in both parts": data.get("shared"),
        "too long": data.get("dropped"),
        "unusable": data.get("unusable"),
    }
    return section(
        "The rows",
        table(head, rows, numeric=range(1, len(head))),
        pairs({key: value for key, value in counts.items() if value}),
        details(
            f"{len(classes)} labels",
            table(["label", "rows"], classes, numeric=[1]),
            opened=len(classes) <= 12,
        ),
        lead=str(data.get("said") or ""),
    )


def _plan(plan: Facts) -> str:
    choices = plan.get("choices") or {}
    rows = [[key, _plain(value), str(why)] for key, (value, why) in sorted(choices.items())]
    memory = [
        (k, float(v)) for k, v in (plan.get("memory") or {}).items() if k not in ("total", "host") and v
    ]
    bar = f"<h3>Memory, as planned</h3>{stacked_bar(memory, format_bytes)}" if memory else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in plan.get("notes") or [])
    facts = {k: v for k, v in plan.items() if k not in ("seconds_low", "seconds_high", "rows")}
    low, high = plan.get("seconds_low"), plan.get("seconds_high")
    if low and high:
        facts["expected time"] = f"{format_duration(low)} to {format_duration(high)}"
    chosen = table(["setting", "chosen", "because"], rows)
    return section(
        "The plan",
        f"<h3>What was chosen for this machine, and why</h3>{chosen}" if chosen else "",
        f'<ul class="notes">{notes}</ul>' if notes else "",
        bar,
        details("Every number of the plan", pairs(facts)) if facts else "",
    )


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _recipe(text: str) -> str:
    if not text:
        return ""
    return section(
        "The recipe", details("As it ran, nothing left to choose", f"<pre><code>{escape(text)}</code></pre>")
    )


def _environment(environment: Facts) -> str:
    packages = environment.get("packages") or {}
    rows = [[str(name), str(version)] for name, version in packages.items()]
    facts = {k: v for k, v in environment.items() if k != "command"}
    inner = pairs(facts) + table(["package", "version"], rows)
    return section("The environment", details("Machine and versions", inner)) if inner else ""


def _command(report: Facts) -> str:
    command = report.get("command") or report["environment"].get("command") or ""
    text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    then = str(report.get("next_command") or "")
    again = f"<h3>This run</h3><pre><code>{escape(text)}</code></pre>" if text else ""
    following = f'<h3>Next</h3><pre class="next"><code>{escape(then)}</code></pre>' if then else ""
    return section("The command", again, following)
