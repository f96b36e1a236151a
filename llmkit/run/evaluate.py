"""`llmkit eval`: models measured, compared, and held against what must be."""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from llmkit.durable import remove_file, write_file, write_json
from llmkit.errors import UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.evaluate.sharing import ALONE, Share, gather_everywhere
from llmkit.evaluate.verdict import check_gates, check_names, differences, few_items, intervals_of
from llmkit.hardware import detect_elsewhere
from llmkit.launch.world import World, detect_world
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.schema import Eval, Recipe
from llmkit.registry import EVALUATIONS, TASKS, load
from llmkit.report.console import Reporter
from llmkit.report.formatting import jsonable
from llmkit.report.report import write_report
from llmkit.report.results import update_card
from llmkit.report.trying import try_command, try_trained
from llmkit.run.checkpoints import exported_checkpoint, is_checkpoint
from llmkit.run.folders import (
    STEP,
    Options,
    Result,
    base_of,
    find_model,
    home_of,
    leave_record,
    locked,
    refuse_variants,
)
from llmkit.run.foreign import home_of_foreign, model_name
from llmkit.run.judged import Judged, gate_error, over_models, summary, table
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.measure.known import check_asked
from llmkit.run.tasks import task_run

_COMMON = ("model", "task", "metrics", "resamples", "gate")
"""Settings of every evaluation; they change nothing in what is asked."""
_SAME_FOLDER = (*_COMMON, "reference")
_LIMITED = ("harness", "rows")
"""What has a setting of its own for at most so many."""
_HELD_OUT = ("text", "labelled")
"""What measures on what the model's run held out, where nothing else is named."""


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
    given = [target] if isinstance(target, str) else target
    section, subjects, against = chosen(given, loaded, lambda word: find_subject(word, options, reporter))
    everyone = [*subjects, *([against] if against is not None else [])]
    with _sharing(alone) as share:
        measured = [_measure(one, everyone, section, loaded, options, reporter, share) for one in everyone]
    if share.rank:
        return Result(Path(), {}, "")
    found = _judge(measured, bool(against), section, recipe_of(loaded, subjects[0]).seed)
    folders = [_write(one, loaded, options, section) for one in found]
    for one, folder in zip(found, folders, strict=True):
        reporter.note(f"report: {folder / 'report.html'}")
        few = few_items(one.measured, section.resamples)
        for warning in one.warnings:
            tell = reporter.note if warning in few else reporter.warn  # nothing is wrong with few
            tell(f"{one.subject.word}: {warning}" if len(found) > 1 else warning)
    return _result(found, folders, section, options.runs)


def chosen(
    target: Sequence[str] | None, loaded: Loaded | None, find: Callable[[str], Subject]
) -> tuple[Eval, list[Subject], Subject | None]:
    """How is measured, the models, and the one that they are held against; see `evaluate`.

    Args:
        target: Runs or model folders; None: the one that `loaded` names or made.
        loaded: A recipe, or None.
        find: A word -> the model that a person named.

    Raises:
        UsageError: What is asked does not fit.
        MissingError: There is no such model.
    """
    if loaded is not None:
        refuse_variants(loaded)
    section = (loaded.recipe.eval if loaded else None) or Eval()
    words = list(target or ()) or [section.model or (loaded.recipe.name if loaded else "")]
    subjects = list(map(find, words))
    against = find(section.gate.against) if section.gate.against else None
    everyone = [*subjects, *([against] if against is not None else [])]
    _check_ways(everyone, section)
    check_asked(everyone, section, way_of(everyone[0], section))
    return section, subjects, against


def find_subject(word: str, options: Options, reporter: Reporter) -> Subject:
    """The model that a person named, and what is known of it; of a checkpoint, its model.

    Raises:
        MissingError: There is no such model.
        CorruptError: The checkpoint is damaged.
    """
    checkpoint = Path(word)
    if not is_checkpoint(checkpoint):
        return subject_at(word, find_model(word, options.runs, adapters=True))
    place = exported_checkpoint(checkpoint, options, reporter)
    home = checkpoint.parent.parent.parent
    return replace(subject_at(word, place), home=home, step=checkpoint.name)


def subject_at(word: str, place: Path) -> Subject:
    """A model folder, and what is known of it."""
    recipe, plan = place.parent / "resolved.yaml", place.parent / "plan.json"
    precision = str(json.loads(plan.read_bytes())["precision"]) if plan.is_file() else "fp32"
    trained = load_recipe(recipe) if recipe.is_file() else None
    section = (trained.recipe.finetune or trained.recipe.pretrain) if trained else None
    trusted = section.model.trust_remote_code if section is not None else False
    home = (
        place.parent if (place.parent / STEP).is_file() else None
    )  # figures of a compressed model are its own
    return Subject(word, place, trained, task_run(place), precision, trusted, home)


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
        said = ", ".join(f"{one.word}: {asked_of(one, section)}" for one in everyone)
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
        other = f"its tasks have eval.harness.limit={section.rows}" if (way, name) == _LIMITED else ""
        raise UsageError(
            f"eval.{name}: {way} goes by no such setting",
            hint=other or f"leave it out; it goes with {', '.join(able)}",
        )
    if way in ("harness", "speed") and section.task != "auto":
        raise UsageError(f"eval.task: {way} is asked instead of a task", hint="leave eval.task out")


def asked_of(subject: Subject, section: Eval) -> str:
    """What a model is asked, in a word: its task, or the way."""
    way = way_of(subject, section)
    return subject.task.section.task if way == "labelled" and subject.task is not None else way


def recipe_of(loaded: Loaded | None, subject: Subject) -> Recipe:
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
    recipe = recipe_of(loaded, subject)
    about = loaded or subject.trained
    asked = Asked(
        section=section,
        base=base_of(about) if about is not None else Path.cwd(),
        language=recipe.language,
        seed=recipe.seed,
        device=detect_elsewhere(recipe.machine, "eval", reporter.note).device,
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
) -> list[Judged]:
    """Intervals, differences and gates; what the others are compared with comes first, or is what gates name."""
    draws = {"seed": seed, "resamples": section.resamples}
    baseline = measured[-1][2] if against else measured[0][2]
    found = []
    for subject, way, one in measured:
        pairs, why = ([], "") if one is baseline else differences(one, baseline, **draws)
        held = [] if against and one is baseline else check_gates(section.gate, one, baseline)
        warnings = [*one.warnings, *few_items(one, section.resamples)]
        if why and way != "speed":  # models that are timed have ratios within rounds
            warnings.append(f"compared without pairs: {why}")
        ends = dict(intervals_of(one, **draws))
        found.append(Judged(subject, way, one, ends, pairs, held, warnings, len(measured) > 1))
    return found


def _write(one: Judged, loaded: Loaded | None, options: Options, section: Eval) -> Path:
    """Leave figures, predictions and a report beside the model's run."""
    about = loaded or one.subject.trained
    folder, measured = _folder(one, loaded, options, section), one.measured
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
        report = write_report(folder, _facts(one, loaded, options, section))
    if (
        one.subject.trained is not None and not one.subject.step
    ):  # a model of ours: its card says what it is worth
        why = update_card(one.subject.place, report)
        if why:
            one.warnings.append(why)
    return folder


def _facts(one: Judged, loaded: Loaded | None, options: Options, section: Eval) -> dict[str, Any]:
    """What the report is made of."""
    measured = one.measured
    plain = dict(measured.figures)
    figures = {
        name: {"value": value, **dict(zip(("low", "high"), one.intervals.get(name, ()), strict=False))}
        for name, value in plain.items()
    }
    return {
        "name": _name(one, loaded, options),
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


def _name(one: Judged, loaded: Loaded | None, options: Options) -> str:
    """What the model is called: as the one recipe says that was written for it, as its run is, or by its folder."""
    if _is_written(loaded) and not one.among_others:
        return loaded.recipe.name
    if one.subject.trained is not None:
        return one.subject.trained.recipe.name
    if one.subject.home is not None:
        return model_name(one.subject.word)
    return home_of_foreign(one.subject.place, options.runs).name


def _is_written(loaded: Loaded | None) -> TypeGuard[Loaded]:
    """Whether a person wrote the recipe, with a name for what it is about."""
    return loaded is not None and loaded.path is not None


def _folder(one: Judged, loaded: Loaded | None, options: Options, section: Eval) -> Path:
    """Where the figures go: beside the model's run where it has one, a folder for each thing that is measured.

    `eval/` is for what the run held out; else the name says what was asked and on what, so that nothing is overwritten.
    """
    own = one.subject.home or home_of(one.subject.place, options.runs)
    if own is None and _is_written(loaded) and not one.among_others:
        home = options.runs / loaded.recipe.name
    else:
        home = own or home_of_foreign(one.subject.place, options.runs)
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


def _result(found: Sequence[Judged], folders: Sequence[Path], section: Eval, runs: Path) -> Result:
    results = [summary(one, folder) for one, folder in zip(found, folders, strict=True)]
    told = dict(results[0])
    if len(found) > 1:
        told["results"] = results
        told["comparison"] = [pair.to_dict() for one in found for pair in one.differences]
        told["over_models"] = over_models(found)
    failed = [gate for one in found for gate in one.gates if not gate.held]
    failure = gate_error(failed) if failed else None
    return Result(folders[0], told, _next(found[0], runs), table(found, section), failure)


def _next(one: Judged, runs: Path) -> str:
    trained, place = one.subject.trained.recipe if one.subject.trained else None, one.subject.place
    if one.subject.task is not None:
        task = one.subject.task.section
        return try_trained(task.task, str(place.parent.parent), task.prompts)
    if trained is not None and trained.pretrain is not None:
        return try_trained(trained.pretrain.objective, str(place), trained.pretrain.prompts)
    from llmkit.models.build import kind_of

    kind = kind_of(str(place))
    if kind in (
        "detector",
        "encoder",
        "answers",
    ):  # without a run nothing was held out, and none of them writes
        return shlex.join(["llmkit", "runs", *(["--runs", str(runs)] if runs != Path("runs") else [])])
    return try_command(kind, str(place))
