"""Rows of tables (jsonl, csv, tsv, parquet) as texts, checked one by one: a wrong one is named by its line."""

import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmkit.data.files import Tally, ending, read_chunks, shown, unreadable
from llmkit.data.text import lines
from llmkit.errors import DataError
from llmkit.registry import nearest

LONGEST_LINE = 256 * 1024**2
"""Characters a line of a table may have: a row must be read whole."""

_PARQUET_ROWS = 256
_MOST_NAMES = 20

Texts = Iterator[tuple[str, str]]
"""Where a row is (`web.jsonl:17`) and its text."""


def jsonl_texts(chunks: Iterable[str], column: str, where: str) -> Texts:
    """The texts of a JSON Lines file; blank lines are passed over.

    Raises:
        DataError: A line is no JSON object, lacks the column, or holds no text there.
    """
    for number, line in _whole_lines(chunks, where):
        if not line or line.isspace():
            continue
        place = f"{where}:{number}"
        yield place, checked_text(pick(_json_object(line, place), column, place), column, place)


def csv_texts(chunks: Iterable[str], column: str, where: str, *, tabs: bool = False) -> Texts:
    """The texts of a CSV file (RFC 4180 quotes) or, with `tabs`, of a TSV file (no quotes).

    Line 1 names the columns.

    Raises:
        DataError: The column is missing, a quote is not closed, or a row has not as many fields as line 1.
    """
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))
    source = (f"{line}\n" for _, line in _whole_lines(chunks, where))
    reader = (
        csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        if tabs
        else csv.reader(source, strict=True)
    )
    header: list[str] | None = None
    before = 0
    try:
        for fields in reader:
            place, before = f"{where}:{before + 1}", reader.line_num
            if header is None:
                header = fields
                require_column(column, header, place)
            elif fields:
                _same_width(fields, header, place)
                yield place, checked_text(fields[header.index(column)], column, place)
    except csv.Error as error:
        raise DataError(
            f"{where}:{before + 1}: broken {'TSV' if tabs else 'CSV'} ({error})",
            hint='a field that holds a quote is written in quotes, each quote in it doubled: "say ""hi"""',
        ) from error


def parquet_texts(path: Path, column: str, tally: Tally) -> Texts:
    """The texts of a parquet file, a few hundred rows at a time.

    Raises:
        DataError: It is no parquet file, lacks the column, or the column does not hold text.
    """
    import pyarrow
    import pyarrow.parquet

    where = shown(path)
    try:
        with _seekable(path, tally) as file:
            table = pyarrow.parquet.ParquetFile(file)
            _require_text_column(table.schema_arrow, column, where)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for value in _leaf(batch, column).to_pylist():
                    number += 1
                    place = f"{where}: row {number}"
                    yield place, checked_text(value, column, place)
    except (pyarrow.ArrowException, EOFError) as error:
        raise DataError(f"{where}: not a readable parquet file ({error})") from error
    except OSError as error:
        raise unreadable(path, error) from error


def pick(row: Mapping[str, Any], column: str, place: str) -> Any:
    """The value of a column; dots lead into nested objects unless a column has just that name.

    Raises:
        DataError: There is no such column; names those there and the nearest.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise _missing_column(column, _names(row), place)
        value = value[part]
    return value


def require_column(column: str, columns: Sequence[str], place: str) -> None:
    """Check that a table has a column.

    Raises:
        DataError: It has not; names those there and the nearest.
    """
    if column not in columns:
        raise _missing_column(column, columns, place)


def checked_text(value: object, column: str, place: str) -> str:
    """The value if it is text.

    Raises:
        DataError: It is something else, or holds half a surrogate pair, which is no Unicode text.
    """
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"of type {type(value).__name__}"
        raise DataError(
            f"{place}: column {column!r} holds {_short(value)}, which is {kind}, not text",
            hint="repair or remove the row, or name another column with `columns: {text: ...}`",
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: column {column!r} holds {value[error.start]!a} at character {error.start:,}, "
                "half of a surrogate pair, which is no character",
                hint="repair the row where it was written: an emoji was cut in two",
            ) from error
    return value


def _whole_lines(chunks: Iterable[str], where: str) -> Iterator[tuple[int, str]]:
    for number, line, ends in lines(chunks, LONGEST_LINE):
        if not ends:
            raise DataError(
                f"{where}:{number}: the line has over {LONGEST_LINE:,} characters", hint="one row a line"
            )
        yield number, line


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}:{error.colno}: broken JSON ({error.msg}): {_short(line)}",
            hint="each line of a .jsonl file is one complete JSON object",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: JSON that cannot be read ({error})") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: {_short(row)} is no JSON object",
            hint='each line of a .jsonl file is an object such as {"text": "..."}',
        )
    return row


def _same_width(fields: Sequence[str], header: Sequence[str], place: str) -> None:
    if len(fields) != len(header):
        raise DataError(
            f"{place}: {len(fields)} fields where line 1 names {len(header)} columns ({', '.join(header)})",
            hint="put fields that hold a separator or a line end in quotes (CSV), or repair the row",
        )


def _missing_column(column: str, columns: Sequence[str], place: str) -> DataError:
    guess = nearest(column, columns)
    there = ", ".join(columns[:_MOST_NAMES]) + (", ..." if len(columns) > _MOST_NAMES else "")
    likely = guess or (columns[0] if len(columns) == 1 else "NAME")
    return DataError(
        f"{place}: there is no column {column!r}; there are: {there or 'none'}",
        hint=f"name the column that holds the text: `columns: {{text: {likely}}}`",
    )


def _names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The columns of a row, nested ones with dots."""
    names: list[str] = []
    for name, value in row.items():
        names.append(prefix + name)
        if isinstance(value, Mapping):
            names += _names(value, f"{prefix}{name}.")
    return names


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _seekable(path: Path, tally: Tally) -> IO[bytes]:
    """The file to jump about in, as parquet needs; a compressed one is unpacked to a temporary file."""
    if not ending(path)[1]:
        tally.bytes_read += path.stat().st_size
        return path.open("rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    for chunk in read_chunks(path, tally):
        unpacked.write(chunk)
    unpacked.seek(0)
    return unpacked


def _require_text_column(schema: Any, column: str, where: str) -> None:
    import pyarrow

    kind = _walk(schema, column, lambda fields, part: fields.field(part).type, where)
    value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(test(value_kind) for test in is_text):
        raise DataError(
            f"{where}: column {column!r} is of type {kind}, not text",
            hint=f"name a text column: `columns: {{text: ...}}`; there are: {', '.join(schema.names)}",
        )


def _walk(schema: Any, column: str, step: Callable[[Any, str], Any], where: str) -> Any:
    if column in schema.names:
        return step(schema, column)
    found = schema
    for part in column.split("."):
        names = getattr(found, "names", None) or [found.field(i).name for i in range(found.num_fields)]
        if part not in names:
            raise _missing_column(column, schema.names, where)
        found = step(found, part)
    return found


def _leaf(batch: Any, column: str) -> Any:
    import pyarrow.compute

    if column in batch.schema.names:
        return batch.column(column)
    first, *rest = column.split(".")
    return pyarrow.compute.struct_field(batch.column(first), rest)
