"""`llmkit eval`: models measured, compared, and held against what must be."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llmkit.durable import remove_file, write_file, write_json
from llmkit.errors import GateError, UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.evaluate.sharing import ALONE, Share, gather_everywhere
from llmkit.evaluate.verdict import Difference, Held, check_gates, check_names, differences, intervals_of
from llmkit.hardware import detect_hardware
from llmkit.launch.world import World, detect_world
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.schema import Eval, Recipe
from llmkit.registry import EVALUATIONS, TASKS, load
from llmkit.report.console import Reporter
from llmkit.report.formatting import format_number, format_value, jsonable
from llmkit.report.report import write_report
from llmkit.report.results import update_card
from llmkit.report.trying import try_command, try_trained
from llmkit.run.checkpoints import exported_checkpoint, is_checkpoint
from llmkit.run.folders import (
    Options,
    Result,
    base_of,
    find_model,
    home_of,
    leave_record,
    locked,
    refuse_variants,
    run_name,
)
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.tasks import task_run

_COMMON = ("model", "task", "metrics", "resamples", "gate")
"""Settings of every evaluation; they change nothing in what is asked."""
_SAME_FOLDER = (*_COMMON, "reference")
_SEVERAL = 3
"""So many models, those of several seeds for one, have a mean and a deviation."""
_HELD_OUT = ("text", "labelled")
"""What measures on what the model's run held out, where nothing else is named."""


@dataclass(frozen=True)
class _Judged:
    """A measurement with all that follows from it."""

    subject: Subject
    way: str
    measured: Measurement
    intervals: dict[str, tuple[float, float]]
    differences: Sequence[Difference] = ()
    gates: Sequence[Held] = ()
    warnings: list[str] = field(default_factory=list)
    among_others: bool = False


def evaluate(
    target: str | Sequence[str] | None,
    loaded: Loaded | None,
    options: Options,
    reporter: Reporter,
    *,
    alone: bool = False,
) -> Result:
    """Measure models: those named, the one a recipe trained, on what was held out or on data that the recipe names.

    Args:
        target: Runs or model folders, the first of them what the others are compared with; None: the one that `loaded`
            names or made.
        loaded: A recipe whose `eval` section says how; None: as training measured.
        options: As for every verb.
        reporter: Told what happens.
        alone: This process does it all, also where a launcher started several.

    Raises:
        UsageError: Nothing says what to measure on, or what is asked does not fit.
        MissingError: There is no such model, or its data is gone.
    """
    if loaded is not None:
        refuse_variants(loaded)
    section = (loaded.recipe.eval if loaded else None) or Eval()
    words = [target] if isinstance(target, str) else list(target or ())
    if not words:
        words = [section.model or (loaded.recipe.name if loaded else "")]
    subjects = [find_subject(word, options, reporter) for word in words]
    against = find_subject(section.gate.against, options, reporter) if section.gate.against else None
    everyone = [*subjects, *([against] if against is not None else [])]
    _check_ways(everyone, section)
    with _sharing(alone) as share:
        measured = [_measure(one, everyone, section, loaded, options, reporter, share) for one in everyone]
    if share.rank:
        return Result(Path(), {}, "")
    found = _judge(measured, bool(against), section, _recipe(loaded, subjects[0]).seed)
    folders = [_write(one, loaded, options, section) for one in found]
    for one in found:
        for warning in one.warnings:
            reporter.warn(f"{one.subject.word}: {warning}" if len(found) > 1 else warning)
    return _result(found, folders, section)


def find_subject(word: str, options: Options, reporter: Reporter) -> Subject:
    """The model that a person named, and what is known of it; of a checkpoint, its model.

    Raises:
        MissingError: There is no such model.
        CorruptError: The checkpoint is damaged.
    """
    checkpoint = Path(word)
    if not is_checkpoint(checkpoint):
        return _subject(word, find_model(word, options.runs, adapters=True))
    place = exported_checkpoint(checkpoint, options, reporter)
    home = checkpoint.parent.parent.parent
    return replace(_subject(word, place), home=home, step=checkpoint.name)


def _subject(word: str, place: Path) -> Subject:
    recipe, plan = place.parent / "resolved.yaml", place.parent / "plan.json"
    precision = str(json.loads(plan.read_bytes())["precision"]) if plan.is_file() else "fp32"
    trained = load_recipe(recipe) if recipe.is_file() else None
    section = (trained.recipe.finetune or trained.recipe.pretrain) if trained else None
    trusted = section.model.trust_remote_code if section is not None else False
    return Subject(word, place, trained, task_run(place), precision, trusted)


def way_of(subject: Subject, section: Eval) -> str:
    """Which of `registry.EVALUATIONS` is meant."""
    if section.speed is not None:
        return "speed"
    if section.harness is not None:
        return "harness"
    if section.task == "auto":
        return "labelled" if subject.task is not None or section.labelled is not None else "text"
    return "labelled" if section.task in TASKS else section.task


def _check_ways(everyone: Sequence[Subject], section: Eval) -> None:
    """Refuse models that are asked different things, and settings that nothing would read.

    Raises:
        UsageError: There are such.
    """
    ways = {way_of(one, section) for one in everyone}
    asked = {one.task.section.task for one in everyone if one.task is not None and section.task == "auto"}
    if len(ways) > 1 or (ways == {"labelled"} and len(asked) > 1):
        said = ", ".join(f"{one.word}: {_asked(one, section)}" for one in everyone)
        raise UsageError(
            f"these models do not learn the same, and cannot be compared ({said})",
            hint="say what to ask: --task text",
        )
    (way,) = ways
    plain = Eval()
    for name in Eval.model_fields:
        if name in (*_COMMON, *EVALUATIONS[way].reads) or getattr(section, name) == getattr(plain, name):
            continue
        able = [other for other, known in EVALUATIONS.items() if name in known.reads]
        raise UsageError(
            f"eval.{name}: {way} goes by no such setting",
            hint=f"leave it out; it goes with {', '.join(able)}",
        )
    if way in ("harness", "speed") and section.task != "auto":
        raise UsageError(f"eval.task: {way} is asked instead of a task", hint="leave eval.task out")


def _asked(subject: Subject, section: Eval) -> str:
    way = way_of(subject, section)
    return subject.task.section.task if way == "labelled" and subject.task is not None else way


def _recipe(loaded: Loaded | None, subject: Subject) -> Recipe:
    """The recipe that says how: the one given, else that of the model's run."""
    about = loaded or subject.trained
    return about.recipe if about is not None else Recipe(llmkit=1)


@contextmanager
def _sharing(alone: bool) -> Iterator[Share]:
    """This process's part of the work, where a launcher started several."""
    world = None if alone else detect_world(os.environ)
    if world is None or world.world_size == 1:
        yield ALONE
        return
    from llmkit.train.devices import join_others, leave, naming_lost_workers

    os.environ.update(world.environment())
    _take_device(world)
    with naming_lost_workers():
        join_others("cpu")  # findings are small, and are gathered on the host
        yield Share(world.rank, world.world_size, gather_everywhere)
        leave()


def _take_device(world: World) -> None:
    """Each process of a machine takes a GPU of its own, where there are any."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())


def _measure(
    subject: Subject,
    everyone: Sequence[Subject],
    section: Eval,
    loaded: Loaded | None,
    options: Options,
    reporter: Reporter,
    share: Share,
) -> tuple[Subject, str, Measurement]:
    way = way_of(subject, section)
    known = EVALUATIONS[way]
    if share.world_size > 1 and not known.shared:
        raise UsageError(
            f"{way} is measured by one process, and there are {share.world_size}",
            hint="leave --processes out",
        )
    recipe = _recipe(loaded, subject)
    about = loaded or subject.trained
    asked = Asked(
        section=section,
        base=base_of(about) if about is not None else Path.cwd(),
        language=recipe.language,
        seed=recipe.seed,
        device=detect_hardware(recipe.machine).device,
        options=options,
        reporter=reporter,
        share=share,
        others=[one for one in everyone if one is not subject],
        held_out_by=everyone[0],
        machine=recipe.machine,
    )
    reporter.phase("eval", str(subject.place))
    measured: Measurement = load(known.code)(subject, asked)
    check_names(section.metrics, measured)
    return subject, way, measured


def _judge(
    measured: Sequence[tuple[Subject, str, Measurement]], against: bool, section: Eval, seed: int
) -> list[_Judged]:
    """Intervals, differences and gates; what the others are compared with comes first, or is what gates name."""
    draws = {"seed": seed, "resamples": section.resamples}
    baseline = measured[-1][2] if against else measured[0][2]
    found = []
    for subject, way, one in measured:
        pairs, why = ([], "") if one is baseline else differences(one, baseline, **draws)
        held = [] if against and one is baseline else check_gates(section.gate, one, baseline)
        warnings = [*one.warnings, *([f"compared without pairs: {why}"] if why else [])]
        ends = dict(intervals_of(one, **draws))
        found.append(_Judged(subject, way, one, ends, pairs, held, warnings, len(measured) > 1))
    return found


def _write(one: _Judged, loaded: Loaded | None, options: Options, section: Eval) -> Path:
    """Leave figures, predictions and a report beside the model's run."""
    about = loaded or one.subject.trained
    folder, measured = _folder(one, about, options, section), one.measured
    with locked(folder):
        if about is not None:
            leave_record(folder, about)
        if measured.predictions:
            rows = (jsonable(row) for row in measured.predictions)
            lines = (json.dumps(row, ensure_ascii=False, default=float, allow_nan=False) for row in rows)
            write_file(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        else:
            remove_file(folder / "predictions.jsonl")
        for name, content in measured.files.items():
            write_json(folder / name, jsonable(content))
        report = write_report(folder, _facts(one, about, options, section))
    if (
        one.subject.trained is not None and not one.subject.step
    ):  # a model of ours: its card says what it is worth
        why = update_card(one.subject.place, report)
        if why:
            one.warnings.append(why)
    return folder


def _facts(one: _Judged, about: Loaded | None, options: Options, section: Eval) -> dict[str, Any]:
    """What the report is made of."""
    measured = one.measured
    plain = dict(measured.figures)
    figures = {
        name: {"value": value, **dict(zip(("low", "high"), one.intervals.get(name, ()), strict=False))}
        for name, value in plain.items()
    }
    return {
        "name": about.recipe.name if about is not None else run_name(one.subject.word),
        "kind": "eval",
        "status": "done",
        "command": options.command,
        "model": {"folder": measured.model},
        "task": measured.task,
        **_dataset(section),
        "data_address": measured.data,
        "best": measured.best,
        "plain": _is_plain(section),
        "sampled": section.rows is not None
        or (section.harness is not None and section.harness.limit is not None),
        "final": {f"eval/{name}": value for name, value in plain.items()},
        "figures": figures,
        "tables": dict(measured.tables),
        "references": dict(measured.tables.get("references", {})),
        "settings": dict(measured.settings),
        "warnings": list(one.warnings),
        "comparison": [difference.to_dict() for difference in one.differences],
        "gates": [gate.to_dict() for gate in one.gates],
    }


def _dataset(section: Eval) -> dict[str, Any]:
    """What the data are called, where they were named."""
    sources = [*(section.data or ()), *([section.labelled] if section.labelled is not None else [])]
    names = [
        one.name or one.dataset or ", ".join(Path(file).name for file in one.files or ()) for one in sources
    ]
    return {"dataset": {"name": ", ".join(names), "type": ", ".join(names)}} if names else {}


def _folder(one: _Judged, about: Loaded | None, options: Options, section: Eval) -> Path:
    """Where the figures go: beside the model's run where it has one, a folder for each thing that is measured.

    `eval/` is for what the run held out; else the name says what was asked and on what, so that nothing is overwritten.
    """
    name = about.recipe.name if about is not None and not one.among_others else run_name(one.subject.word)
    own = one.subject.home or home_of(one.subject.place, options.runs)
    home = own or options.runs / name
    step = f"-{one.subject.step}" if one.subject.step else ""
    stage = one.subject.place.parent.name
    if stage == "pretrain" and (home / "finetune").is_dir():  # `eval` is for what the run ended with
        step = f"-{stage}{step}"
    if one.way in _HELD_OUT and one.measured.settings.get("held_out", False) and _is_plain(section):
        return home / f"eval{step}"
    kind = step if one.way in _HELD_OUT else f"{step}-{one.way}"
    # Of models that no run trained several may have one name.
    place = "" if own is not None else str(one.subject.place.absolute())
    asked = section.model_dump(mode="json", exclude=set(_COMMON))
    about_it = json.dumps(
        [one.measured.data, dict(one.measured.settings), asked, place], sort_keys=True, default=str
    )
    return home / f"eval{kind}-{hashlib.sha256(about_it.encode()).hexdigest()[:8]}"


def _is_plain(section: Eval) -> bool:
    """Whether a model is asked as its run asked it, on all rows."""
    asked, plain = section.model_dump(), Eval().model_dump()
    return all(asked[name] == plain[name] for name in asked if name not in _SAME_FOLDER)


def _result(found: Sequence[_Judged], folders: Sequence[Path], section: Eval) -> Result:
    results = [_summary(one, folder) for one, folder in zip(found, folders, strict=True)]
    summary = dict(results[0])
    if len(found) > 1:
        summary["results"] = results
        summary["comparison"] = [pair.to_dict() for one in found for pair in one.differences]
        summary["over_models"] = _over_models(found)
    failed = [gate for one in found for gate in one.gates if not gate.held]
    return Result(
        folders[0],
        summary,
        _next(found[0]),
        _table(found, section),
        _gate_error(failed) if failed else None,
    )


def _over_models(found: Sequence[_Judged]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each figure over models, such as those of one recipe and several seeds."""
    if len(found) < _SEVERAL:
        return {}
    names = [name for name in found[0].measured.figures if all(name in one.measured.figures for one in found)]
    values = {name: [one.measured.figures[name] for one in found] for name in names}
    return {name: {"mean": mean(some), "deviation": stdev(some)} for name, some in values.items()}


def _summary(one: _Judged, folder: Path) -> dict[str, Any]:
    measured = one.measured
    found: dict[str, Any] = {
        "subject": measured.subject,
        "model": measured.model,
        "task": measured.task,
        "metrics": dict(measured.figures),
        "intervals": {name: list(ends) for name, ends in one.intervals.items()},
        "settings": dict(measured.settings),
        "gates": [gate.to_dict() for gate in one.gates],
        "warnings": list(one.warnings),
        "report": str(folder / "report.html"),
    }
    if measured.predictions:
        found["predictions"] = str(folder / "predictions.jsonl")
    return found


def _table(found: Sequence[_Judged], section: Eval) -> list[tuple[str, ...]]:
    """Figures with their intervals, a column for each model; differences and gates below."""
    first = found[0].measured
    names = section.metrics or [
        name for name in first.shown if any(name in one.measured.figures for one in found)
    ]
    if len(found) == 1:
        rows = [("figure", "value", "95% interval")]
        rows += [(name, _number(name, first.figures.get(name)), _ends(found[0], name)) for name in names]
        return [*(rows if names else []), *_noise_rows(first, names), *_gate_rows(found)]
    spread = _over_models(found)
    table: list[tuple[str, ...]] = [
        ("figure", *(one.subject.word for one in found), *(["mean"] if spread else []))
    ]
    for name in names:
        over = spread.get(name)
        last = (
            [f"{_number(name, over['mean'])}, deviation {_number(name, over['deviation'])}"] if over else []
        )
        figures = [_number(name, one.measured.figures.get(name)) for one in found]
        table.append((name, *figures, *(last if spread and last else [""] * bool(spread))))
    rows = [
        (f"{pair.metric} of {pair.subject}", f"{pair.difference:+.4g}", _p(pair))
        for one in found
        for pair in one.differences
        if pair.metric in names
    ]
    width = len(table[0])
    return [*table, *(_padded(row, width) for row in [*rows, *_ratio_rows(found), *_gate_rows(found)])]


def _padded(row: Sequence[str], width: int) -> tuple[str, ...]:
    """A row of as many cells: what is over stands in the last."""
    cells = [*row[: width - 1], "  ".join(row[width - 1 :])] if len(row) > width else list(row)
    return (*cells, *[""] * (width - len(cells)))


def _noise_rows(measured: Measurement, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """What is left of each figure on damaged text, and how far the copies lie apart."""
    copies = [row for row in measured.tables.get("noise", ()) if isinstance(row["seed"], int)]
    if not copies:
        return []
    typos = f"{copies[0]['typos']:.0%} typos"
    found = []
    for name in names:
        values = [row["metrics"][name] for row in copies if name in row["metrics"]]
        if values:
            apart = f"copies differ by {format_value(name, stdev(values))}" if len(values) > 1 else "one copy"
            found.append((f"{name}, {typos}", _number(name, mean(values)), apart))
    return found


def _ratio_rows(found: Sequence[_Judged]) -> list[tuple[str, str, str]]:
    """How much faster models are than others, where they were timed in turn."""
    return [
        (
            f"{row['model']} against {row['against']}, batch {row['batch']} of {row['length']}",
            f"{row['times_as_fast']:.2f} times",
            f"{row['low']:.2f} to {row['high']:.2f} in rounds",
        )
        for row in found[0].measured.tables.get("speed_ratios", ())
    ]


def _gate_rows(found: Sequence[_Judged]) -> list[tuple[str, str, str]]:
    return [
        (
            f"gate {gate.metric}",
            _number(gate.metric, gate.value),
            f"{'held' if gate.held else 'NOT HELD'}: {gate.said}",
        )
        for one in found
        for gate in one.gates
    ]


def _number(name: str, value: float | None) -> str:
    return "nothing to measure" if value is None else format_value(name, value)


def _ends(one: _Judged, name: str) -> str:
    ends = one.intervals.get(name)
    return "" if ends is None else f"{format_value(name, ends[0])} to {format_value(name, ends[1])}"


def _p(pair: Difference) -> str:
    if pair.p is None:
        return pair.verdict
    return (
        f"{pair.verdict} (p {pair.p:.2g}, {format_number(pair.low or 0)} to {format_number(pair.high or 0)})"
    )


def _gate_error(failed: Sequence[Held]) -> GateError:
    lines = [
        f"{gate.subject}: {gate.metric} is {format_value(gate.metric, gate.value)}, and must be {gate.said}"
        for gate in failed
    ]
    return GateError("; ".join(lines), hint="the report stays; the model was not changed")


def _next(one: _Judged) -> str:
    trained, place = one.subject.trained.recipe if one.subject.trained else None, one.subject.place
    if one.subject.task is not None:
        task = one.subject.task.section
        return try_trained(task.task, str(place.parent.parent), task.prompts)
    if trained is not None and trained.pretrain is not None:
        return try_trained(trained.pretrain.objective, str(place), trained.pretrain.prompts)
    from llmkit.models.build import kind_of

    return try_command(kind_of(str(place)), str(place))
