"""How well a model does its task: on the rows that its run held out, or on others, with what went wrong.

Shape suffix: I items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.errors import UsageError
from llmkit.evaluate.measurement import Figures, Items, Measurement
from llmkit.metrics.inputs import Integers
from llmkit.registry import TASKS
from llmkit.run.foreign import foreign_run
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.measure.labels import Rows, rows_of
from llmkit.run.tasks import TaskRun, load_core

if TYPE_CHECKING:
    from llmkit.evaluate.task import Findings
    from llmkit.objectives.base import LossModule
    from llmkit.objectives.detail import Detail

_MOST_TOKENS = 4096
_MOST_ERRORS = 50
_MANY_UNKNOWN = 0.05


@dataclass(frozen=True)
class _Losses:
    """What each item adds to the loss."""

    total_I: Any
    targets_I: Any
    hits_I: Any | None
    perplexity: bool

    def figures(self, items: Integers) -> dict[str, float]:
        targets = self.targets_I[items].sum()
        if not targets:
            return {}
        loss = float(self.total_I[items].sum() / targets)
        found = {"loss": loss}
        if self.perplexity:
            found["perplexity"] = float(np.exp(min(loss, 700.0)))
        if self.hits_I is not None:
            found["accuracy"] = float(self.hits_I[items].sum() / targets)
        return found


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Measure a model on labelled rows.

    Raises:
        UsageError: The model cannot do the task, or nothing says what to measure it on.
        DataError: There is nothing to measure on, or a row is wrong.
        MissingError: The rows of the run are gone.
    """
    from llmkit.evaluate.task import measure_rows

    run = _run(subject, asked)
    core, device = load_core(run)
    rows = rows_of(run, subject, asked, core)
    tokens = rows.tokens or max(_MOST_TOKENS, run.section.model.context)
    unknown = _unknown_id(run)
    made = measure_rows(
        core,
        rows.store,
        device=device,
        tokens=tokens,
        max_rows=asked.section.rows,
        unknown=unknown,
        share=asked.share,
    )
    detail = _detail(core, rows, made)
    noise = _noise(core, rows, asked, device, tokens, made) if asked.section.noise.typos else {}
    lines = _lines(detail, rows, made)
    goal = TASKS[run.section.task]
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task=run.section.task,
        data=rows.address,
        figures=made.figures,
        shown=[name for name in goal.metrics if name in made.figures],
        best=goal.best if goal.best in made.figures else "loss",
        items=_items(detail, made),
        tables={**detail.tables, "errors": _errors(detail, lines), **noise},
        settings={
            "held_out": rows.held_out,
            "rows": len(detail.keys),
            "precision": subject.precision,
            "context": run.section.model.context,
            **run.said,
        },
        predictions=lines,
        warnings=[*detail.warnings, *_warnings(asked, rows, made)],
        files={
            **detail.files,
            "data.json": {"num_rows": len(rows.store), "address": rows.address},
        },
    )


def _run(subject: Subject, asked: Asked) -> TaskRun:
    """The run around the model, or what stands for one."""
    wanted = asked.section.task
    if subject.task is not None and wanted in ("auto", subject.task.section.task):
        return subject.task
    if wanted not in TASKS:
        raise UsageError(
            f"{subject.word}: no run fine-tuned it for a task, and nothing says what the rows are for",
            hint="say what it is asked: --task cls, or another of " + ", ".join(TASKS),
        )
    return foreign_run(subject, wanted, asked)


def _unknown_id(run: TaskRun) -> int | None:
    """The token that stands for what the tokenizer does not know, where it stands for nothing else."""
    tokenizer = run.material().tokenizer
    other = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in (None, *other) else int(tokenizer.unk_token_id)


def _detail(core: "LossModule", rows: Rows, made: "Findings") -> "Detail":
    from llmkit.objectives.detail import Detail, Details

    some = [rows.store[number] for number in made.numbers]
    if isinstance(core.objective, Details):
        return core.objective.detail(some, made.found)
    lines = [{"input": {name: value for name, value in row.items() if name != "place"}} for row in some]
    return Detail([row["place"] for row in some], range(len(some)), lambda _: {}, lines)


def _items(detail: "Detail", made: "Findings") -> Items | None:
    """The figures of any items: those that the task counts, and the loss, where it is made of rows."""
    losses = _losses(detail, made)

    def figures(items: Integers) -> Figures:
        return {**(losses.figures(items) if losses is not None else {}), **detail.figures(items)}

    known = [name for name in figures(np.arange(len(detail.keys))) if name in made.figures]
    if not known:
        return None
    return Items(detail.keys, lambda items: _only(known, figures(items)), detail.right)


def _only(names: Sequence[str], figures: Figures) -> Figures:
    return {name: figures[name] for name in names if name in figures}


def _losses(detail: "Detail", made: "Findings") -> _Losses | None:
    losses = made.losses
    if losses is None:
        return None
    owner_R, size = np.asarray(detail.owner), len(detail.keys)
    whole = owner_R >= 0

    def added(values_R: Any) -> Any:
        return np.bincount(owner_R[whole], weights=values_R[whole], minlength=size)

    hits_I = None if losses.hits_R is None else added(losses.hits_R)
    return _Losses(added(losses.total_R), added(losses.targets_R), hits_I, "perplexity" in made.figures)


def _lines(detail: "Detail", rows: Rows, made: "Findings") -> list[dict[str, Any]]:
    """A line for each item: where it is, what was asked, what is right, what was said."""
    losses = _losses(detail, made)
    firsts = dict(zip(reversed(detail.owner), reversed(made.numbers), strict=True))
    lines = []
    for number, line in enumerate(detail.lines):
        one = {"place": rows.store[firsts[number]]["place"], **line}
        if losses is not None and losses.targets_I[number]:
            one["loss"] = float(losses.total_I[number] / losses.targets_I[number])
        lines.append(one)
    return lines


def _errors(detail: "Detail", lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items that went most wrong; where the task does not say which those are, those of the largest loss."""
    order = detail.errors
    if order is None:
        order = sorted(range(len(lines)), key=lambda number: -lines[number].get("loss", 0.0))
    return [
        {
            "place": line["place"],
            "text": line["input"],
            "target": line.get("target"),
            "prediction": line.get("prediction"),
            "score": line.get("score", line.get("loss")),
        }
        for line in (lines[number] for number in order[:_MOST_ERRORS])
    ]


def _warnings(asked: Asked, rows: Rows, made: "Findings") -> list[str]:
    said = list(rows.warnings)
    if asked.section.rows is not None:
        said.append(f"measured on {asked.section.rows:,} rows at most; a run's own last evaluation takes all")
    if made.num_unknown > _MANY_UNKNOWN * made.num_tokens:
        row = rows.store[made.unknown_row]
        said.append(
            f"{made.num_unknown / made.num_tokens:.0%} of the tokens are unknown to the tokenizer, most of them in "
            f"{row['place']}: the figures say little of the model"
        )
    return said


def _noise(
    core: "LossModule", rows: Rows, asked: Asked, device: str, tokens: int, plain: "Findings"
) -> dict[str, Any]:
    """Figures on damaged copies of the rows, beside those on the rows as they are."""
    from llmkit.data.samples import RowsHeld
    from llmkit.evaluate.noise import Damage
    from llmkit.evaluate.task import measure_rows
    from llmkit.run.rows import measured

    wanted = asked.section.noise
    damage = Damage(rows.task, rows.whole, share=float(wanted.typos), seed=asked.seed)
    table: list[dict[str, Any]] = [{"typos": 0.0, "seed": None, "metrics": dict(plain.figures)}]
    for copy in range(wanted.seeds):
        asked.reporter.phase("eval", f"damaged copy {copy + 1} of {wanted.seeds}")
        store = RowsHeld(measured(core.objective, damage.rows(copy), rows.too_long, skip=True))
        made = measure_rows(
            core, store, device=device, tokens=tokens, max_rows=asked.section.rows, share=asked.share
        )
        table.append({"typos": damage.share, "seed": copy, "metrics": dict(made.figures)})
    return {"noise": [*table, *_spread(table[1:], damage.share)]}


def _spread(copies: Sequence[Mapping[str, Any]], typos: float) -> list[dict[str, Any]]:
    """Mean and standard deviation over several copies."""
    if len(copies) < 2:
        return []
    names = [name for name in copies[0]["metrics"] if all(name in copy["metrics"] for copy in copies)]
    values = {name: np.array([copy["metrics"][name] for copy in copies]) for name in names}
    mean = {name: float(some.mean()) for name, some in values.items()}
    deviation = {name: float(some.std(ddof=1)) for name, some in values.items()}
    return [
        {"typos": typos, "seed": "mean", "metrics": mean},
        {"typos": typos, "seed": "deviation", "metrics": deviation},
    ]
