"""Every text of an evaluation file, whatever its form: question, answer, choices, context."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from llmkit.data.files import File, ending, read_chunks, shown
from llmkit.data.places import Tally
from llmkit.data.tables import LONGEST_LINE, opened_parquet
from llmkit.data.text import decode, documents, lines
from llmkit.errors import DataError

_ROWS = 256
_MOST_CHARACTERS = 256 * 1024**2


def evaluation_texts(path: File) -> Iterator[str]:
    """The texts of a file: every value that is text in every row, however deep it lies; of plain text the paragraphs.

    `.jsonl` and `.ndjson` (one value a line), `.json` (one value, or one a line), `.csv`, `.tsv` (line 1 counts as
    a row), `.parquet`; anything else is plain text. All may end in `.gz` or `.zst` as well.

    Raises:
        DataError: The file cannot be read, is not UTF-8, or not of the form that its ending says.
        MissingError: It is a `.zst` file and zstandard is not installed.
    """
    form = ending(path)[0]
    if form == ".parquet":
        yield from _of_parquet(path)
        return
    text = decode(read_chunks(path, Tally()), "utf-8", shown(path))
    if form in (".jsonl", ".ndjson"):
        yield from _of_json_lines(text, shown(path))
    elif form == ".json":
        yield from _of_json(text, shown(path))
    elif form in (".csv", ".tsv"):
        yield from _of_table(text, shown(path), tabs=form == ".tsv")
    else:
        yield from (paragraph for _, paragraph in documents(text, "paragraph", shown(path)))


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a nest of lists and mappings (their values, not their keys), in order."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack.extend(reversed(value.values()))
        elif isinstance(value, list | tuple):
            stack.extend(reversed(value))


def _of_json_lines(text: Iterable[str], where: str) -> Iterator[str]:
    for number, line in _lines(text, where):
        if line and not line.isspace():
            yield from texts_in(_value(line, f"{where}:{number}", "each line of the file is one JSON value"))


def _of_json(text: Iterable[str], where: str) -> Iterator[str]:
    whole = _joined(text, where)
    try:
        value = json.loads(whole)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON Lines by another name
            yield from _of_json_lines([whole], where)
            return
        raise DataError(
            f"{where}:{error.lineno}:{error.colno}: broken JSON ({error.msg})", hint="repair the file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read ({error})") from error
    yield from texts_in(value)


def _of_table(text: Iterable[str], where: str, *, tabs: bool) -> Iterator[str]:
    if tabs:
        for _, line in _lines(text, where):
            yield from line.split("\t")
        return
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))
    reader = csv.reader((f"{line}\n" for _, line in _lines(text, where)), strict=True)
    try:
        for fields in reader:
            yield from fields
    except csv.Error as error:
        raise DataError(
            f"{where}:{reader.line_num}: broken CSV ({error})",
            hint='a field that holds a quote is written in quotes, each quote in it doubled: "say ""hi"""',
        ) from error


def _of_parquet(path: File) -> Iterator[str]:
    with opened_parquet(path, Tally()) as table:
        for batch in table.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                yield from texts_in(row)


def _lines(text: Iterable[str], where: str) -> Iterator[tuple[int, str]]:
    for number, line, ends in lines(text, LONGEST_LINE):
        if not ends:
            raise DataError(f"{where}:{number}: the line has over {LONGEST_LINE:,} characters")
        yield number, line


def _value(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.colno}: broken JSON ({error.msg})", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read ({error})") from error


def _joined(text: Iterable[str], where: str) -> str:
    held, size = [], 0
    for piece in text:
        held.append(piece)
        size += len(piece)
        if size > _MOST_CHARACTERS:
            raise DataError(
                f"{where}: more than {_MOST_CHARACTERS:,} characters are too much for one JSON value",
                hint="write it as .jsonl, one row a line",
            )
    return "".join(held)
