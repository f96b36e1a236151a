"""The page's sections on text: what preparation left, what it dropped, what was passed over, who encoded it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llmkit.report.formatting import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
)
from llmkit.report.page import (
    Card,
    Facts,
    Html,
    by_size,
    counts,
    details,
    headed,
    inner,
    listed,
    objects,
    section,
    share,
    table,
)
from llmkit.report.svg import bar, escape

_STEPS = {
    "personal_data": "personal data",
    "decontaminate": "evaluation data",
    "lines": "repeated lines",
    "exact": "exact copies",
    "near": "near copies",
}
_IN_VIEW = 9  # examples that are seen without a click
_PER_REASON = 6
_LONGEST_EXAMPLE = 400


def cards(report: Facts) -> list[Card]:
    """The numbers at the top of the page of a run that made tokens and trained nothing."""
    data = report["data"]
    held_out = data.get("num_held_out_documents") or 0
    read = inner(report, "preparation", "read").get("documents")
    return [
        ("data_documents", "documents", format_count, f"and {held_out:,} held out" if held_out else ""),
        ("data_tokens", "tokens", format_count, "in the shards"),
        ("bytes_per_token", "bytes per token", format_number, "of text"),
        ("vocab_size", "vocabulary", format_count, "entries"),
        ("kept_ratio", "kept", format_percent, f"of {read:,} documents read" if read else "of documents"),
    ]


# --- preparation


def preparation(report: Facts) -> str:
    """What each step left of the text, what it dropped and why, and what it replaced."""
    facts = inner(report, "preparation")
    steps, read, kept = objects(facts.get("steps")), inner(facts, "read"), inner(facts, "kept")
    every = read.get("documents") or max((int(step.get("documents_in") or 0) for step in steps), default=0)
    lead = f"Of {_amount(read)}, {_amount(kept)} were kept." if read and kept else ""
    return section(
        "What preparation left",
        _waterfall(read, steps, every),
        headed("What was dropped, and why", _reasons(steps, every)),
        _marks(steps),
        lead=lead,
    )


def _amount(size: Facts) -> str:
    return f"{size.get('documents', 0):,} documents ({format_bytes(size.get('bytes') or 0)})"


def _waterfall(read: Facts, steps: Sequence[Facts], every: int) -> str:
    """A bar a step: what stays, and beside it in another colour what this step took."""
    whole = max(every, 1)
    rows = [_row("read", read.get("documents") or 0, 0, read.get("bytes") or 0, whole, "")] if read else []
    for step in steps:
        left, came = int(step.get("documents_out") or 0), int(step.get("documents_in") or 0)
        rows.append(_row(_step(step), left, came - left, step.get("bytes_out") or 0, whole, _deeds(step)))
    key = (
        '<ul class="key"><li><i class="c1"></i>documents that stay</li>'
        '<li><i class="c2"></i>dropped by this step</li></ul>'
    )
    shown = table(["after", "share of documents", "documents", "text", "what it did"], rows, numeric=(2, 3))
    return key + shown if shown else ""


def _row(name: str, left: int, lost: int, size: float, whole: int, deeds: str) -> list[str]:
    drawn = Html(bar([("f1", left / whole), ("lost", lost / whole)]))
    done = Html(f'<span class="deeds">{escape(deeds)}</span>')
    return [name, drawn, f"{left:,}", format_bytes(size), done]


def _step(step: Facts) -> str:
    name = str(step.get("name", ""))
    return _STEPS.get(name, name.replace("_", " "))


def _deeds(step: Facts) -> str:
    dropped, replaced = counts(step.get("dropped")), counts(step.get("replaced"))
    changed = step.get("changed") or 0
    verb = "took out" if step.get("name") == "lines" else "replaced"
    parts = [
        f"changed {changed:,}" if changed else "",
        f"dropped {sum(dropped.values()):,}" if dropped else "",
        f"{verb} {sum(replaced.values()):,} {'lines' if verb == 'took out' else 'places'}"
        if replaced
        else "",
    ]
    return " · ".join(filter(None, parts)) or "nothing"


def _reasons(steps: Sequence[Facts], every: int) -> str:
    found = [(_step(step), *pair) for step in steps for pair in by_size(counts(step.get("dropped")))]
    most = max((count for _, _, count in found), default=1)
    rows = [
        [name, reason, Html(bar([("lost", count / most)])), f"{count:,}", share(count / max(every, 1))]
        for name, reason, count in found
    ]
    return table(["step", "reason", "", "documents", "of all read"], rows, numeric=(3, 4))


def _marks(steps: Sequence[Facts]) -> str:
    marks: Counter[str] = Counter()
    for step in steps:
        if step.get("name") == "personal_data":
            marks.update(counts(step.get("replaced")))
    shown = listed([(kind, f"{count:,}") for kind, count in by_size(marks)])
    words = (
        "Patterns and checksums find most of what they look for, never all: this reduces personal data in the text. "
        "Treat what is left as text that may still hold some."
    )
    return headed("Personal data replaced by marks", f'<p class="lead">{words}</p>{shown}' if shown else "")


def dropped(examples: object) -> str:
    """Some of the documents that were dropped, one of each reason in view."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for example in objects(examples):
        groups.setdefault(
            (_step({"name": example.get("step", "")}), str(example.get("reason", ""))), []
        ).append(example)
    seen = "".join(_example(name, reason, found[0]) for (name, reason), found in [*groups.items()][:_IN_VIEW])
    more = "".join(
        details(
            f"{name}: {reason}" if reason else name,
            _grid("".join(_example(name, reason, one) for one in found[:_PER_REASON])),
        )
        for (name, reason), found in groups.items()
        if len(found) > 1 or len(groups) > _IN_VIEW
    )
    return section(
        "Examples of what was dropped",
        _grid(seen),
        headed("More of each", more),
        lead="The beginning of each text, as the step met it. A rule that takes good text shows here first.",
    )


def _grid(figures: str) -> str:
    return f'<div class="samples">{figures}</div>' if figures else ""


def _example(name: str, reason: str, example: Facts) -> str:
    text, where = str(example.get("text", "")), str(example.get("where") or "")
    clipped = text if len(text) <= _LONGEST_EXAMPLE else text[:_LONGEST_EXAMPLE] + "…"
    why = f"{name} · {reason}" if reason and reason != name else name
    place = f' <span class="where">{escape(where)}</span>' if where else ""
    return (
        f'<figure class="sample"><figcaption><b>{escape(why)}</b>{place}</figcaption>'
        f'<p dir="auto">{escape(clipped)}</p></figure>'
    )


# --- reading


def skipped(report: Facts) -> str:
    """Rows and files that could not be read and were passed over, as the recipe asked."""
    met = [inner(report, "preparation", "skipped"), *(s.get("skipped") for s in _sources(report))]
    tallies = objects(met)
    rows = [
        [what, reason, f"{count:,}"]
        for what, key in (("rows", "rows"), ("files", "files"))
        for reason, count in by_size(_summed(tally.get(key) for tally in tallies))
    ]
    blank = {
        "empty files": sum(int(tally.get("empty_files") or 0) for tally in tallies),
        "blank documents": sum(int(tally.get("empty_documents") or 0) for tally in tallies),
    }
    rows += [[name, "nothing in them", f"{count:,}"] for name, count in blank.items() if count]
    examples = [
        [*(str(one.get(key) or "") for key in ("where", "reason", "what", "value"))]
        for tally in tallies
        for one in objects(tally.get("examples"))
    ]
    return section(
        "Passed over while reading",
        table(["what", "reason", "count"], rows, numeric=(2,)),
        details("The first of them", table(["where", "reason", "what is wrong", "value"], examples)),
    )


def _sources(report: Facts) -> list[Facts]:
    return objects(report["data"].get("sources"))


def lengths(bins: object) -> str:
    """How long the documents are: for each bin its longest length, in tokens, and the documents in it."""
    known = [(one["up_to"], int(one.get("documents") or 0)) for one in objects(bins) if "up_to" in one]
    whole, most = max(1, sum(n for _, n in known)), max((n for _, n in known), default=0)
    rows = [
        [f"{up_to:,}" if isinstance(up_to, int) else str(up_to), Html(bar([("f1", n / max(most, 1))])), f"{n:,}",
         share(n / whole)]
        for up_to, n in known
    ]  # fmt: skip
    return headed(
        "Length of documents", table(["tokens, up to", "", "documents", "share"], rows, numeric=(2, 3))
    )


def encoders(sources: Sequence[Facts]) -> str:
    """Which program made the ids of each source, and how it was checked."""
    found: dict[str, list[str]] = {}
    for source in sources:
        verdict = source.get("encoder")
        if isinstance(verdict, Mapping):
            found.setdefault(_verdict(verdict), []).append(str(source.get("name", "")))
    lines = [(f"{', '.join(names)}: " if len(found) > 1 else "") + said for said, names in found.items()]
    notes = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return headed("What made the ids", f'<ul class="notes">{notes}</ul>' if notes else "")


def _verdict(verdict: Facts) -> str:
    name = f"{verdict.get('encoder', '')} {verdict.get('version', '')}".strip()
    documents, size = int(verdict.get("compared_documents") or 0), verdict.get("compared_bytes") or 0
    if verdict.get("reason"):
        return f"{name} ({verdict['reason']})"
    if documents:
        return (
            f"{name}; it gave the same ids as tokenizers on {documents:,} documents "
            f"({format_bytes(size)}) of this text"
        )
    return name


def _summed(several: Iterable[object]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in several:
        total.update(counts(one))
    return dict(total)
