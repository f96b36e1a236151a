"""The card of a model that was made smaller: what was done, to which model, what that cost; the licence travels."""

import json
import re
from collections.abc import Sequence
from typing import Any

from llmkit.report.compression import deed, table_of
from llmkit.report.evaluation_tables import figure, flat
from llmkit.report.formatting import format_value, one_line
from llmkit.report.page import Facts, inner, words

_HEAD = re.compile(r"---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.S)
_TRAVELS = ("language", "license", "license_name", "license_link", "pipeline_tag", "library_name")
"""Fields of the parent's head that are true of what was made of it, too."""


def compressed_card(
    parent_card: str | None,
    row: Facts,
    *,
    parent: str,
    chain: Sequence[Facts] = (),
    best: str = "",
    gate: Facts | None = None,
    base_model: str = "",
) -> str:
    """The text of `README.md` of an artefact.

    Args:
        parent_card: The card of the model that the chain began with; None: it has none.
        row: The artefact, as `chain` of the report has it.
        parent: The folder of the model that the chain began with, as a person reads it.
        chain: The report's `chain` up to this artefact, for the table.
        best: The figure that tells a better model.
        gate: The report's gate of this artefact, where there is one.
        base_model: The parent's name on the Hub, where it is known.
    """
    steps = [one for one in chain if one.get("method")] or [row]
    parts = (
        _head(parent_card, row, base_model),
        f"# {_plain(row.get('name') or 'model')}",
        f"{_plain(parent)} made smaller with llmkit: {_plain('; '.join(map(deed, steps)))}.",
        _verdict(gate),
        _needs(row),
        _table(table_of({"chain": list(chain), "best": best})),
        *(_settings(one) for one in steps),
        _warnings(row),
        "## Limits\n\nThe model has those of the one that it was made of, and may have more that were not measured.",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(parent_card: str | None, row: Facts, base_model: str) -> str:
    """The YAML head, each value as JSON, which YAML reads as what it is."""
    known = _read_head(parent_card or "")
    head = {name: known[name] for name in _TRAVELS if known.get(name)}
    if row.get("standard") is False:
        head["library_name"] = "llmkit"
    own = known.get("tags")
    tags = own if isinstance(own, list) else [own] if own else []
    head["tags"] = list(dict.fromkeys(["llmkit", "compressed", *map(str, tags)]))
    source = base_model or known.get("base_model")
    if source:
        head["base_model"] = source
        if base_model:
            head["base_model_relation"] = "quantized" if row.get("method") == "quantize" else "finetune"
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---"])


def _read_head(card: str) -> dict[str, Any]:
    """The metadata of a card; nothing where it has none that can be read."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found = _HEAD.match(card)
    if found is None:
        return {}
    try:
        known = YAML(typ="safe").load(found[1])
    except YAMLError:
        return {}
    return known if isinstance(known, dict) else {}


def _verdict(gate: Facts | None) -> str:
    if gate is None:
        return ""
    metric = str(gate.get("metric"))
    before, after = (figure(metric, gate.get(key)) for key in ("before", "value"))
    said = f"{words(metric)} went from {before} to {after}, {gate.get('said') or ''}".rstrip(", ")
    return (
        f"It was asked to be: {_plain(said)}." if gate.get("held") else f"**Does not hold:** {_plain(said)}."
    )


def _needs(row: Facts) -> str:
    if row.get("standard") is not False:
        return ""
    return "It is not a standard model: only programs that `import llmkit` can read it."


def _settings(row: Facts) -> str:
    known = [*flat(inner(row, "settings")), *flat(inner(row, "facts"))]
    rows = {words(key): _value(key, value) for key, value in known if value not in (None, "", [])}
    lines = [("", ""), *((name, value) for name, value in list(rows.items())[:_MOST])]
    return f"## {_plain(row.get('name') or 'Settings')}\n\n{_table(lines)}" if rows else ""


_MOST = 40


def _value(key: str, value: object) -> str:
    return ", ".join(map(str, value[:12])) if isinstance(value, list) else format_value(key, value)


def _warnings(row: Facts) -> str:
    found = row.get("warnings")
    lines = found if isinstance(found, list | tuple) else []
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    if len(lines) < 2:
        return ""
    cells = [[_plain(cell) for cell in line] for line in lines]
    shown = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


def _plain(value: object) -> str:
    """Any text as Markdown that shows it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", one_line(str(value)))
