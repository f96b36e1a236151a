"""Figures in a model's card: as metadata that the Hub reads (`model-index`), and as a table for people.

**Source**: the Hub's model card metadata, `model-index`: results of a task, a data set and metrics.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.durable import RunLock, read_manifest, replace_in_folder
from llmkit.errors import CorruptError, RunError
from llmkit.registry import FIGURES
from llmkit.report.evaluation_tables import interval, is_number, shown
from llmkit.report.formatting import format_number, one_line
from llmkit.report.page import Facts, inner

CARD = "README.md"
_KEY = "model-index"
_INDEX = re.compile(rf"^{_KEY}: (\[.*\])$", re.M)
_BEGIN, _END = "<!-- llmkit: measured -->", "<!-- llmkit: end -->"
_TABLE = re.compile(rf"\n*{_BEGIN}\n.*?{_END}", re.S)
_TYPES = {
    "cls": "text-classification",
    "regression": "text-classification",
    "tag": "token-classification",
    "qa": "question-answering",
    "seq2seq": "text2text-generation",
    "sft": "text-generation",
    "dpo": "text-generation",
    "embed": "sentence-similarity",
    "text": "text-generation",
    "choice": "multiple-choice",
    "harness": "text-generation",
    "generation": "text-generation",
    "retrieval": "text-retrieval",
}
"""Tasks by the names that the Hub has for them."""
_NOT_CARDS = ("speed",)
"""What depends on the machine says nothing of a model."""


def result_of(report: Facts) -> dict[str, Any] | None:
    """What a report says of a model, as an entry of `model-index`; None where it says nothing.

    Nothing for a card are figures of some rows only, and figures of what was held out that were measured in another way
    than training measures them: a card has one lot of these.

    Args:
        report: Of training or of an evaluation: `task`, `final`, and of an evaluation `figures`, `data_address`,
            `settings`, `plain` (it was asked as training asks), `sampled` (of some rows only); `dataset` (its `name`,
            `type`) and `pipeline` (what a model without a task is for) where they are known.
    """
    task = str(report.get("task") or "")
    kind = _TYPES.get(task) or str(report.get("pipeline") or "text-generation")
    figures = _figures(report)
    address = str(report.get("data_address") or "")
    held_out = not address or inner(report, "settings").get("held_out", False)
    if task in _NOT_CARDS or not figures or report.get("sampled") or not _may_stand(report, bool(held_out)):
        return None
    given = inner(report, "dataset")
    what = "held-out rows" if report.get("task") not in ("", None, "text") else "held-out text"
    name = str(given.get("name") or (f"{what} of the training data" if held_out else "other data"))
    dataset = {"name": name, "type": str(given.get("type") or _slug(name))}
    dataset |= {"split": "held-out"} if held_out else {"config": _manner(report)}
    dataset |= {"revision": address} if address else {}
    measured = inner(report, "figures")
    metrics = [_metric(name, value, inner(measured, name)) for name, value in figures.items()]
    return {"task": {"type": kind, "name": task or "text"}, "dataset": dataset, "metrics": metrics}


def _may_stand(report: Facts, held_out: bool) -> bool:
    """Whether figures of held-out rows compare with those of training; those of other data stand for themselves."""
    return not held_out or not report.get("data_address") or bool(report.get("plain"))


def _manner(report: Facts) -> str:
    """How it was measured: equal for equal settings. `config` is among what the Hub tells entries apart by."""
    settings = json.dumps(inner(report, "settings"), sort_keys=True, default=str)
    return f"settings-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def _metric(name: str, value: float, found: Facts) -> dict[str, Any]:
    """A figure as the Hub takes it; its interval, for which there is no field, among the metric's arguments."""
    ends = [found.get("low"), found.get("high")]
    args = {"args": {"interval_95": ends}} if all(map(is_number, ends)) else {}
    return {"type": name, "name": name.replace("_", " "), "value": value, **args, "verified": False}


def _figures(report: Facts) -> dict[str, float]:
    """The figures worth a place in a card: those that models are judged by."""
    measured = {name: inner(report, "figures", name).get("value") for name in shown(report)}
    final = {str(name).removeprefix("eval/"): value for name, value in inner(report, "final").items()}
    known = {name: value for name, value in (measured or final).items() if name in FIGURES}
    # Tasks of the harness have names of their own.
    found = known or {name: value for name, value in measured.items() if report.get("task") == "harness"}
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-.") or "data"


def index_line(model: str, results: Sequence[Facts]) -> str:
    """The line of the card's YAML head; JSON, which YAML reads as what it is."""
    return f"{_KEY}: " + json.dumps([{"name": model, "results": list(results)}], ensure_ascii=False)


def update_card(model_folder: Path, report: Facts) -> str:
    """Enter what was measured into the card of a model that llmkit exported; the rest of the card stays as it is.

    What was measured before in the same way on the same data is replaced. The card is among the files that the
    model's manifest vouches for: the folder agrees with its manifest all the while. Figures of speed are not entered,
    nor is anything in cards of models from elsewhere.

    Args:
        model_folder: The model's.
        report: What `report.json` of the evaluation holds.

    Returns:
        Why the card was left as it was, in words, where it should have been changed; else nothing.
    """
    result = result_of(report)
    if result is None or not _is_ours(model_folder):
        return ""
    try:
        with RunLock(model_folder.parent):  # training replaces the whole folder
            return _enter(model_folder, result, report)
    except (RunError, OSError, CorruptError) as error:
        return f"the model's card was not changed: {error}"


def _is_ours(folder: Path) -> bool:
    """Whether the folder is a model's that llmkit exported, with its card."""
    try:
        manifest = read_manifest(folder)
    except CorruptError:
        return False
    return manifest.get("kind") == "model" and (folder / CARD).is_file()


def _enter(folder: Path, result: dict[str, Any], report: Facts) -> str:
    text = (folder / CARD).read_text(encoding="utf-8")
    head = re.match(r"---\n(.*?\n)---\n", text, re.S)
    if head is None or (f"\n{_KEY}:" in f"\n{head[1]}" and not _INDEX.search(head[1])):
        return f"the card {folder / CARD} has no head that llmkit wrote, and stays as it is"
    found = _INDEX.search(head[1])
    entries: list[dict[str, Any]] = json.loads(found[1]) if found else []
    name = str(entries[0]["name"]) if entries else str(report.get("name") or folder.parent.name)
    results = [one for one in (entries[0]["results"] if entries else []) if _what(one) != _what(result)]
    line = index_line(name, [*results, result])
    top = _INDEX.sub(lambda _: line, head[1]) if found else f"{head[1]}{line}\n"
    body = _with_table(text[head.end() :], [*results, result])
    changed = f"---\n{top}---\n{body}"
    if changed != text:
        replace_in_folder(folder, CARD, changed)
    return ""


def _what(result: Facts) -> tuple[object, ...]:
    """What was measured, and on what: a model has one lot of held-out rows."""
    dataset, task = result["dataset"], result["task"]
    if dataset.get("split") == "held-out":
        return task.get("name"), "held-out"
    return task["type"], task.get("name"), dataset["type"], dataset.get("revision"), dataset.get("config")


def _with_table(body: str, results: Sequence[Facts]) -> str:
    """The card's text with a table of what was measured since the model was exported, in the place of an older one."""
    lines = ["| task | data | figure | value |", "| --- | --- | --- | --- |"]
    often = Counter(map(_called, results))
    for result in results:
        if not result["dataset"].get("revision"):
            continue  # what training measured stands in the card already
        for metric in result["metrics"]:
            low, high = inner(metric, "args").get("interval_95") or (None, None)
            ends = interval({"low": low, "high": high})
            value = format_number(metric["value"]) + (f" (95%: {ends})" if ends else "")
            task, data = _called(result)
            if often[task, data] > 1 and result["dataset"].get("config"):
                data = f"{data} ({result['dataset']['config']})"
            cells = (task, data, metric["name"], value)
            lines.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
    table = "\n".join(["## Measured with llmkit eval", "", *lines])
    shown_table = f"\n\n{_BEGIN}\n{table}\n{_END}"
    if _TABLE.search(body):
        return _TABLE.sub(lambda _: shown_table, body, count=1)
    place = body.find("\n## Limits")
    at = len(body.rstrip()) if place < 0 else place
    return f"{body[:at].rstrip()}{shown_table}\n{body[at:] if place >= 0 else ''}"


def _called(result: Facts) -> tuple[str, str]:
    return str(result["task"].get("name") or ""), str(result["dataset"]["name"])


def _plain(text: str) -> str:
    """Any text as a cell of a Markdown table."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", one_line(text))
