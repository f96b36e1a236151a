"""The labelled rows to measure on: those that a run held out, or others, read as the task reads them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.schema import Eval
from llmkit.registry import nearest
from llmkit.run.folders import CACHE
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.tasks import TaskRun

if TYPE_CHECKING:
    from llmkit.data.records import Found
    from llmkit.data.samples import LabelledRow, RowStore, Samples
    from llmkit.objectives.base import LossModule, Objective

_MOST_NAMED = 10
_LABELLED = {"cls": "label", "tag": "tags"}
"""The tasks with classes, and where a row has its own."""


@dataclass(frozen=True)
class Rows:
    """What to measure on.

    Attributes:
        task: The rows' task.
        store: The rows as the model reads them.
        whole: The same before they were cut into windows.
        address: What they are: equal for equal rows, whatever the model.
        held_out: Whether they are those that the model's own run held out.
        too_long: The word for rows that are longer than the model reads.
        tokens: Tokens computed together, where training's own evaluation is to be met to the last bit.
        warnings: What a person should know of them.
    """

    task: str
    store: "RowStore"
    whole: "Sequence[LabelledRow]"
    address: str
    held_out: bool
    too_long: str
    tokens: int | None = None
    warnings: Sequence[str] = ()


def rows_of(run: TaskRun, subject: Subject, asked: Asked, core: "LossModule") -> Rows:
    """The rows that the `eval` section names, else those that a run held out.

    Raises:
        UsageError: Nothing says what to measure on.
        DataError: A row is wrong, or no row is left.
        MissingError: The rows that were held out are gone.
    """
    data = data_of(run, asked)
    if data is not None:
        return _read(run, subject, data, asked, core)
    holder = asked.held_out_by or subject
    if holder is not subject and holder.task is not None:
        return _of_another(run, holder.task, asked, core)
    if subject.task is None or run is not subject.task:
        raise UsageError(
            f"{subject.word}: nothing says what to measure it on",
            hint="give labelled rows: --data FILES",
        )
    return _held_out(run, asked, core)


def data_of(run: TaskRun, asked: Asked) -> Labelled | None:
    """The rows that the section names; `data` is in the form and columns of the run's own."""
    section = asked.section
    if section.labelled is not None:
        return section.labelled
    if section.data is None:
        return None
    if len(section.data) > 1:
        raise UsageError(
            f"eval.data names {len(section.data)} sources, and labelled rows come from one",
            hint="give all files to one source: `data: {files: [a.csv, b.csv]}`",
        )
    source, own = section.data[0], run.section.data
    form = {name: getattr(own, name) for name in ("form", "columns", "header", "separator", "encoding")}
    return Labelled(
        files=source.files, dataset=source.dataset, split=source.split, on_error=source.on_error, **form
    )


def _held_out(run: TaskRun, asked: Asked, core: "LossModule") -> Rows:
    samples, address = _samples(run, asked.options.runs)
    if not len(samples):
        raise DataError(
            f"{run.place}: its run held out no row, so there is nothing to measure on",
            hint="give others: --data FILES",
        )
    whole = whole_rows(core.objective, samples)
    tokens = int(run.plan.get("micro_batch_tokens", 0)) or None
    return Rows(run.section.task, samples, whole, address, True, run.section.too_long, tokens, _shared(run))


def _shared(run: TaskRun) -> list[str]:
    count = int(run.facts.get("shared", 0))
    return [f"{count:,} held-out rows are also among those that the model learned from"] if count else []


def train_rows(run: TaskRun, runs: Path) -> "RowStore":
    """The rows that a run learned from.

    Raises:
        MissingError: They are gone.
    """
    from llmkit.data.samples import Samples

    return Samples(_samples(run, runs)[0].folder, "train")


def _samples(run: TaskRun, runs: Path) -> "tuple[Samples, str]":
    from llmkit.data.samples import Samples

    address = str(run.facts["address"])
    # Beside the run, wherever `--runs` says that runs are.
    places = [runs / CACHE, *(place / CACHE for place in run.place.absolute().parents)]
    folder = next((place / "rows" / address for place in places if (place / "rows" / address).is_dir()), None)
    if folder is None:
        raise MissingError(
            f"{run.place}: the rows that its run held out are gone (rows/{address} in the cache)",
            hint="give others: --data FILES",
        )
    return Samples(folder, "held_out"), address


def whole_rows(objective: "Objective", store: "RowStore") -> "list[LabelledRow]":
    """The rows as they were before they were cut into windows."""
    from llmkit.objectives.detail import Regroups

    parts: dict[int, list[LabelledRow]] = {}
    for number, group in enumerate(store.groups.tolist()):
        parts.setdefault(group, []).append(store[number])
    if isinstance(objective, Regroups):
        return [objective.whole(some) for some in parts.values()]
    return [some[0] for some in parts.values()]


def _of_another(run: TaskRun, holder: TaskRun, asked: Asked, core: "LossModule") -> Rows:
    """The rows that another model's run held out, as this model reads them."""
    from llmkit.data.samples import RowsHeld
    from llmkit.run.rows import measured

    if holder.section.task != run.section.task:
        raise UsageError(
            f"{holder.place} was trained for {holder.section.task}, and {run.place} for {run.section.task}: "
            "they have no rows in common",
            hint="compare models of one task",
        )
    samples, address = _samples(holder, asked.options.runs)
    check_form(run, str(holder.facts["form"]))
    whole = whole_rows(core.objective, samples)
    check_labels(whole, run)
    store = RowsHeld(measured(core.objective, whole, run.section.too_long))
    same = address == run.facts.get("address")
    warnings = (
        [] if same else ["the rows were held out by another run: this one may have learned from some of them"]
    )
    return Rows(run.section.task, store, whole, address, False, run.section.too_long, warnings=warnings)


def _read(run: TaskRun, subject: Subject, data: Labelled, asked: Asked, core: "LossModule") -> Rows:
    """Rows from files."""
    from llmkit.data.records import fingerprint
    from llmkit.data.samples import RowsHeld
    from llmkit.run.rows import measured

    found, task, cache = read(run.section.task, data, asked), run.section.task, asked.options.runs / CACHE
    check_form(run, found.form)
    check_labels(found.rows, run)
    made = measured(core.objective, found.rows, run.section.too_long, skip=data.on_error == "skip")
    store = RowsHeld(made)
    if not len(store):
        raise DataError("no row is left to measure on", hint="look at what was left out")
    left = made.num_unusable + made.num_dropped
    warnings = [f"{left:,} of {len(found.rows):,} rows cannot be used and were left out"] if left else []
    warnings += [*_skipped(found), *_learned_from(subject, found.rows, asked, core)]
    address = hashlib.sha256(
        json.dumps([task, fingerprint(data, asked.base, cache=cache)]).encode()
    ).hexdigest()[:32]
    return Rows(task, store, found.rows, address, False, run.section.too_long, warnings=warnings)


def _learned_from(
    subject: Subject, rows: "Sequence[LabelledRow]", asked: Asked, core: "LossModule"
) -> list[str]:
    """How many of some rows the model's own run learned from, as far as its rows are still there."""
    from llmkit.data.records import num_shared

    run = subject.task
    if run is None or asked.section.task not in ("auto", run.section.task):
        return []
    try:
        learned = whole_rows(core.objective, train_rows(run, asked.options.runs))
    except MissingError:
        return []
    count = num_shared(learned, rows, run.section.task)
    return (
        [f"{count:,} of the {len(rows):,} rows are among those that the model learned from"] if count else []
    )


def _skipped(found: "Found") -> list[str]:
    """What the reader left out under `on_error: skip`, which is not among the rows."""
    tally = found.skipped
    if not tally.num_skipped:
        return []
    reasons = [
        f"{reason} ({count:,})" for reason, count in {**tally.skipped_rows, **tally.skipped_files}.items()
    ]
    what = "rows" if not tally.skipped_files else "rows and files"
    return [
        f"{tally.num_skipped:,} {what} were skipped, beside {len(found.rows):,} rows that were read: "
        f"{', '.join(reasons)}; the first: {tally.examples[0].where}"
    ]


def read(task: str, data: Labelled, asked: Asked, *, told: bool = True) -> "Found":
    """The rows of a source.

    Args:
        task: What they are for.
        data: Where they are.
        asked: Where from paths start, and who is told.
        told: Tell what the rows were taken for.

    Raises:
        DataError: They are of no known form; says which columns there are, and how to say which is which.
    """
    from llmkit.data.records import read_rows

    cache = asked.options.runs / CACHE
    note = asked.reporter.note if told else None
    with naming_settings(asked.section):
        return read_rows(data, task, base=asked.base, cache=cache, note=note, training=False)


@contextmanager
def naming_settings(section: Eval) -> Iterator[None]:
    """Let what is wrong with rows say how the `eval` section, or the words of a command, help."""
    try:
        yield
    except DataError as error:
        key = "eval.data" if section.data is not None else "eval.labelled"
        hint = error.hint.replace("`on_error: skip`", f"`{key}.on_error=skip`")
        if "columns: {" in hint:
            hint += (
                " Here: `eval: {labelled: {files: ..., columns: ...}}` in a recipe, or "
                "eval.labelled.files=FILES eval.labelled.columns.ROLE=NAME"
            )
        if hint == error.hint:
            raise
        raise type(error)(error.message, hint=hint) from error


def check_form(run: TaskRun, form: str) -> None:
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


def check_labels(rows: Sequence[Mapping[str, Any]], run: TaskRun) -> None:
    """Every label is one that the model can say.

    Raises:
        DataError: Some are not: names them, how many rows have them, and what the model says instead.
    """
    key, known = _LABELLED.get(run.section.task), tuple(run.facts["labels"])
    if key is None:
        return
    places: dict[str, str] = {}
    counts = Counter[str]()
    for row in rows:
        value = row[key]
        for label in {value} if isinstance(value, str) else set(value):
            if label not in known:
                counts[label] += 1
                places.setdefault(label, str(row["place"]))
    if counts:
        raise _unknown(counts, places, known, len(rows))


def _unknown(counts: Counter[str], places: Mapping[str, str], known: Sequence[str], total: int) -> DataError:
    some = counts.most_common(_MOST_NAMED)
    told = ", ".join(f"{label!r} ({count:,} rows)" for label, count in some)
    more = f" and {len(counts) - len(some)} more" if len(counts) > len(some) else ""
    pairs = [(label, nearest(label, known)) for label, _ in some]
    near = [f"{guess!r} for {label!r}" for label, guess in pairs if guess is not None]
    names = ", ".join(known[:_MOST_NAMED]) + (", ..." if len(known) > _MOST_NAMED else "")
    first = some[0][0]
    column = "" if near else "; if the labels are in another column: eval.labelled.columns.label=NAME"
    return DataError(
        f"{places[first]}: the model has no label {first!r}; of {total:,} rows it does not know {told}{more}",
        hint=f"it says {names}" + (f"; perhaps the rows mean {', '.join(near)}" if near else column),
    )
