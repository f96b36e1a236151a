"""Rows of tables (jsonl, csv, tsv, parquet) as texts, checked one by one: a wrong one is named by its line."""

import csv
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import IO, Any

from llmkit.data.files import File, ending, open_file, read_chunks, shown, unreadable
from llmkit.data.places import Fault, Faults, FileFault, Place, Tally
from llmkit.data.remote import RemoteFile
from llmkit.data.text import check_bytes, has_bad_bytes, lines
from llmkit.registry import nearest

LONGEST_LINE = 256 * 1024**2
"""Characters a line of a table may have: a row must be read whole."""

_SCAN: Any = getattr(json.JSONDecoder(), "scan_once")  # noqa: B009 (typeshed leaves it out)
_PARQUET_ROWS = 256
_PARQUET_BUFFER = 2**20
_MOST_NAMES = 20

Rows = Iterator[tuple[int, str]]
"""The number of a row in its file, or of the line at which it begins, and its text."""


def jsonl_rows(chunks: Iterable[str], column: str, faults: Faults) -> Rows:
    """The texts of JSON Lines; blank lines are passed over.

    Args:
        chunks: The text in pieces, cut anywhere.
        column: The key that holds the text.
        faults: Told of each line that is no JSON object, lacks the column, or holds no text there.
    """
    parse, marked = _json_parser(), faults.marked
    for first, found in _line_lists(chunks, faults):
        for number, line in enumerate(found, first):
            # The quick way for a good line; whatever is unusual goes the slow way, which tells what is wrong.
            try:
                text = parse(line)[column]
                if (
                    type(text) is str
                    # Half a surrogate pair can only come from an escape, or from `marked` bytes.
                    and (text.isascii() or "\\u" not in line or not has_bad_bytes(text))
                    and not (marked and has_bad_bytes(line))
                ):
                    yield number, text
                    continue
            except (StopIteration, ValueError, LookupError, TypeError, RecursionError):
                pass
            if line and not line.isspace():
                try:
                    text = _text_of_line(line, column, faults)
                except Fault as fault:
                    faults.row(number, fault)
                else:
                    yield number, text


def _json_parser() -> Callable[[str], Any]:
    """From a line to its value: orjson's where it is installed, for speed.

    The two differ only in what they refuse (orjson also NaN, half surrogate pairs, great depth), and what is refused
    here is read again by Python's.
    """
    try:
        from orjson import loads
    except ImportError:
        return _parse_one
    return loads


def _parse_one(line: str) -> Any:
    value, end = _SCAN(line, 0)
    if end != len(line):
        raise ValueError("something follows the value")
    return value


def tsv_rows(chunks: Iterable[str], column: str, faults: Faults, *, header: list[str] | None = None) -> Rows:
    """The texts of a TSV file, in which quotes are nothing special; blank lines are passed over.

    Args:
        chunks: The text in pieces, cut anywhere.
        column: The column that holds the text.
        faults: Told of each row that has not as many fields as there are columns.
        header: The columns; by default the first line names them.
    """
    place = -1 if header is None else _column(column, header, faults.place)
    for first, found in _line_lists(chunks, faults):
        for number, line in enumerate(found, first):
            fields = line.split("\t")
            if header is None:
                header, place = fields, _column(column, fields, faults.place)
            elif line:
                try:
                    if faults.marked:
                        check_bytes(line)
                    _same_width(fields, header)
                except Fault as fault:
                    faults.row(number, fault)
                else:
                    yield number, fields[place]


def csv_rows(chunks: Iterable[str], column: str, faults: Faults) -> Rows:
    """The texts of a CSV file (RFC 4180 quotes); line 1 names the columns.

    Args:
        chunks: The text in pieces, cut anywhere.
        column: The column that holds the text.
        faults: Told of each row that has not as many fields as line 1, or a quote in the wrong place.
    """
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))
    ended = (map(str.__add__, found, repeat("\n")) for _, found in _line_lists(chunks, faults))
    reader = csv.reader(chain.from_iterable(ended), strict=True)
    header: list[str] | None = None
    place = before = 0
    while True:
        try:
            fields = next(reader)
            number, before = before + 1, reader.line_num
            if header is None:
                header, place = fields, _column(column, fields, faults.place)
            elif fields:
                _same_width(fields, header)
                if faults.marked:
                    check_bytes(",".join(fields))
                yield number, fields[place]
        except StopIteration:
            return
        except csv.Error as error:
            faults.row(before + 1, _broken_csv(error))
            before = reader.line_num
        except Fault as fault:
            faults.row(number, fault)


def parquet_rows(path: File, column: str, faults: Faults, *, groups: range | None = None) -> Rows:
    """The texts of a parquet file, a few hundred rows at a time.

    Args:
        path: The file.
        column: The column that holds the text, with dots for nested ones.
        faults: Told of each row that holds no text.
        groups: Which row groups to read; by default all.

    Raises:
        DataError: It is no parquet file, lacks the column, or the column does not hold text.
    """
    with opened_parquet(path, faults.tally) as table:
        _require_text_column(table.schema_arrow, column, shown(path))
        number = 1 + sum(
            table.metadata.row_group(group).num_rows for group in range(groups.start if groups else 0)
        )
        wanted = None if groups is None else list(groups)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column], row_groups=wanted):
            for value in _leaf(batch, column).to_pylist():
                if isinstance(value, str):
                    yield number, value
                else:
                    faults.row(number, _no_text(value, column))
                number += 1


def parquet_group_bytes(path: File) -> list[int]:
    """The bytes of each row group, as they lie in the file.

    Raises:
        DataError: It is no parquet file.
    """
    with opened_parquet(path, Tally()) as table:
        meta = table.metadata
        return [
            sum(meta.row_group(group).column(i).total_compressed_size for i in range(meta.num_columns))
            for group in range(meta.num_row_groups)
        ]


@contextmanager
def opened_parquet(path: File, tally: Tally) -> Iterator[Any]:
    """A parquet file, open, as a `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: It cannot be read or is no parquet file; also if that shows inside the block.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with _seekable(path, tally) as file:
            # A buffer makes it read a column page by page: row groups may be larger than memory.
            yield pyarrow.parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, EOFError) as error:
        raise FileFault(
            f"{shown(path)}: not a readable parquet file ({error})", reason="not a readable parquet file"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def pick(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; dots lead into nested objects unless a column has just that name.

    Raises:
        Fault: There is no such column; names those there and the nearest.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise _missing_column(column, _names(row))
        value = value[part]
    return value


def checked_text(value: object, column: str) -> str:
    """The value if it is text.

    Raises:
        Fault: It is something else, or holds half a surrogate pair, which is no Unicode text.
    """
    if not isinstance(value, str):
        raise _no_text(value, column)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Fault(
                "lone surrogate",
                f"column {column!r} holds {value[error.start]!a} at character {error.start:,}, "
                "half of a surrogate pair, which is no character",
                hint="repair the row where it was written: an emoji was cut in two",
                value=short(value),
            ) from error
    return value


def first_line(chunks: Iterable[str], where: str) -> list[str]:
    """The fields of a TSV file's first line.

    Raises:
        DataError: It is longer than a line may be.
    """
    for number, line, ends in lines(chunks, LONGEST_LINE):
        if not ends:
            raise _too_long().error(f"{where}:{number}")
        return line.split("\t")
    return []


def _line_lists(chunks: Iterable[str], faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """The text's lines in lists, each with the number of its first line; a line that is too long is left out."""
    number, held, size = 1, list[str](), 0
    for chunk in chunks:
        end = chunk.rfind("\n")
        if end >= 0:
            held.append(chunk[:end])
            found = "".join(held).split("\n")
            if size > LONGEST_LINE:
                number, found = number + 1, found[1:]
            yield number, found
            number += len(found)
            held, size = [], 0
        held.append(chunk[end + 1 :])
        was_long, size = size > LONGEST_LINE, size + len(held[-1])
        if size > LONGEST_LINE:
            held = []
            if not was_long:
                faults.row(number, _too_long())
    if size and size <= LONGEST_LINE:
        yield number, ["".join(held)]


def _text_of_line(line: str, column: str, faults: Faults) -> str:
    if faults.marked:
        check_bytes(line)
    return checked_text(pick(_json_object(line), column), column)


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Fault(
            "broken JSON",
            f"broken JSON ({error.msg}): {short(line)}",
            hint="each line of a .jsonl file is one complete JSON object",
            value=short(line),
            suffix=f":{error.colno}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise Fault("broken JSON", f"JSON that cannot be read ({error})", value=short(line)) from error
    if not isinstance(row, dict):
        raise Fault(
            "no JSON object",
            f"{short(row)} is no JSON object",
            hint='each line of a .jsonl file is an object such as {"text": "..."}',
            value=short(row),
        )
    return row


def _column(column: str, header: list[str], place: Place) -> int:
    if column not in header:
        fault = _missing_column(column, header)
        raise FileFault(f"{place.name}:1: {fault.what}", hint=fault.hint, reason=fault.reason)
    return header.index(column)


def _same_width(fields: Sequence[str], header: Sequence[str]) -> None:
    if len(fields) != len(header):
        raise Fault(
            "wrong number of fields",
            f"{len(fields)} fields where line 1 names {len(header)} columns ({', '.join(header)})",
            hint="put fields that hold a separator or a line end in quotes (CSV), or repair the row",
            value=short(",".join(fields)),
        )


def _broken_csv(error: csv.Error) -> Fault:
    return Fault(
        "broken CSV",
        f"broken CSV ({error})",
        hint='a field that holds a quote is written in quotes, each quote in it doubled: "say ""hi"""',
    )


def _too_long() -> Fault:
    return Fault("line too long", f"the line has over {LONGEST_LINE:,} characters", hint="one row a line")


def _no_text(value: object, column: str) -> Fault:
    kind = "nothing" if value is None else f"of type {type(value).__name__}"
    return Fault(
        "missing value" if value is None else "not text",
        f"column {column!r} holds {short(value)}, which is {kind}, not text",
        hint="repair or remove the row, or name another column with `columns: {text: ...}`",
        value=short(value),
    )


def _missing_column(column: str, columns: Sequence[str]) -> Fault:
    guess = nearest(column, columns)
    there = ", ".join(columns[:_MOST_NAMES]) + (", ..." if len(columns) > _MOST_NAMES else "")
    likely = guess or (columns[0] if len(columns) == 1 else "NAME")
    return Fault(
        f"no column {column!r}",
        f"there is no column {column!r}; there are: {there or 'none'}",
        hint=f"name the column that holds the text: `columns: {{text: {likely}}}`",
        value=there,
    )


def _names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The columns of a row, nested ones with dots."""
    names: list[str] = []
    for name, value in row.items():
        names.append(prefix + name)
        if isinstance(value, Mapping):
            names += _names(value, f"{prefix}{name}.")
    return names


def short(value: object) -> str:
    """A value as messages show it, cut to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _seekable(path: File, tally: Tally) -> IO[bytes]:
    """The file to jump about in, as parquet needs; a compressed one is unpacked to a temporary file."""
    if not ending(path)[1] and not (isinstance(path, RemoteFile) and not path.seeks):
        file = open_file(path)
        return io.BufferedReader(file) if isinstance(path, RemoteFile) else file
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
        raise FileFault(
            f"{where}: column {column!r} is of type {kind}, not text",
            hint=f"name a text column: `columns: {{text: ...}}`; there are: {', '.join(schema.names)}",
            reason="not text",
        )


def _walk(schema: Any, column: str, step: Callable[[Any, str], Any], where: str) -> Any:
    if column in schema.names:
        return step(schema, column)
    found = schema
    for part in column.split("."):
        names = getattr(found, "names", None) or [found.field(i).name for i in range(found.num_fields)]
        if part not in names:
            fault = _missing_column(column, schema.names)
            raise FileFault(f"{where}: {fault.what}", hint=fault.hint, reason=fault.reason)
        found = step(found, part)
    return found


def _leaf(batch: Any, column: str) -> Any:
    import pyarrow.compute

    if column in batch.schema.names:
        return batch.column(column)
    first, *rest = column.split(".")
    return pyarrow.compute.struct_field(batch.column(first), rest)
