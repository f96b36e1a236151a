"""The page's section on the tokenizer: its figures, the length of its tokens, how it cuts, what it has in vain."""

import re
from collections.abc import Callable, Iterable, Mapping

from llmkit.report.formatting import format_bytes, format_duration, format_number
from llmkit.report.page import Facts, Html, headed, listed, pairs, section, share, table
from llmkit.report.svg import bar, escape

_SCRIPTS = {"han": "Han", "latin": "Latin", "other": "other scripts"}
_TINTS = 4
# How the figures of a tokenizer write the bytes of a piece that ends inside a character.
_BYTE = re.compile(r"\\x([0-9a-f]{2})")


def tokenizer(report: Facts) -> str:
    """How good the tokenizer is: length of its tokens by script, round trip, entries without use, splits."""
    facts = report.get("tokenizer") or report["data"].get("tokenizer") or {}
    facts = facts if isinstance(facts, Mapping) else {"name": facts}
    per_token = report["headline"].get("bytes_per_token")
    shown = {**({"bytes_per_token": per_token} if facts and per_token else {}), **facts}
    note = f'<p class="lead said">{escape(facts["note"])}</p>' if facts.get("note") else ""
    return section(
        "The tokenizer",
        listed(_figures(shown)) + pairs({k: v for k, v in shown.items() if _is_other(k)}),
        note,
        _failure(facts),
        headed("Length of a token by script", _fertility(facts)),
        _splits(facts),
        _wasteful(facts),
    )


_KNOWN = (
    "algorithm", "vocab_size", "asked_vocab_size", "bytes_per_token", "chars_per_token", "unknown_ratio", "used_ratio",
    "measured_on", "documents", "bytes", "chars", "seconds", "note", "found", "jieba_precision", "jieba_recall",
    "jieba_f1",
)  # fmt: skip


def _is_other(key: str) -> bool:
    """Whether a fact has no place of its own on the page."""
    return key not in _KNOWN and not key.startswith(("round_trip", *(f"{script}_" for script in _SCRIPTS)))


def _figures(facts: Facts) -> list[tuple[str, str]]:
    """The facts that have a place, with their names for people; those that are missing are left out."""
    asked = facts.get("asked_vocab_size")
    rows = [
        ("algorithm", facts.get("algorithm")),
        ("vocabulary", _counted(facts.get("vocab_size"))),
        ("asked for", _counted(asked) if asked != facts.get("vocab_size") else None),
        ("bytes per token", _number(facts.get("bytes_per_token"))),
        ("characters per token", _number(facts.get("chars_per_token"))),
        ("round trip", _round_trip(facts)),
        ("unknown tokens", _ratio(facts.get("unknown_ratio"))),
        ("entries that occur", _ratio(facts.get("used_ratio"))),
        ("measured on", facts.get("measured_on")),
        ("learnt from", _learnt_from(facts)),
        ("time to learn", _form(facts.get("seconds"), format_duration)),
        ("cuts like jieba (F1)", _number(facts.get("jieba_f1"))),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _learnt_from(facts: Facts) -> str | None:
    documents, size = _counted(facts.get("documents")), _form(facts.get("bytes"), format_bytes)
    return f"{documents} documents, {size}" if documents and size else documents


def _round_trip(facts: Facts) -> str | None:
    if "round_trip" not in facts:
        return None
    of = f" ({facts['round_trip_of']})" if facts.get("round_trip_of", "text") != "text" else ""
    return ("exact" if facts["round_trip"] else "not exact") + of


def _failure(facts: Facts) -> str:
    first = facts.get("round_trip_first_failure")
    if not first:
        return ""
    failed, tried = facts.get("round_trip_failures", 0), facts.get("round_trip_documents", 0)
    words = f"{failed:,} of {tried:,} documents did not come back as they were. {first}"
    return f'<p class="problem">{escape(words)}</p>'


def _fertility(facts: Facts) -> str:
    known = [script for script in _SCRIPTS if isinstance(facts.get(f"{script}_chars_per_token"), int | float)]
    longest = max((facts[f"{script}_chars_per_token"] for script in known), default=1) or 1
    rows = [
        [
            _SCRIPTS[script],
            Html(bar([("f4", facts[f"{script}_chars_per_token"] / longest)])),
            format_number(facts[f"{script}_chars_per_token"]),
            _number(facts.get(f"{script}_bytes_per_token")) or "–",
            _counted(facts.get(f"{script}_documents")) or "–",
        ]
        for script in known
    ]
    head = ["documents mostly in", "", "characters per token", "bytes per token", "documents"]
    return table(head, rows, numeric=(2, 3, 4))


def _splits(facts: Facts) -> str:
    """Example texts with their tokens in alternating tints; a list of tokens alone is one such text."""
    texts = [facts.get("example"), *(facts.get("splits") or [])]
    drawn = "".join(
        f'<p class="pieces" dir="auto">{_tinted([str(piece) for piece in text])}</p>'
        for text in texts
        if isinstance(text, list) and text
    )
    return headed("How it cuts text", drawn)


def _tinted(pieces: Iterable[str]) -> str:
    marked = ((f"t{i % _TINTS + 1}", piece) for i, piece in enumerate(pieces))
    return "".join(
        f'<span class="{tint}{" byte" if _BYTE.search(piece) else ""}">{escape(_with_marks(piece))}</span>'
        for tint, piece in marked
    )


def _with_marks(piece: str) -> str:
    """Line ends and tabs, which have no ink, get a sign each; bytes are written as `<E4>`."""
    bytes_named = _BYTE.sub(lambda found: f"<{found[1].upper()}>", piece)
    return bytes_named.replace("\n", "⏎").replace("\t", "⇥")


def _wasteful(facts: Facts) -> str:
    tokens = facts.get("wasteful_tokens")
    row = "".join(
        f"<span>{escape(_with_marks(str(token)).replace(' ', '␣'))}</span> "
        for token in (tokens if isinstance(tokens, list) else [])
    )
    words = (
        "They take room in the vocabulary and never occurred in the measured text; the longest come first."
    )
    shown = f'<p class="lead">{words}</p><p class="tokens">{row}</p>' if row else ""
    return headed("Most wasteful entries", shown)


def _form(value: object, form: Callable[[float], str]) -> str | None:
    return form(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number(value: object) -> str | None:
    return _form(value, format_number)


def _ratio(value: object) -> str | None:
    return _form(value, share)


def _counted(value: object) -> str | None:
    return _form(value, lambda count: f"{count:,}")
