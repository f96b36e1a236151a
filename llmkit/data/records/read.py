"""Files and data sets as records, one at a time: what stands in a row and exactly where it was found."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from llmkit.data import cuts, files, hub, tables, text
from llmkit.data.inputs import resolve_files
from llmkit.data.places import Fault, Faults, FileFault, Place, Tally
from llmkit.data.records.conll import conll_records
from llmkit.data.records.record import Record
from llmkit.data.records.separated import csv_fields, table_records, tsv_fields
from llmkit.data.remote import RemoteFile
from llmkit.errors import DataError
from llmkit.hub import network_errors
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.schema import Source

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2", ".bioes", ".conllu"), "conll"),
}
_PARQUET_ROWS = 256


def read_records(
    data: Labelled, task: str, *, base: Path, cache: Path | None, tally: Tally
) -> Iterator[Record]:
    """All records, in the order of the files.

    Args:
        data: Where they are.
        task: Their task: tells how a `.txt` file is written.
        base: The recipe's folder.
        cache: Where standard input is kept.
        tally: Counts what was read and skipped.

    Raises:
        DataError: Something cannot be read or is not of the stated form.
        MissingError: A package or data set is missing.
    """
    if data.dataset is not None:
        resolve_files(as_source(data), base, cache=cache)  # says so where `files` is named too
        yield from _of_dataset(data, base, tally)
        return
    for path in resolve_files(as_source(data), base, cache=cache):
        try:
            yield from _of_file(path, data, task, tally)
        except FileFault as fault:
            Faults(Place(files.shown(path)), tally, data.on_error == "skip").file(fault)


def as_source(data: Labelled) -> Source:
    """The same place, as text is read from it."""
    return Source(files=data.files, dataset=data.dataset, split=data.split, name=data.name)


def format_of(path: files.File, data: Labelled, task: str) -> str:
    """How a file is written, as far as its name and the task tell; `text` also for what may turn out to be a table."""
    if data.format != "auto":
        return data.format
    return _FORMATS.get(files.ending(path)[0], "conll" if task == "tag" else "text")


def _of_file(path: files.File, data: Labelled, task: str, tally: Tally) -> Iterator[Record]:
    if files.size_of(path) == 0 and not (isinstance(path, RemoteFile) and path.size is None):
        tally.empty_files += 1
        return
    form, skip, name = format_of(path, data, task), data.on_error == "skip", files.shown(path)
    if form == "parquet":
        yield from _of_parquet(path, tally)
        return
    mark = skip and cuts.is_cuttable(data.encoding)
    chunks = text.decode(files.read_chunks(path, tally), data.encoding, name, mark=mark)
    faults = Faults(Place(name), tally, skip, mark)
    if data.format == "auto" and files.ending(path)[0] not in _FORMATS:
        form, chunks = _by_its_beginning(chunks, form)
    if form == "json":
        yield from _of_json("".join(chunks), name, faults)
    elif form == "jsonl":
        yield from _of_lines(chunks, name, faults)
    elif form == "conll":
        yield from conll_records(chunks, name, faults)
    elif form == "csv":
        yield from table_records(csv_fields(chunks, faults), data, task, faults)
    elif form == "tsv":
        yield from table_records(tsv_fields(chunks, faults), data, task, faults)
    else:
        yield from _of_text(chunks, faults)


def _by_its_beginning(chunks: Iterator[str], form: str) -> tuple[str, Iterator[str]]:
    """How a file is written whose name does not tell: objects a line, fields between tabs, or as it was thought."""
    first = next(chunks, "")
    line = first.partition("\n")[0]
    if line.startswith('{"') and line.rstrip().endswith("}"):
        form = "jsonl"
    elif form == "text" and "\t" in line:
        form = "tsv"
    return form, chain([first], chunks)


def _of_text(chunks: Iterable[str], faults: Faults) -> Iterator[Record]:
    """A row a line."""
    for number, line in text.line_documents(chunks, faults):
        yield Record(faults.place.show(number), {"text": line})


def _of_lines(chunks: Iterable[str], name: str, faults: Faults) -> Iterator[Record]:
    """An object a line."""
    parse = tables._json_parser()
    for first, found in tables._line_lists(chunks, faults):
        for number, line in enumerate(found, first):
            try:
                value = parse(line)
            except (StopIteration, ValueError, RecursionError):
                value = None
            if type(value) is dict and not faults.marked:
                yield Record(f"{name}:{number}", value)
            elif line and not line.isspace():
                try:
                    if faults.marked:
                        text.check_bytes(line)
                    yield Record(f"{name}:{number}", tables._json_object(line))
                except Fault as fault:
                    faults.row(number, fault)


def _of_json(whole: str, name: str, faults: Faults) -> Iterator[Record]:
    """The objects of a list, which may stand in an object; or an object a line, for many call that `.json` too."""
    try:
        value = json.loads(whole)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1 and error.doc.lstrip().startswith("{"):
            yield from _of_lines([whole], name, faults)
            return
        where = f"{name}:{error.lineno}:{error.colno}"
        raise FileFault(f"{where}: broken JSON ({error.msg})", reason="broken JSON") from error
    except RecursionError as error:
        raise FileFault(f"{name}: JSON that cannot be read ({error})", reason="broken JSON") from error
    path, rows = _list_of(value, name)
    for index, row in enumerate(rows):
        where = f"{name}: {path}[{index}]"
        if isinstance(row, dict):
            yield Record(where, row)
        else:
            fault = Fault("no JSON object", f"{tables.short(row)} is no JSON object", value=tables.short(row))
            Faults(Place(where, bare_first=True), faults.tally, faults.skip).row(1, fault)


def _list_of(value: Any, name: str) -> tuple[str, list[Any]]:
    """The list of rows in a JSON value, and the key under which it stands."""
    if isinstance(value, list):
        return "", value
    lists = [key for key, held in value.items() if _is_rows(held)] if isinstance(value, dict) else []
    if len(lists) != 1:
        keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        found = f"several lists of objects ({', '.join(lists)})" if lists else f"no list of objects ({keys})"
        raise FileFault(
            f"{name}: a .json file is a list of objects, or an object that holds one; here is {found}",
            hint=f"jq -c '.{lists[0] if lists else 'KEY'}[]' {name} > rows.jsonl",
            reason="no list of objects",
        )
    return lists[0], value[lists[0]]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _of_parquet(path: files.File, tally: Tally) -> Iterator[Record]:
    name, number = files.shown(path), 1
    with tables.opened_parquet(path, tally) as table:
        stored = (table.schema_arrow.metadata or {}).get(b"huggingface")
        features = json.loads(stored).get("info", {}).get("features", {}) if stored else {}
        named = _class_names(features)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
            for fields in batch.to_pylist():
                yield Record(f"{name}: row {number}", _named(fields, named))
                number += 1


def _of_dataset(data: Labelled, base: Path, tally: Tally) -> Iterator[Record]:
    import datasets

    assert data.dataset is not None
    try:
        commit = hub.dataset_shards(data.dataset, data.split, base)[0]
        rows = hub._open(data.dataset, data.split, base, commit)
        named = _class_names(rows.features.to_dict() if rows.features is not None else {})
        for number, fields in enumerate(rows):
            yield Record(f"{data.dataset}:{data.split}:{number}", _named(fields, named))
    except network_errors() as error:
        raise hub._out_of_reach(data.dataset, error) from error
    except DataError:
        raise
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set {data.dataset!r} cannot be read: {hub._first_line(error)}") from error


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names that numbers stand for, by column, as `datasets` keeps them."""
    named = {}
    for column, feature in features.items():
        while isinstance(feature, dict | list) and not (isinstance(feature, dict) and "names" in feature):
            feature = feature[0] if isinstance(feature, list) and feature else feature
            feature = feature.get("feature") if isinstance(feature, dict) else None
        if isinstance(feature, dict) and feature.get("_type", "ClassLabel") == "ClassLabel":
            named[column] = list(feature["names"])
    return named


def _named(fields: dict[str, Any], named: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row with names where it has their numbers; -1, which stands for no label, becomes nothing."""
    for column, names in named.items():
        value = fields.get(column)
        if isinstance(value, list):
            fields[column] = [_name(one, names) for one in value]
        else:
            fields[column] = _name(value, names)
    return fields


def _name(value: Any, names: list[str]) -> Any:
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
