"""The page's section on what in a text made a model say what it says: words on green or red, and their scores."""

from collections.abc import Sequence

from llmkit.report.formatting import format_percent, visible
from llmkit.report.page import Facts, Html, details, inner, objects, section, table
from llmkit.report.svg import escape

FAINT = 0.1
"""Words with less than this share of the strongest score are left plain."""
_MOST_WORDS = 15
_GREEN, _RED = "46, 160, 90", "220, 70, 60"


def explained(report: Facts) -> str:
    """The section; empty where nothing was explained."""
    rows = objects(inner(report, "tables").get("explained"))
    return section(
        "What the model looked at",
        *map(_one, rows),
        lead="Green words speak for what is explained, red ones against it, the stronger the more; their scores sum to "
        "what the text changes.",
    )


def _one(row: Facts) -> str:
    return (
        f'<h3>{escape(heading(row))}</h3><p class="pieces" dir="auto">{_text(row, 0)}</p>'
        + (f'<p class="pieces" dir="auto">{_text(row, 1)}</p>' if row.get("other") else "")
        + f'<p class="lead said">{escape(balance(row))}</p>'
        + details("Words by their scores", _strongest(row))
    )


def heading(row: Facts) -> str:
    """What is explained, with its probability: `positive, 93%`."""
    probability = row.get("probability")
    label = visible(str(row.get("label", ""))).replace("\n", "⏎")
    if isinstance(probability, int | float):
        return f"{label or '∅'}, {format_percent(probability)}"
    return f"{label}: {_number(row.get('value'))}"


def balance(row: Facts) -> str:
    """How the scores add up, in a sentence."""
    value, base, delta = (row.get(name) for name in ("value", "baseline_value", "delta"))
    if not all(isinstance(one, int | float) for one in (value, base, delta)):
        return ""
    assert isinstance(value, int | float)
    assert isinstance(base, int | float)
    assert isinstance(delta, int | float)
    unit = {"score": "score"}.get(str(row.get("unit")), f"{row.get('unit')} (nats)")
    change, whole = value - base, value - base + delta
    nothing = f"with {row.get('baseline')} for every word {base:.3f}"
    words = f"of which the words' scores make {whole:+.3f} ({row.get('steps')} steps)"
    return f"{unit} {value:.3f}; {nothing}: a change of {change:+.3f}, {words}."


def strongest(row: Facts, most: int = _MOST_WORDS) -> list[Facts]:
    """The words with the largest scores, whichever their sign, the largest first."""
    words = [one for one in objects(row.get("words")) if isinstance(one.get("score"), int | float)]
    return sorted(words, key=lambda one: -abs(one["score"]))[:most]


def shares(words: Sequence[Facts]) -> list[float]:
    """Each word's score as a share of the strongest one's, from -1 to 1; 0 where all are nought."""
    largest = max((abs(one["score"]) for one in words), default=0.0)
    return [one["score"] / largest if largest else 0.0 for one in words]


def _text(row: Facts, part: int) -> str:
    """One of the texts, its words tinted."""
    text = str(row.get("other" if part else "text", ""))
    words = [one for one in objects(row.get("words")) if isinstance(one.get("score"), int | float)]
    shown, done = [], 0
    for word, share in zip(words, shares(words), strict=True):
        if word.get("part", 0) == part:
            start, end = max(done, word["start"]), max(done, word["end"])
            shown.append(escape(text[done:start]) + _tinted(text[start:end], share, word["score"]))
            done = end
    return "".join(shown) + escape(text[done:])


def _tinted(word: str, share: float, score: float) -> str:
    if abs(share) < FAINT:
        return escape(word)
    color = f"rgba({_GREEN if share > 0 else _RED}, {0.15 + 0.55 * abs(share):.2f})"
    return f'<span style="background: {color}" title="{score:+.3f}">{escape(word)}</span>'


def _strongest(row: Facts) -> str:
    rows = [
        [Html(escape(visible(str(one.get("piece", ""))))), f"{one['score']:+.3f}"] for one in strongest(row)
    ]
    return table(["word", "score"], rows, numeric=[1])


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "?"
