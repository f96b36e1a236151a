"""CoNLL files: a word a line with its tag, a blank line between sentences."""

import re
from collections.abc import Iterable, Iterator

from llmkit.data.places import Fault, Faults
from llmkit.data.records.record import Record
from llmkit.data.tables import LONGEST_LINE, short
from llmkit.data.text import check_bytes, lines

_BLANKS = re.compile(r"[ \t]+")


def conll_records(chunks: Iterable[str], name: str, faults: Faults) -> Iterator[Record]:
    """The sentences of a file: for each column, which are called 1, 2 and so on, the list of what stands in it.

    Columns are parted by tabs where the first word's line has one, else by blanks. `-DOCSTART-` lines are passed
    over, and comments: lines that begin with `#` and have not as many fields as the first word's line.

    Args:
        chunks: The text in pieces, cut anywhere.
        name: The file, for places: that of a sentence is its first word's.
        faults: Told of each sentence in which a line has too few or too many fields.
    """
    width, tabs = 0, False
    words: list[list[str]] = []
    begin, fault = 0, None
    for number, line, _ in lines(chunks, LONGEST_LINE):
        if not line.strip(" \t"):
            yield from _sentence(words, name, begin, fault, faults)
            words, fault = [], None
            continue
        if not width and not line.startswith(("# ", "-DOCSTART-")):
            tabs = "\t" in line
            width = len(_fields(line, tabs))
        fields = _fields(line, tabs)
        if line.startswith("-DOCSTART-") or (line.startswith("#") and len(fields) != width):
            continue
        begin = begin if words else number
        words.append(fields)
        fault = fault or _fault(line, fields, width, number, faults)
    yield from _sentence(words, name, begin, fault, faults)


def _fields(line: str, tabs: bool) -> list[str]:
    return line.split("\t") if tabs else _BLANKS.split(line.strip(" \t"))


def _fault(line: str, fields: list[str], width: int, number: int, faults: Faults) -> tuple[int, Fault] | None:
    try:
        if faults.marked:
            check_bytes(line)
    except Fault as fault:
        return number, fault
    if len(fields) == width and all(fields) and width > 1:
        return None
    count = "one field" if len(fields) == 1 else f"{len(fields)} fields"
    what = f"{count} where the file's first word has {width}"
    if len(fields) == width:
        what = "a field is empty" if width > 1 else "a word without a tag"
    hint = "each line is a word and its tag, parted by a tab or blanks; a blank line ends a sentence"
    return number, Fault("wrong number of fields", f"{what}: {short(line)}", hint=hint, value=short(line))


def _sentence(
    words: list[list[str]], name: str, begin: int, fault: tuple[int, Fault] | None, faults: Faults
) -> Iterator[Record]:
    if fault is not None:
        faults.row(*fault)
    elif words:
        columns = zip(*words, strict=True)
        yield Record(f"{name}:{begin}", {str(i): list(column) for i, column in enumerate(columns, 1)})
