"""A task's rows, in one form: all that the settings name, read, recognised and checked."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from llmkit.data import files, hub
from llmkit.data.inputs import resolve_files
from llmkit.data.places import Fault, Faults, Place, Tally
from llmkit.data.records.classes import labels_of, natural_key
from llmkit.data.records.form import Form, counted
from llmkit.data.records.forms import recognise
from llmkit.data.records.read import as_source, format_of, read_records
from llmkit.data.records.record import Record, Row
from llmkit.data.records.tags import tag_key
from llmkit.errors import DataError
from llmkit.recipe.labelled import Labelled

NUMBER = "score"
"""The one output of a model that was trained for `regression`."""

_READER = 1
"""Part of every fingerprint: raised when the same files come to give other rows."""
_SAMPLE = 1000
_UNUSED = ("name", "files", "on_error")


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        rows: Canonical rows in the order of the files, each with its `place`.
        form: What they were taken for, one of the task's `FORMS`.
        said: The same in words, for a person: `read as ShareGPT, 3.0 turns on average`.
        labels: The classes of `cls` (numbers as numbers, else as texts sort) or the tags of `tag` (`O` first); of
            `regression` the one number's name; of other tasks none.
        classes: How many rows have each of the labels, of `tag` how many tokens have each tag; in their order.
        counts: What else was met, by name: `repaired answers`, `tags inside without a beginning`; none of them 0.
        skipped: What was left out under `on_error: skip`.
    """

    rows: list[Row]
    form: str
    said: str
    labels: tuple[str, ...] = ()
    classes: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: Tally = field(default_factory=Tally)


def read_rows(
    data: Labelled,
    task: str,
    *,
    base: Path,
    cache: Path | None = None,
    note: Callable[[str], None] | None = None,
    training: bool = True,
) -> Found:
    """Read all rows of a task.

    Args:
        data: Where they are.
        task: The task, a key of `registry.TASKS`.
        base: The recipe's folder, in which relative paths are looked for after the current one.
        cache: The cache folder, where standard input is kept.
        note: Told what the rows were taken for, and in a sentence each what was met in them.
        training: Whether they are to be learnt from: then one class alone is an error.

    Raises:
        DataError: Something cannot be read, is of no known form, or a row is wrong and not to be skipped.
        MissingError: A package or data set is missing.
    """
    tally = Tally()
    records = read_records(data, task, base=base, cache=cache, tally=tally)
    sample = list(islice(records, _SAMPLE))
    if not sample:
        raise _nothing(data, tally)
    form = recognise(task, sample, data)
    every = chain.from_iterable(form.expand(record) for record in chain(sample, records))
    rows = list(_made(form, islice(every, data.limit), tally, data.on_error == "skip"))
    if not rows:
        raise _nothing(data, tally)
    if form.finish is not None:
        form.finish(rows)
    classes = count_classes(rows, form.label_key)
    if training and task == "cls":
        _check_several(rows, classes)
    labels = (NUMBER,) if task == "regression" else tuple(classes)
    found = Found(rows, form.name, form.said(rows), labels, classes, +form.counts, tally)
    if note is not None:
        for sentence in _notes(found):
            note(sentence)
    return found


def fingerprint(data: Labelled, base: Path, *, cache: Path | None = None) -> str:
    """SHA-256 of all that decides the rows: the bytes of the files, in order, and the settings used.

    Names and dates of files do not count, but their endings do. The task is to be added to it, for another one
    makes other rows.

    Raises:
        DataError: A file cannot be read.
    """
    settings = {name: value for name, value in data.model_dump().items() if name not in _UNUSED}
    content: list[object] = [_READER, settings]
    resolved = resolve_files(as_source(data), base, cache=cache)
    if data.dataset is not None:
        content += hub.dataset_fingerprint(data.dataset, data.split, base)
    for path in resolved:
        content.append([format_of(path, data, ""), files.ending(path)[1], files.hash_of(path)])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _made(form: Form, records: Iterable[Record], tally: Tally, skip: bool) -> Iterator[Row]:
    """The canonical rows; each that is wrong is an error with its place, or is counted."""
    for where, fields in records:
        try:
            row = form.row(fields)
        except Fault as fault:
            Faults(Place(where, bare_first=True), tally, skip).row(1, fault)
        else:
            row["place"] = where
            yield row


def count_classes(rows: Sequence[Row], key: str) -> dict[str, int]:
    """How many rows have each label, or how many tokens each tag, in their order.

    Args:
        rows: In canonical form.
        key: `label`, `tags`, or nothing where rows have no classes.
    """
    if key == "label":
        often = Counter(label for row in rows for label in labels_of(row))
        return {label: often[label] for label in sorted(often, key=natural_key)}
    if key:
        often = Counter(label for row in rows for label in row[key])
        return {label: often[label] for label in sorted(often, key=tag_key)}
    return {}


def _check_several(rows: Sequence[Row], classes: Mapping[str, int]) -> None:
    if len(classes) > 1 or (classes and isinstance(rows[0]["label"], list)):
        return
    what = (
        f"all {len(rows):,} rows have the label {next(iter(classes))!r}" if classes else "no row has a label"
    )
    raise DataError(
        f"{rows[0]['place']}: {what}, so there is nothing to tell apart",
        hint="add rows of another class, or name another column: `columns: {label: ...}`",
    )


def _notes(found: Found) -> Iterator[str]:
    yield f"{found.said}; {counted(len(found.rows), 'row')}"
    for name, count in found.counts.items():
        yield f"{name}: {count:,}"
    for reason, count in {**found.skipped.skipped_rows, **found.skipped.skipped_files}.items():
        first = next(example for example in found.skipped.examples if example.reason == reason)
        yield f"skipped {count:,}: {reason}, such as {first.where}"


def _nothing(data: Labelled, tally: Tally) -> DataError:
    source = data.name or data.dataset or ", ".join(data.files or [])
    if not tally.num_skipped:
        return DataError(f"{source}: there are no rows", hint="name files with rows in `files:`")
    reasons = [
        f"{count:,}: {reason}" for reason, count in {**tally.skipped_rows, **tally.skipped_files}.items()
    ]
    first = tally.examples[0]
    what = f"{first.where}: {first.what}" if first.number is not None else first.what
    return DataError(
        f"{source}: no row can be used ({'; '.join(reasons)}); the first: {what}", hint=first.hint
    )
