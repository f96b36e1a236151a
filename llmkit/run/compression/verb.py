"""`llmkit compress`: the chain."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.durable import replace_in_folder, write_json
from llmkit.errors import LlmkitError, UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.recipe import Loaded
from llmkit.recipe.compression import Step
from llmkit.recipe.schema import Compress
from llmkit.report.compressed_card import compressed_card
from llmkit.report.compression import table_of
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.run.compression.ahead import outlined, steps_ahead
from llmkit.run.compression.artefacts import (
    Artefact,
    begin,
    label_of,
)
from llmkit.run.compression.chain import Chain
from llmkit.run.compression.judge import (
    Judged,
    Limit,
    check_direction,
    compared,
    figures_of,
    gate_error,
    limit_of,
    measure,
    weight_bytes,
)
from llmkit.run.compression.judged import pair_all
from llmkit.run.compression.material import Material, material_of
from llmkit.run.compression.recover import check_recovery
from llmkit.run.compression.search import Search, ladder, search
from llmkit.run.compression.timing import fitting, speed_of
from llmkit.run.evaluate import find_subject
from llmkit.run.folders import (
    CHAIN,
    Options,
    Result,
    base_of,
    home_of,
    leave_record,
    locked,
    refuse_variants,
)
from llmkit.run.foreign import home_of_foreign
from llmkit.run.measure.asked import Subject
from llmkit.run.training import report_end

_LAST = {
    "quantize": "stores weights in few bits",
    "factorize": "makes layers products of two",
    "export": "exports the model",
}
"""Methods whose models no other method takes."""
_FACTORISED = "llmkit_lowrank"
"""How a configuration calls layers that are products of two."""
_HUB = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
"""How the Hub's own cache calls a folder."""


def compress(
    target: str | None,
    loaded: Loaded,
    options: Options,
    reporter: Reporter,
) -> Result:
    """Make a model smaller, step by step, and measure what that costs.

    A step that is done already is not done again; a killed chain goes on where it stopped.

    Args:
        target: A run or a model folder; None: the one that the recipe names or made.
        loaded: A recipe with a `compress` section.
        options: As for every verb.
        reporter: Told what happens.

    Raises:
        UsageError: The steps do not fit the model, or there are none.
        MissingError: There is no such model.
        DataError: There is nothing to look at or to measure on.
    """
    material, folder = _begun(target, loaded, options, reporter)
    with locked(folder):
        try:
            return _compressed(folder, material, loaded, options, reporter)
        except LlmkitError as error:
            if (folder / "report.json").is_file():  # of an earlier chain, and this one did not end so
                report_end(folder, options, error)
            raise


def _compressed(
    folder: Path, material: Material, loaded: Loaded, options: Options, reporter: Reporter
) -> Result:
    """The chain made and measured, with its record, cards and report."""
    subject, section = material.subject, material.section
    first = _measured_first(material, reporter)
    found = _made(first, folder, material, options, reporter)
    known = {**found.measured, subject.place: first}
    judged, warnings = _judge(found.artefacts, material, reporter, known)
    limit = _limit(judged, section)
    facts = _facts(judged, limit, loaded, options, material)
    facts["warnings"] += warnings
    if found.tried:
        facts["tried"] = list(found.tried)
    if found.failed is not None:
        facts["status"] = "failed"
    leave_record(folder, loaded)
    last = found.artefacts[-1].place
    write_json(folder / CHAIN, {"model": str(last.relative_to(folder))})
    _leave_cards(judged, facts)
    report = write_report(folder, facts)
    for warning in facts["warnings"]:
        reporter.warn(warning)
    return _result(folder, judged, limit, report, found.failed)


def outline_compression(
    target: str | None, loaded: Loaded, options: Options, reporter: Reporter
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """What `compress` would do, as JSON takes it and as lines of cells; nothing is written.

    Raises:
        UsageError: The steps do not fit the model, or there are none.
        MissingError: There is no such model.
    """
    material, folder = _begun(target, loaded, options, reporter)
    subject, section = material.subject, material.section
    chains = {"": section.steps}
    if section.target is not None:
        chains = {f"tried/{name}": steps for name, steps in ladder(section.target).items()}
    first = begin(subject.word, subject.place)
    ahead = {
        name: steps_ahead(first, steps, folder / name, material, fresh=options.fresh)
        for name, steps in chains.items()
    }
    facts = {
        "model": str(subject.place),
        "folder": str(folder),
        "chains": {name: [one.to_dict() for one in steps] for name, steps in ahead.items()},
    }
    return facts, outlined(subject.word, ahead)


def _begun(target: str | None, loaded: Loaded, options: Options, reporter: Reporter) -> tuple[Material, Path]:
    """The model and what is known of it, and the folder of what is made of it."""
    refuse_variants(loaded)
    section = loaded.recipe.compress
    if section is None:
        raise UsageError("the recipe has no `compress` section", hint="llmkit compress RUN --method int8")
    subject = find_subject(target or section.model or loaded.recipe.name, options, reporter)
    _check(subject, section)
    material = material_of(subject, section, loaded.recipe, base_of(loaded), options, reporter)
    for step in section.steps:
        if step.recover is not None:
            check_recovery(step, material, options)
    return material, _folder(subject, section, options, own=target is None and section.model is None)


def _measured_first(material: Material, reporter: Reporter) -> Measurement:
    """The figures of the model before: what cannot be measured, or judged, is told before hours are spent.

    Raises:
        UsageError: There is nothing to measure on, no such figure, or nothing says which way that gets better.
    """
    first = measure(material.subject, material, reporter)
    if material.section.max_drop is not None:
        check_direction(_metric(first, material.section), first)
    return first


def _made(
    first: Measurement, folder: Path, material: Material, options: Options, reporter: Reporter
) -> Search:
    """The models of the recipe's steps; of its target, those of the best chain that was tried."""

    def chain_of(name: str, steps: Sequence[Step]) -> list[Artefact]:
        return Chain(folder / "tried" / name, material, options, reporter).make(steps)

    if material.section.target is None:
        return Search(Chain(folder, material, options, reporter).make(material.section.steps), ())
    return search(first, _metric(first, material.section), material, chain_of, reporter)


def _check(subject: Subject, section: Compress) -> None:
    """Refuse what can be known before anything is loaded."""
    if not section.steps and section.target is None:
        raise UsageError(
            "compress.steps: nothing says what to do",
            hint="--method int8, or `steps: [{method: quantize, format: int8}]`",
        )
    config = subject.place / "config.json"
    if not config.is_file():
        raise UsageError(
            f"{subject.place}: an adapter that was not merged cannot be compressed",
            hint="train with `merge: true`, or merge it first",
        )
    known = json.loads(config.read_bytes())
    if known.get("quantization_config"):
        kind = known["quantization_config"].get("quant_method", "unknown")
        done = "factorised" if kind == _FACTORISED else "quantised"
        raise UsageError(
            f"{subject.place}: the model is {done} already ({kind})",
            hint="name the model that it was made from",
        )
    for number, step in enumerate(section.steps[:-1], 1):
        if step.method in _LAST:
            raise UsageError(
                f"compress.steps: step {number} {_LAST[step.method]}, and nothing can follow that",
                hint=f"put `{step.method}` last",
            )


def _folder(subject: Subject, section: Compress, options: Options, *, own: bool) -> Path:
    """Where a chain's artefacts go: beside the model's run where it has one."""
    home = (
        subject.home or home_of(subject.place, options.runs) or home_of_foreign(subject.place, options.runs)
    )
    if own:
        return home / "compress"
    target = section.target
    if target is not None:
        asked = {"size": target.size, "latency": target.latency}
        words = [f"{name}-{100 * share:g}" for name, share in asked.items() if share is not None]
        return home / "-".join(["compress", *words]).replace(".", "_")
    return home / f"compress-{label_of(section.steps)}"


def _judge(
    artefacts: Sequence[Artefact],
    material: Material,
    reporter: Reporter,
    known: Mapping[Path, Measurement],
) -> tuple[list[Judged], list[str]]:
    """All models of the chain, measured, compared with the first, and timed in turn; and warnings."""
    first = known[artefacts[0].place]
    found = [Judged(artefacts[0], first)]
    for one in artefacts[1:]:
        measured = known.get(one.place) or measure(material.of(one.word, one.place), material, reporter)
        found.append(Judged(one, measured, compared(measured, first, material.asked.seed)))
    for judged in found:
        judged.file_bytes = weight_bytes(judged.artefact.place)
    pair_all(found, material, reporter)
    if material.section.speed is None:
        return found, []
    return found, speed_of(found, fitting(material.section.speed, artefacts[0].place), material, reporter)


def _leave_cards(judged: Sequence[Judged], facts: dict[str, Any]) -> None:
    """Say in each model's card what was done to it, and what that cost."""
    place = judged[0].artefact.place
    card = place / "README.md"
    parent_card = card.read_text(encoding="utf-8") if card.is_file() else None
    named = _HUB.search(f"{place.absolute().as_posix()}/")
    for number, one in enumerate(judged[1:], 1):
        last = number == len(judged) - 1
        text = compressed_card(
            parent_card,
            facts["chain"][number],
            parent=judged[0].artefact.word,
            chain=facts["chain"][: number + 1],
            best=facts["best"],
            gate=facts["gates"][0] if last and facts["gates"] else None,
            base_model="/".join(named.groups()) if named else "",
        )
        replace_in_folder(one.artefact.place, "README.md", text)


def _limit(judged: Sequence[Judged], section: Compress) -> Limit | None:
    """What `max_drop` says of the last model."""
    first, last = judged[0].measured, judged[-1]
    assert first is not None
    if section.max_drop is None:
        return None
    return limit_of(section.max_drop, _metric(first, section), last, first)


def _metric(first: Measurement, section: Compress) -> str:
    """The figure that tells better models of the task."""
    if section.metric is not None:
        return section.metric
    return "perplexity" if first.task == "text" and "perplexity" in first.figures else first.best


def _facts(
    judged: Sequence[Judged], limit: Limit | None, loaded: Loaded, options: Options, material: Material
) -> dict[str, Any]:
    first, last = judged[0], judged[-1]
    assert first.measured is not None
    figures = figures_of(last)
    return {
        "name": loaded.recipe.name,
        "kind": "compress",
        "status": "done" if limit is None or limit.held else "failed",
        "command": options.command,
        "model": {"folder": str(last.artefact.place)},
        "parent": {"folder": str(first.artefact.place)},
        "task": first.measured.task,
        "best": _metric(first.measured, material.section),
        "final": {f"eval/{name}": value for name, value in figures.items()},
        "chain": [_row(one, first) for one in judged],
        "gates": [] if limit is None else [limit.to_dict()],
        "warnings": [f"{one.artefact.word}: {said}" for one in judged for said in one.artefact.warnings],
    }


def _row(one: Judged, first: Judged) -> dict[str, Any]:
    """A model of the chain, as the report has it."""
    artefact, step = one.artefact, one.artefact.step
    return {
        "name": artefact.word,
        "folder": str(artefact.place),
        "method": step.method if step else None,
        "settings": {k: v for k, v in step.model_dump(mode="json").items() if v is not None} if step else {},
        "facts": dict(artefact.facts or {}),
        "standard": artefact.standard,
        "file_bytes": one.file_bytes,
        "num_parameters": one.num_parameters,
        "figures": dict(figures_of(one)),
        "differences": [pair.to_dict() for pair in one.differences],
        "paired": dict(one.paired),
        "speed": list(one.speed),
    }


def _result(
    folder: Path,
    judged: Sequence[Judged],
    limit: Limit | None,
    report: dict[str, Any],
    failed: LlmkitError | None,
) -> Result:
    last = judged[-1]
    summary = {
        "model": str(last.artefact.place),
        "metrics": dict(figures_of(last)),
        "before": dict(figures_of(judged[0])),
        "file_bytes": last.file_bytes,
        "chain": report["chain"],
        "gates": report["gates"],
        "report": str(folder / "report.html"),
        **({"tried": report["tried"]} if "tried" in report else {}),
    }
    if failed is None and limit is not None and not limit.held:
        failed = gate_error(limit, last.artefact.word)
    return Result(folder, summary, f"llmkit eval {last.artefact.place}", table_of(report), failed)
