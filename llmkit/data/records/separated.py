"""Tables with separators as records: which line names the columns, and each row with as many fields."""

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat

from llmkit.data import tables
from llmkit.data.places import Fault, Faults, FileFault
from llmkit.data.records.names import NAMES
from llmkit.data.records.record import Record, plain
from llmkit.data.text import check_bytes
from llmkit.recipe.labelled import Labelled

Fields = Iterator[tuple[int, list[str]]]
"""The number of the line at which a row begins, and its fields."""
_LOOK_AT = 200
_FEWEST_LABELLED = 4
"""Rows that must lie below a name before values that come again say anything."""


def tsv_fields(chunks: Iterable[str], faults: Faults) -> Fields:
    """The rows of a TSV file, in which quotes are nothing special; blank lines are passed over."""
    for first, found in tables._line_lists(chunks, faults):
        for number, line in enumerate(found, first):
            if line:
                yield number, line.split("\t")


def csv_fields(chunks: Iterable[str], faults: Faults) -> Fields:
    """The rows of a CSV file (RFC 4180 quotes), with commas, or semicolons if line 1 has only those."""
    csv.field_size_limit(min(sys.maxsize, tables.LONGEST_LINE))
    ended = (map(str.__add__, found, repeat("\n")) for _, found in tables._line_lists(chunks, faults))
    stream = chain.from_iterable(ended)
    first = next(stream, "")
    delimiter = ";" if ";" in first and "," not in first else ","
    reader = csv.reader(chain([first], stream), strict=True, delimiter=delimiter)
    before = 0
    while True:
        try:
            fields = next(reader)
            number, before = before + 1, reader.line_num
            if fields:
                yield number, fields
        except StopIteration:
            return
        except csv.Error as error:
            faults.row(before + 1, tables._broken_csv(error))
            before = reader.line_num


def table_records(rows: Fields, data: Labelled, task: str, faults: Faults) -> Iterator[Record]:
    """The rows of a table by column: by their names, or 1, 2 and so on where no line names them.

    Args:
        rows: The table's rows.
        data: The source; its `header` and `columns` tell whether the first row names the columns.
        task: The task, which knows some names.
        faults: Told of each row that has not as many fields as the first one.

    Raises:
        DataError: A name stands twice in the first row.
    """
    first = list(islice(rows, _LOOK_AT))
    if not first:
        return
    named = data.header if data.header != "auto" else names_columns([row for _, row in first], data, task)
    header = (
        [name.strip() for name in first[0][1]] if named else [str(i + 1) for i in range(len(first[0][1]))]
    )
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise FileFault(
            f"{faults.place.show(first[0][0])}: two columns are called {twice!r}", reason="two names"
        )
    name = faults.place.name
    for number, fields in chain(first[1:] if named else first, rows):
        try:
            tables._same_width(fields, header)
            if faults.marked:
                check_bytes("\t".join(fields))
        except Fault as fault:
            faults.row(number, fault)
        else:
            yield Record(f"{name}:{number}", dict(zip(header, fields, strict=True)))


def names_columns(first: Sequence[Sequence[str]], data: Labelled, task: str) -> bool:
    """Whether the first of some rows names the columns.

    It does if it holds a name that the recipe's `columns` has, or names of two roles of the task (of a table of
    labels, of one). Else it is taken for a row of data where the task can do without names: texts in two or three
    columns, or a label that comes again in later rows, or a number. What stands over numbers or over few values that
    come again and again, and is none of them, names a column: it is no text that belongs to another.
    """
    cells = [cell.strip() for cell in first[0]]
    asked = set(data.columns.values())
    if asked:
        return not asked <= {str(i + 1) for i in range(len(cells))} or bool(asked & set(cells))
    known = {role for role, names in NAMES[task].items() for cell in cells if plain(cell) in (role, *names)}
    if len(known) >= (1 if task in ("cls", "regression") else 2):
        return True
    if task == "regression":
        return not any(_is_number(cell) for cell in cells)
    if task == "cls":
        return len(cells) != 2 or not any(_comes_again(first, i) for i in range(2))
    return not (task in ("seq2seq", "embed") and len(cells) in (2, 3)) or _stands_over_labels(first)


def _comes_again(rows: Sequence[Sequence[str]], column: int) -> bool:
    value = rows[0][column].strip()
    return any(len(row) > column and row[column].strip() == value for row in rows[1:])


def _stands_over_labels(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row differs from what is below it as the name of a column does from numbers or labels."""
    head, *below = rows
    for column, name in enumerate(cell.strip() for cell in head):
        values = [row[column].strip() for row in below if len(row) > column]
        over_numbers = bool(values) and all(map(_is_number, values)) and not _is_number(name)
        few = len(values) >= _FEWEST_LABELLED and len(set(values)) <= len(values) / 2
        if name.isidentifier() and name not in values and (over_numbers or few):
            return True
    return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
