"""`llmkit eval --dry-run`: which models would be asked what, on which data, held against what. Nothing is written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.hardware import detect_elsewhere
from llmkit.recipe import Loaded
from llmkit.recipe.schema import Eval
from llmkit.registry import EVALUATIONS
from llmkit.report.console import Reporter
from llmkit.run.checkpoints import is_checkpoint
from llmkit.run.evaluate import asked_of, chosen, find_subject, recipe_of, subject_at, way_of
from llmkit.run.folders import Options
from llmkit.run.measure.asked import Subject

Lines = list[tuple[str, ...]]


def outline_evaluation(
    target: Sequence[str] | None, loaded: Loaded | None, options: Options, reporter: Reporter
) -> tuple[dict[str, Any], Lines]:
    """What `evaluate` would do, as JSON takes it and as lines of cells.

    Args:
        target: As of `evaluate`.
        loaded: As of `evaluate`.
        options: As of `evaluate`.
        reporter: Told what else should be known.

    Raises:
        UsageError: What is asked does not fit.
        MissingError: There is no such model.
    """

    def find(word: str) -> Subject:
        """Of a checkpoint, which is exported to be measured, only what its run says."""
        checkpoint = Path(word)
        if not is_checkpoint(checkpoint):
            return find_subject(word, options, reporter)
        run = checkpoint.parent.parent
        return replace(subject_at(word, run / "model"), place=checkpoint, step=checkpoint.name)

    section, subjects, against = chosen(target, loaded, find)
    way = way_of(subjects[0], section)
    recipe = recipe_of(loaded, subjects[0])
    facts: dict[str, Any] = {
        "models": [{"model": str(one.place), "asked": asked_of(one, section)} for one in subjects],
        "data": _data(section, way, subjects[0]),
        "rows": section.rows,
        "figures": list(section.metrics or EVALUATIONS[way].metrics),
        "intervals": section.resamples,
        "fail_under": dict(section.gate.fail_under),
        "max_drop": section.gate.max_drop,
        "against": None if against is None else str(against.place),
        "device": detect_elsewhere(recipe.machine, "eval", reporter.note).device,
        "precision": subjects[0].precision,
        "processes": options.processes or 1,
    }
    return facts, _lines(facts)


def _data(section: Eval, way: str, subject: Subject) -> list[str]:
    """What is measured on, in words."""
    if way == "harness" and section.harness is not None:
        return [f"harness: {name}" for name in section.harness.tasks]
    if way == "speed":
        return ["made-up inputs"]
    sources = [*(section.data or ()), *([section.labelled] if section.labelled is not None else [])]
    if sources:
        return [one.dataset or ", ".join(map(str, one.files or ())) or str(one.name) for one in sources]
    return [f"what the run of {subject.word} held out"]


def _lines(facts: dict[str, Any]) -> Lines:
    lines: Lines = [("model", one["model"], f"asked: {one['asked']}") for one in facts["models"]]
    lines += [("data", text, "") for text in facts["data"]]
    lines.append(("rows", "all" if facts["rows"] is None else f"{facts['rows']:,}", ""))
    lines.append(("figures", ", ".join(facts["figures"]) or "as the tasks have them", ""))
    if facts["intervals"]:
        lines.append(("intervals", f"95%, of {facts['intervals']:,} draws", ""))
    lines += [("gate", f"{name}: {value:g}", "--fail-under") for name, value in facts["fail_under"].items()]
    if facts["max_drop"] is not None:
        lines.append(("gate", f"at most {facts['max_drop']} lost against {facts['against']}", "--max-drop"))
    where = f"{facts['device']}, {facts['precision']}"
    return [*lines, ("machine", where, f"processes: {facts['processes']}")]
