"""`llmkit compress`: the chain."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.durable import remove_folder, replace_in_folder, write_json
from llmkit.errors import LlmkitError, UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.recipe import Loaded
from llmkit.recipe.compression import Recover, Step
from llmkit.recipe.evaluation import Speed
from llmkit.recipe.schema import Compress
from llmkit.registry import METHODS, load
from llmkit.report.compressed_card import compressed_card
from llmkit.report.compression import table_of
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.run.compression.artefacts import (
    Artefact,
    begin,
    finished,
    label_of,
    leave,
    next_address,
    seal,
)
from llmkit.run.compression.judge import (
    Judged,
    Limit,
    compared,
    figures_of,
    gate_error,
    limit_of,
    measure,
    weight_bytes,
)
from llmkit.run.compression.judged import pair_all
from llmkit.run.compression.material import Material, looks, material_of
from llmkit.run.compression.recover import recover
from llmkit.run.compression.search import Search, search
from llmkit.run.compression.timing import speed_of
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
    refuse_variants(loaded)
    section = loaded.recipe.compress
    if section is None:
        raise UsageError("the recipe has no `compress` section", hint="llmkit compress RUN --method int8")
    word = target or section.model or loaded.recipe.name
    subject = find_subject(word, options, reporter)
    _check(subject, section)
    recipe = loaded.recipe
    material = material_of(subject, section, recipe, base_of(loaded), options, reporter)
    folder = _folder(subject, section, options, own=target is None and section.model is None)
    with locked(folder):
        found = _made(folder, material, options, reporter)
        judged, warnings = _judge(found.artefacts, material, reporter)
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


def _made(folder: Path, material: Material, options: Options, reporter: Reporter) -> Search:
    """The models of the recipe's steps; of its target, those of the best chain that was tried."""

    def chain_of(name: str, steps: Sequence[Step]) -> list[Artefact]:
        return _Chain(folder / "tried" / name, material, options, reporter).make(steps)

    if material.section.target is None:
        return Search(_Chain(folder, material, options, reporter).make(material.section.steps), ())
    first = measure(material.subject, material, reporter)
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
        raise UsageError(
            f"{subject.place}: the model is quantised already ({kind})",
            hint="name the model that it was made from",
        )
    exports = [number for number, step in enumerate(section.steps[:-1]) if step.method == "export"]
    if exports:
        raise UsageError(
            f"compress.steps: step {exports[0] + 1} exports the model, and nothing can follow that",
            hint="put `export` last",
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


@dataclass(frozen=True)
class _Chain:
    """Makes the artefacts of a chain, one from the other.

    Attributes:
        folder: Where they go.
        material: The first model, and what it was made from.
        options: As for every verb.
        reporter: Told what happens.
    """

    folder: Path
    material: Material
    options: Options
    reporter: Reporter

    def make(self, steps: Sequence[Step]) -> list[Artefact]:
        """The first model and what the steps make of it, one after the other."""
        subject = self.material.subject
        found = [begin(subject.word, subject.place)]
        sparse = False
        for number, step in enumerate(steps, 1):
            sparse = sparse or (step.method == "prune" and step.what == "weights")
            found.append(self._step(found[-1], step, self.folder / f"{number}-{step.method}", sparse=sparse))
        return found

    def _step(self, parent: Artefact, step: Step, folder: Path, *, sparse: bool) -> Artefact:
        address = next_address(parent, step, self._material(step))
        done = None if self.options.fresh else finished(folder, address)
        if done is not None:
            self.reporter.note(f"{folder} is made already")
            return done
        if self.options.fresh:
            for path in folder.parent.glob(f"{folder.name}.*"):
                remove_folder(path)
        self.reporter.phase("compress", f"{folder.name} of {parent.place}")
        if step.recover is None:
            return self._apply(parent, step, folder, address)
        return self._recovered(parent, step, step.recover, folder, address, sparse=sparse)

    def _apply(self, parent: Artefact, step: Step, folder: Path, address: str) -> Artefact:
        """Do a step without recovery."""
        from llmkit.compress.given import Given

        core = self.material.core(parent.place)
        given = Given(
            core,
            self.material.batches(core, step),
            parent.place,
            self.material.asked.seed,
            self.reporter.note,
        )
        made = load(METHODS[step.method].code)(given, step)
        return leave(folder, parent, address, step, made)

    def _recovered(
        self, parent: Artefact, step: Step, settings: Recover, folder: Path, address: str, *, sparse: bool
    ) -> Artefact:
        """Do a step in its stages, each followed by training; what was trained is the artefact."""
        current, facts = parent, []
        stages = step.stages or 1
        for stage in range(1, stages + 1):
            part = _stage(step, stage, stages)
            mark = f".{stage}" if stages > 1 else ""
            cut = folder.with_name(f"{folder.name}{mark}.before")
            cut_address = next_address(current, part, self._material(part))
            made = finished(cut, cut_address) or self._apply(current, part, cut, cut_address)
            facts.append(made.facts)
            said = {"recover": settings.model_dump(mode="json"), "sparse": sparse, "first": self._first()}
            way = next_address(made, part, said)
            trained = recover(
                folder.with_name(f"{folder.name}{mark}.recover-{way[:6]}"),
                made.place,
                part,
                settings,
                self.material,
                self.options,
                self.reporter,
                sparse=sparse,
            )
            current = replace(made, place=trained, address=way)
        last = {**(facts[-1] or {}), "recovered": True, "stages": stages}
        made = self._finish(parent, current, step, folder, address, last)
        for path in folder.parent.glob(f"{folder.name}.*"):  # what is left of the way: reports, no models
            for name in ("model", "checkpoints"):
                if (path / name).is_dir():
                    remove_folder(path / name)
        return made

    def _first(self) -> str:
        """The model that the chain begins with: it teaches."""
        return str(self.material.subject.place.absolute())

    def _finish(
        self,
        parent: Artefact,
        trained: Artefact,
        step: Step,
        folder: Path,
        address: str,
        facts: dict[str, Any],
    ) -> Artefact:
        """The artefact of what was trained: rounded again where it was trained as rounded, else as it is."""
        from llmkit.compress.given import Made

        if step.method == "quantize":
            rounded = step.model_copy(update={"recover": None, "solver": "rtn", "smooth": 0.0})
            again = self._apply(trained, rounded, folder, address)
            return seal(
                folder, parent, address, step, {**facts, **(again.facts or {})}, again.warnings, standard=True
            )
        model = self.material.core(trained.place).model
        made = Made(model, facts, warnings=trained.warnings, standard=trained.standard)
        return leave(folder, replace(parent), address, step, made)

    def _material(self, step: Step) -> dict[str, Any]:
        """What a step's model follows from besides its parent and its settings."""
        section, asked = self.material.section, self.material.asked
        known: dict[str, Any] = {"seed": asked.seed}
        if looks(step) or step.recover is not None:
            known["calibration"] = section.calibration.model_dump(mode="json")
            known["learn"] = [source.model_dump(mode="json") for source in section.learn or ()]
        return known


def _stage(step: Step, stage: int, stages: int) -> Step:
    """A part of a step whose share grows: of weights the share in all so far, of structure that of what is left."""
    share = step.share
    if stages == 1 or share is None:
        return step.model_copy(update={"recover": None, "stages": 1})
    if step.what == "weights":
        part = share * stage / stages
    else:
        before, after = 1 - share * (stage - 1) / stages, 1 - share * stage / stages
        part = 1 - after / before
    return step.model_copy(update={"recover": None, "stages": 1, "share": part})


def _judge(
    artefacts: Sequence[Artefact], material: Material, reporter: Reporter
) -> tuple[list[Judged], list[str]]:
    """All models of the chain, measured, compared with the first, and timed in turn; and warnings."""
    first = measure(material.subject, material, reporter)
    found = [Judged(artefacts[0], first)]
    for one in artefacts[1:]:
        measured = measure(material.of(one.word, one.place), material, reporter)
        found.append(Judged(one, measured, compared(measured, first, material.asked.seed)))
    for judged in found:
        judged.file_bytes = weight_bytes(judged.artefact.place)
    pair_all(found, material, reporter)
    settings = _fitting(material.section.speed, artefacts[0].place)
    return found, speed_of(found, settings, material, reporter) if settings is not None else []


def _fitting(settings: Speed | None, place: Path) -> Speed | None:
    """How models are timed: where the recipe says nothing, rows that they have room for."""
    from llmkit.models.tasks import longest_input

    if settings is None or settings != Compress().speed:
        return settings
    longest = longest_input(str(place), trusted=False)
    (length,) = settings.length
    if longest is None or length + settings.new_tokens <= longest:
        return settings
    new_tokens = min(settings.new_tokens, max(1, longest // 4))
    return settings.model_copy(
        update={"length": [max(1, min(length, longest - new_tokens))], "new_tokens": new_tokens}
    )


def _leave_cards(judged: Sequence[Judged], facts: dict[str, Any]) -> None:
    """Say in each model's card what was done to it, and what that cost."""
    place = judged[0].artefact.place
    card = place / "README.md"
    parent_card = card.read_text(encoding="utf-8") if card.is_file() else None
    for number, one in enumerate(judged[1:], 1):
        last = number == len(judged) - 1
        text = compressed_card(
            parent_card,
            facts["chain"][number],
            parent=judged[0].artefact.word,
            chain=facts["chain"][: number + 1],
            best=facts["best"],
            gate=facts["gates"][0] if last and facts["gates"] else None,
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
