"""The page's section on a model that was made smaller: each step, what it brought and what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.registry import lower_is_better
from llmkit.report.evaluation_tables import change, figure, flat, interval, is_number
from llmkit.report.formatting import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_rate,
    format_value,
)
from llmkit.report.page import Facts, Html, details, headed, inner, listed, objects, section, table, words
from llmkit.report.scatter import Dot, scatter
from llmkit.report.svg import escape

_NONE = "–"
_FORMATS = {
    "int8": "weights of 8 bits",
    "int4": "weights of 4 bits",
    "w8a8": "weights and activations of 8 bits",
    "fp8": "weights and activations as 8-bit floats",
    "mixed": "weights of 4 or 8 bits",
}
_FORMS = {
    "onnx": "ONNX for onnxruntime",
    "gguf": "GGUF for llama.cpp",
    "torch": "a program of torch.export",
    "bf16": "safetensors in bf16",
    "fp16": "safetensors in fp16",
}


def is_compression(report: Facts) -> bool:
    """Whether the report is of `llmkit compress`."""
    return report.get("kind") == "compress" and len(objects(report.get("chain"))) > 0


def compression(report: Facts) -> str:
    """All sections of a compression, in the order of the page; empty for other reports."""
    if not is_compression(report):
        return ""
    chain = objects(report.get("chain"))
    parts = (
        _gates(report),
        _steps(report, chain),
        _speed(chain),
        _tried(report),
        _figures(chain),
        _facts(chain),
    )
    return "".join(parts)


# --- the top


def sentence(report: Facts) -> str:
    """What was made of what, in a sentence."""
    chain = objects(report.get("chain"))
    first, last = chain[0], chain[-1]
    deeds = "; ".join(deed(one) for one in chain[1:])
    share = _share(last, first)
    size = f"{share} of its size: " if share else ""
    return f"{first.get('name')}, {size}{deeds}." if deeds else f"{first.get('name')}, as it was."


def headline(report: Facts) -> str:
    """Size, quality and speed of the last model as cards."""
    chain = objects(report.get("chain"))
    first, last = chain[0], chain[-1]
    metric = str(report.get("best") or "")
    cards = [
        ("size", _size(last), f"{_share(last, first)} of {_size(first)}" if _share(last, first) else ""),
        (words(metric), _value(last, metric), f"before {_value(first, metric)}"),
    ]
    paired = inner(last, "paired")
    if is_number(paired.get("agreement")):
        cards.append(("agreement", _percent(paired["agreement"]), "of the likeliest answers are the same"))
    row = next(iter(_cells(last)), None)
    if row is not None:
        cards.append(("speed", _times(row), f"of the first in bf16, {_cell(row)}"))
    shown = "".join(
        f'<div class="card"><p class="what">{escape(name)}</p><p class="value">{escape(value)}</p>'
        f'<p class="why">{escape(why)}</p></div>'
        for name, value, why in cards
    )
    return f'<section class="cards">{shown}</section>'


# --- sections


def _gates(report: Facts) -> str:
    rows = []
    for gate in objects(report.get("gates")):
        metric, held = str(gate.get("metric")), bool(gate.get("held"))
        mark = Html(f'<b class="{"good" if held else "bad"}">{"held" if held else "failed"}</b>')
        values = (figure(metric, gate.get(key)) for key in ("before", "value"))
        rows.append([words(metric), *values, str(gate.get("said") or ""), mark])
    head = ["figure", "before", "after", "must be", ""]
    lead = (
        "A loss counts only as far as it is beyond chance: by the near end of the difference's 95% interval."
    )
    return section("The gate", table(head, rows, numeric=[1, 2]), lead=lead if rows else "")


def _steps(report: Facts, chain: Sequence[Facts]) -> str:
    metric, first = str(report.get("best") or ""), chain[0]
    like, likeness = _likeness(chain)
    counted = ["parameters"] if any(_parameters(one) != _NONE for one in chain) else []
    head = ["model", "what was done", "size", "of the first", *counted, words(metric), "difference", *like]
    rows = []
    for number, one in enumerate(chain):
        cells = [
            _named(one),
            _done(one) if number else "as it was",
            _size(one),
            _share(one, first) if number else _NONE,
            *([_parameters(one)] if counted else []),
            _value(one, metric),
            _in_lines(_difference(one, metric)) if number else _NONE,
            *(map(_in_lines, likeness(one)) if number else [_NONE] * len(like)),
        ]
        rows.append(cells)
    lead = "Each model was read from disk again and measured on the same data as the first"
    lead += "; in brackets the difference's 95% interval." if any(map(_has_ends, chain)) else "."
    if "NLL" in like:
        lead += " NLL: nats by which a target became less likely, ± one standard error."
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(chain))
    listing = f'<ul class="notes">{notes}</ul>' if notes else ""
    return section("Step by step", table(head, rows, numeric=range(2, len(head))), listing, lead=lead)


def _likeness(chain: Sequence[Facts]) -> tuple[list[str], Any]:
    """What was compared target by target: headings, and the cells of a model."""
    known = {key for one in chain for key in inner(one, "paired")}
    if "nll_difference" in known:
        return ["NLL", "KL", "agreement"], _by_target
    if "cosine" in known:
        return ["cosine"], lambda one: [_number(inner(one, "paired").get("cosine"))]
    if "mean_absolute" in known:
        keys = ("correlation", "mean_absolute")
        return ["correlation", "apart"], lambda one: [_number(inner(one, "paired").get(key)) for key in keys]
    return [], lambda one: []


def _by_target(one: Facts) -> list[str]:
    paired = inner(one, "paired")
    return [_nll(paired), _number(paired.get("kl")), _percent(paired.get("agreement"))]


def _nll(paired: Facts) -> str:
    value, error = paired.get("nll_difference"), paired.get("error")
    if not is_number(value):
        return _NONE
    small = 0 < max(abs(value), float(error) if is_number(error) else 0.0) < _TINY
    form = ".1e" if small else ".4f"
    return f"{value:+{form}}" + (f" ± {error:{form}}" if is_number(error) else "")


def _done(one: Facts) -> Html:
    """What a step did, and whether others read what it left."""
    marks = []
    if one.get("standard") is False:
        marks.append("needs llmkit")
    small = "".join(f' <span class="pill wait mark">{escape(mark)}</span>' for mark in marks)
    return Html(f"{escape(deed(one))}{small}")


def _notes(chain: Sequence[Facts]) -> list[str]:
    found = [
        f"{one.get('name')} is not a standard model: only programs that import llmkit can read it."
        for one in chain
        if one.get("standard") is False
    ]
    whys = {
        str(inner(one, "paired").get("why")): one.get("name")
        for one in chain
        if inner(one, "paired").get("why")
    }
    return found + [f"{name} was not compared target by target: {why}." for why, name in whys.items()]


def _speed(chain: Sequence[Facts]) -> str:
    rows = []
    writes = any("decode_tokens_per_s" in row for one in chain for row in _cells(one))
    for one in chain:
        for row in _cells(one):
            rows.append(
                [
                    _named(one),
                    str(row.get("precision") or _NONE),
                    _cell(row),
                    _milliseconds(row.get("latency_ms_p50")),
                    _milliseconds(row.get("latency_ms_p95")),
                    _rate(row.get("tokens_per_s")),
                    *([_rate(row.get("decode_tokens_per_s"))] if writes else []),
                    _times(row),
                    _known("memory_bytes", row),
                ]
            )
    head = ["model", "computes in", "of", "ms, half", "ms, 95%", "read"]
    head += [*(["written"] if writes else []), "times as fast", "memory"]
    lead = (
        "All timed in turn on this machine. Times as fast: against the first in bf16, the median over rounds "
        "and the range. Where the processor has no bf16 instructions, fp32 is the faster of the two."
    )
    return section("Speed", table(head, rows, numeric=range(3, len(head))), lead=lead if rows else "")


def _tried(report: Facts) -> str:
    """What was tried to reach a target."""
    tried = objects(report.get("tried"))
    if not tried:
        return ""
    metric = str(report.get("best") or "")
    by_size = _plot(f"{words(metric)} by size", tried, "file_bytes", format_bytes, metric)
    by_time = _plot(f"{words(metric)} by time for a batch", tried, "latency_ratio", format_percent, metric)
    rows = [
        [
            _named(one),
            _size(one),
            _percent(one.get("size_ratio")),
            _percent(one.get("latency_ratio")),
            figure(metric, one.get("figure")),
            change(metric, float(one["difference"])) if is_number(one.get("difference")) else _NONE,
            Html(_mark(one)),
        ]
        for one in tried
    ]
    head = ["tried", "size", "of 16 bits", "time, of bf16", words(metric), "difference", ""]
    better = "lower" if lower_is_better(metric) else "higher"
    is_chosen = any(one.get("chosen") for one in tried)
    chosen = "the ring is around what was chosen" if is_chosen else "none of them does what was asked for"
    return section(
        "What was tried",
        by_size,
        by_time,
        table(head, rows, numeric=range(1, 6)),
        lead=f"{better.capitalize()} is better, and so is further left; {chosen}.",
    )


def _plot(title: str, tried: Sequence[Facts], key: str, format_x: Any, metric: str) -> str:
    dots = [
        Dot(
            str(one.get("name")),
            float(one[key]),
            float(one["figure"]),
            color=1 if one.get("held") and one.get("reached", True) else 2,
            chosen=bool(one.get("chosen")),
        )
        for one in tried
        if is_number(one.get(key)) and is_number(one.get("figure"))
    ]
    return scatter(title, dots, format_x=format_x, format_y=format_number, lower=lower_is_better(metric))


def _mark(one: Facts) -> str:
    if one.get("error"):
        return escape(f"passed over: {one['error']}")
    if one.get("chosen"):
        return '<b class="good">chosen</b>'
    why = [*([] if one.get("reached", True) else ["not small or fast enough"])]
    why += [] if one.get("held") else ["loses too much"]
    return f'<b class="bad">{escape(", ".join(why))}</b>' if why else "would do"


def _figures(chain: Sequence[Facts]) -> str:
    """Every figure of every model."""
    names = [name for name in dict.fromkeys(n for one in chain for n in inner(one, "figures")) if name]
    rows = [[words(name), *(_value(one, name) for one in chain)] for name in names]
    head = ["figure", *(str(one.get("name")) for one in chain)]
    return section(
        "All figures", details(f"{len(rows)} figures", table(head, rows, numeric=range(1, len(head))))
    )


def _facts(chain: Sequence[Facts]) -> str:
    parts = []
    for one in chain[1:]:
        settings = _plain(inner(one, "settings"))
        found = _plain(inner(one, "facts"))
        body = headed("Settings", listed(settings)) + headed("What the method says", listed(found))
        parts.append(details(f"{one.get('name')}: {deed(one)}", body))
    return section("How each was made", *parts)


def _plain(facts: Facts) -> list[tuple[str, str]]:
    return [
        (
            words(key),
            format_value(key, value) if not isinstance(value, list) else ", ".join(map(str, value[:12])),
        )
        for key, value in flat(facts)[:_MOST_FACTS]
        if value not in (None, "", [])
    ]


_MOST_FACTS = 60
_SHORT = 24
_TINY = 1e-3


# --- words


def deed(one: Facts) -> str:
    """What a step does, in words: `weights of 4 bits (gptq, in groups of 64)`.

    Args:
        one: A model of the chain: `method`, `settings`, `facts`.
    """
    method, settings, facts = str(one.get("method") or ""), inner(one, "settings"), inner(one, "facts")
    found = _DEEDS.get(method, lambda *_: method or "as it was")(settings, facts)
    return f"{found}, then trained" if settings.get("recover") is not None and method != "distil" else found


def _quantized(settings: Facts, facts: Facts) -> str:
    form = str(settings.get("format") or "")
    said = _FORMATS.get(form, form)
    if form == "mixed" and is_number(settings.get("bits")):
        said += f", {settings['bits']:g} in the mean"
    solver = facts.get("solver") or settings.get("solver")
    group = facts.get("group") or settings.get("group")
    how = [str(solver)] if solver not in (None, "auto", "") else []
    how += [f"groups of {group}"] if isinstance(group, int) else ["a scale a row"] if group == "row" else []
    return f"{said} ({', '.join(how)})" if how else said


def _pruned(settings: Facts, facts: Facts) -> str:
    share = format_percent(float(settings["share"])) if is_number(settings.get("share")) else "some"
    what = str(settings.get("what") or "weights")
    share = _gone(facts) or f"{share} of the"
    how = [str(settings["by"])] if settings.get("by") not in (None, "auto") else []
    how += [str(settings["pattern"])] if settings.get("pattern") not in (None, "free") else []
    said = f"{share} {what} {'set to zero' if what == 'weights' else 'taken out'}"
    return f"{said} ({', '.join(how)})" if how else said


def _gone(facts: Facts) -> str:
    """How many parts went of how many, where the method says it: a share is rounded to whole ones."""
    kept, gone = facts.get("kept"), facts.get("gone")
    if isinstance(kept, list) and isinstance(gone, list):
        num_gone, num_kept = (sum(map(len, sides)) for sides in (gone, kept))
        return f"{num_gone} of {num_gone + num_kept}"
    for name, word in (("channels", ""), ("groups", " groups of")):
        pair = facts.get(name)
        if isinstance(pair, list | tuple) and len(pair) == 2:
            return f"{pair[0] - pair[1]:,} of {pair[0]:,}{word}"
    return ""


def _taught(settings: Facts, facts: Facts) -> str:
    parts = [f"{settings['layers']} layers"] if settings.get("layers") else []
    if is_number(settings.get("channels")) and settings["channels"] < 1:
        parts.append(f"{format_percent(float(settings['channels']))} of the channels")
    return f"a student with {' and '.join(parts)}" if parts else "a student"


def _factorized(settings: Facts, facts: Facts) -> str:
    share = format_percent(float(settings["share"])) if is_number(settings.get("share")) else "some"
    return f"linear layers as products, {share} of their parameters gone"


def _exported(settings: Facts, facts: Facts) -> str:
    form = str(settings.get("to") or "")
    kind = settings.get("type") if settings.get("type") not in (None, "auto") else facts.get("type")
    return _FORMS.get(form, form) + (f", {kind}" if kind else "")


_DEEDS = {
    "quantize": _quantized,
    "prune": _pruned,
    "distil": _taught,
    "factorize": _factorized,
    "export": _exported,
}


# --- the terminal


def table_of(facts: Facts) -> list[tuple[str, ...]]:
    """The chain as lines of cells for a terminal, headings first.

    Args:
        facts: What the report holds: `chain`, `best`.
    """
    chain, metric = objects(facts.get("chain")), str(facts.get("best") or "")
    if not chain:
        return []
    like, likeness = _likeness(chain)
    timed = any(_cells(one) for one in chain)
    head = ("model", "size", words(metric), "difference", *like, *(("times as fast",) if timed else ()))
    lines = [head]
    for number, one in enumerate(chain):
        row = next(iter(_cells(one)), None)
        share = _share(one, chain[0])
        lines.append(
            (
                str(one.get("name")),
                _size(one) + (f" ({share})" if number and share else ""),
                _value(one, metric),
                _difference(one, metric) if number else "",
                *(likeness(one) if number else [""] * len(like)),
                *((_times(row) if row is not None else _NONE,) if timed else ()),
            )
        )
    return lines


# --- cells


def _cells(one: Facts) -> list[Facts]:
    """The lines of speed of a model; of the first that in bf16 comes first."""
    rows = objects(one.get("speed"))
    return sorted(rows, key=lambda row: row.get("precision") == "fp32")


def _named(one: Facts) -> Html:
    name = str(one.get("name"))
    return Html(f"<b{' class=whole' if len(name) <= _SHORT else ''}>{escape(name)}</b>")


def _in_lines(cell: str) -> Html:
    """A cell whose bracket or error stands under its number, for the table has many columns."""
    return Html(escape(cell).replace(" (", "<br>(").replace(" ± ", "<br>± "))


def _size(one: Facts) -> str:
    return format_bytes(float(one["file_bytes"])) if one.get("file_bytes") else _NONE


def _share(one: Facts, first: Facts) -> str:
    """Its size, of the first's."""
    own, before = one.get("file_bytes"), first.get("file_bytes")
    return format_percent(own / before) if is_number(own) and is_number(before) and before > 0 else ""


def _parameters(one: Facts) -> str:
    count = one.get("num_parameters") or inner(one, "facts").get("num_parameters")
    return format_count(float(count)) if is_number(count) and count else _NONE


def _value(one: Facts, metric: str) -> str:
    return figure(metric, inner(one, "figures").get(metric))


def _pair(one: Facts, metric: str) -> Facts:
    found: Mapping[str, Any] = {}
    return next((pair for pair in objects(one.get("differences")) if pair.get("metric") == metric), found)


def _difference(one: Facts, metric: str) -> str:
    pair = _pair(one, metric)
    if not is_number(pair.get("difference")):
        return _NONE
    ends = interval(pair)
    return change(metric, float(pair["difference"])) + (f" ({ends})" if ends else "")


def _has_ends(one: Facts) -> bool:
    return any(interval(pair) for pair in objects(one.get("differences")))


def _times(row: Facts) -> str:
    value, low, high = (row.get(key) for key in ("times_as_fast", "times_low", "times_high"))
    if not is_number(value):
        return _NONE
    ends = f" ({low:.2f} to {high:.2f})" if is_number(low) and is_number(high) and high > low else ""
    return f"{value:.2f}×{ends}"


def _cell(row: Facts) -> str:
    written = f" + {row['new_tokens']}" if row.get("new_tokens") else ""
    return f"{row.get('batch', '?')} × {row.get('length', '?')}{written} tokens"


def _milliseconds(value: object) -> str:
    return format_number(float(value), 3) if is_number(value) else _NONE


def _known(key: str, row: Facts) -> str:
    return format_value(key, float(row[key])) if is_number(row.get(key)) else _NONE


def _rate(value: object) -> str:
    return format_rate(float(value)) if is_number(value) else _NONE


def _number(value: object) -> str:
    return format_number(float(value)) if is_number(value) else _NONE


def _percent(value: object) -> str:
    return f"{100 * float(value):.1f}%" if is_number(value) else _NONE
