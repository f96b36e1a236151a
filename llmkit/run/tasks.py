"""Models that were trained for a task, measured on labelled rows or asked about texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import write_file, write_json
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.hardware import detect_hardware
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.schema import Finetune
from llmkit.registry import TASKS
from llmkit.report.console import Reporter
from llmkit.report.formatting import format_number
from llmkit.report.report import write_report
from llmkit.report.trying import try_command
from llmkit.run.folders import CACHE, Options, Result, base_of, find_model, leave_record, locked

if TYPE_CHECKING:
    from llmkit.data.samples import RowStore
    from llmkit.objectives.base import LossModule, Material

_MOST_TOKENS = 4096


@dataclass(frozen=True)
class TaskRun:
    """A run that trained a model for a task.

    Attributes:
        place: The model's folder.
        loaded: The run's recipe.
        facts: What is known of its rows (`data.json`).
        precision: What it computed in.
    """

    place: Path
    loaded: Loaded
    facts: Mapping[str, Any]
    precision: str

    @property
    def section(self) -> Finetune:
        """How the model was trained."""
        section = self.loaded.recipe.finetune
        assert section is not None
        return section

    def material(self) -> "Material":
        """What the task is made of."""
        from llmkit.data.tokenizers import load_tokenizer
        from llmkit.objectives.base import Material

        return Material(
            tokenizer=load_tokenizer(str(self.place)),
            max_length=self.section.model.context,
            labels=tuple(self.facts["labels"]),
            language=self.loaded.recipe.language,
            facts=self.facts,
        )


def task_run(place: Path) -> TaskRun | None:
    """The run around a model folder, if it trained the model for a task on labelled rows."""
    recipe, data, plan = (place.parent / name for name in ("resolved.yaml", "data.json", "plan.json"))
    if not (recipe.is_file() and data.is_file() and plan.is_file()):
        return None
    facts = json.loads(data.read_bytes())
    if "task" not in facts:
        return None
    return TaskRun(place, load_recipe(recipe), facts, str(json.loads(plan.read_bytes())["precision"]))


def evaluate_run(
    run: TaskRun,
    data: Labelled | None,
    base: Path,
    options: Options,
    reporter: Reporter,
    max_rows: int | None,
) -> Result:
    """Measure a model on the rows that its run held out, or on others; what it says of each is kept.

    Args:
        run: The run that trained it.
        data: Other rows; None: those that were held out.
        base: The folder that their paths may start from.
        options: As for every verb.
        reporter: Told what happens.
        max_rows: At most so many rows; None: all.

    Raises:
        DataError: There is nothing to measure on, or a row is wrong.
        MissingError: The rows of the run are gone.
    """
    core, device = _core(run)
    rows, address = _rows(run, core, data, base, options, reporter)
    home = run.place.parent.parent
    folder = home / ("eval" if data is None else f"eval-{address[:8]}")
    lines: list[str] = []
    from llmkit.evaluate.task import evaluate_task
    from llmkit.objectives.base import Predicts

    def keep(number: int, found: Any) -> None:
        row = rows[number]
        said = core.objective.predict(row, found) if isinstance(core.objective, Predicts) else {}
        lines.append(json.dumps({**row, "prediction": said}, ensure_ascii=False, default=float))

    tokens = max(_MOST_TOKENS, run.section.model.context)
    with locked(folder):
        leave_record(folder, run.loaded)
        figures = evaluate_task(core, rows, device=device, tokens=tokens, max_rows=max_rows, keep=keep)
        final = {f"eval/{name}": value for name, value in figures.items()}
        write_file(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(folder / "data.json", {"num_rows": len(rows), "address": address})
        facts = {"name": run.loaded.recipe.name, "kind": "eval", "status": "done", "command": options.command}
        write_report(
            folder, {**facts, "model": {"folder": str(run.place)}, "task": run.section.task, "final": final}
        )
    for name in TASKS[run.section.task].metrics:
        if name in figures:
            reporter.note(f"{name} {format_number(figures[name])}")
    reporter.note(f"predictions: {folder / 'predictions.jsonl'}")
    return Result(
        folder,
        {
            "model": str(run.place),
            "task": run.section.task,
            "metrics": figures,
            "predictions": str(folder / "predictions.jsonl"),
            "report": str(folder / "report.html"),
        },
        try_command(TASKS[run.section.task].model, str(home), run.section.prompts),
    )


def predict(word: str, texts: Sequence[Mapping[str, Any]], *, runs: Path) -> list[dict[str, Any]]:
    """What a model that was trained for a task says of rows.

    Args:
        word: A run, its name, or its model folder.
        texts: Rows in the task's form, without what is asked for.
        runs: The folder of run folders.

    Raises:
        UsageError: The model was not trained for a task that says something of single rows.
        MissingError: There is no such model.
    """
    from llmkit.evaluate.predict import predict as say
    from llmkit.objectives.base import Predicts

    place = find_model(word, runs)
    run = task_run(place)
    if run is None:
        raise UsageError(f"{place}: not a model that a run fine-tuned", hint=f"llmkit generate {word} TEXT")
    core, _ = _core(run)
    if not isinstance(core.objective, Predicts):
        raise UsageError(
            f"{place}: a model trained for {run.section.task} says nothing of single rows",
            hint=f"llmkit generate {word} TEXT, or llmkit eval {word}",
        )
    if run.section.task == "qa" and any("context" not in text for text in texts):
        raise UsageError(
            "a question is answered from a text, and none is given",
            hint=f'llmkit predict {word} "A question?" --other "The text."',
        )
    return say(core, texts)


def _core(run: TaskRun) -> "tuple[LossModule, str]":
    from llmkit.evaluate.task import load_task

    device = detect_hardware(run.loaded.recipe.machine).device
    core = load_task(run.place, run.section, run.material(), device=device, bf16=run.precision == "bf16")
    return core, device


def _rows(
    run: TaskRun, core: "LossModule", data: Labelled | None, base: Path, options: Options, reporter: Reporter
) -> "tuple[RowStore, str]":
    """The rows to measure on, and their address."""
    from llmkit.data.records import fingerprint, read_rows
    from llmkit.data.samples import RowsHeld, Samples
    from llmkit.run.rows import check_labels, measured

    cache, task = options.runs / CACHE, run.section.task
    if data is None:
        address = str(run.facts["address"])
        # Beside the run, wherever `--runs` says that runs are.
        near = [place / CACHE / "rows" / address for place in run.place.absolute().parents]
        folder = next((place for place in [cache / "rows" / address, *near] if place.is_dir()), None)
        if folder is None:
            raise MissingError(
                f"{run.place}: the rows that its run held out are gone (rows/{address} in the cache)",
                hint="give others: --data FILES",
            )
        return Samples(folder, "held_out"), address
    found = read_rows(data, task, base=base, cache=cache, note=reporter.note, training=False)
    _check_form(run, found.form)
    check_labels(found.rows, tuple(run.facts["labels"]), task)
    skip = data.on_error == "skip"
    rows = RowsHeld(measured(core.objective, found.rows, run.section.too_long, skip=skip))
    if not len(rows):
        raise DataError("no row is left to measure on", hint="look at what was left out")
    return rows, fingerprint(data, base, cache=cache)


def _check_form(run: TaskRun, form: str) -> None:
    """Rows are measured as the model learned them: pairs with a score by it, others by what is found.

    Raises:
        DataError: These have a score and those of the run had none, or the other way.
    """
    own = str(run.facts["form"])
    if run.section.task == "embed" and "scored" in (own, form) and own != form:
        raise DataError(
            f"these rows are `{form}`, and the model learned from rows that are `{own}`: they cannot be compared",
            hint="give rows of that form: --data FILES",
        )


def data_for(run: TaskRun, loaded: Loaded | None) -> tuple[Labelled | None, Path]:
    """The rows that a recipe's `eval.data` names, in the form and columns of the run's own; and their base folder."""
    section = loaded.recipe.eval if loaded else None
    if loaded is None or section is None or section.data is None:
        return None, Path.cwd()
    source = section.data[0]
    own = run.section.data
    form = {name: getattr(own, name) for name in ("form", "columns", "header", "separator", "encoding")}
    form["on_error"] = source.on_error
    return Labelled(files=source.files, dataset=source.dataset, split=source.split, **form), base_of(loaded)
