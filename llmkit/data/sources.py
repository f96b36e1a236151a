"""Sources of text: what a recipe names, as a stream of documents and as a fingerprint of its content."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.data import files, hub, python_library, tables, text
from llmkit.data.files import Tally
from llmkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmkit.recipe.schema import Source

__all__ = [
    "Document",
    "Tally",
    "fingerprint",
    "num_bytes",
    "read_documents",
    "resolve_files",
    "source_name",
]

_READER = 1
"""Part of every fingerprint: raised when the same files come to give other documents."""

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_LONGEST_ROW = 2**20
"""Characters a table's row may have as one document; a longer one is cut into pieces (`text.pieces`)."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, and where it was found (`books/a.txt` or `web.jsonl:17`)."""

    text: str
    where: str


def read_documents(
    source: "Source", *, base: Path, cache: Path | None = None, tally: Tally | None = None
) -> Iterator[Document]:
    """The source's documents in a fixed order, none of them blank, in bounded memory.

    Args:
        source: What to read.
        base: The recipe's folder, see `resolve_files`.
        cache: The cache folder, where standard input is kept; by default the run folders' own.
        tally: Counts what was read and skipped.

    With a `limit`, reading ends before the document that would exceed it; the first one is always read.

    Raises:
        DataError: Something cannot be read or is not of the stated form, or all of it is empty.
        MissingError: A package or data set is missing.
    """
    tally = tally or Tally()
    found = False
    room = source.limit
    for document in _all_documents(source, base, cache, tally):
        if not document.text or document.text.isspace():
            tally.empty_documents += 1
            continue
        if room is not None:
            room -= len(document.text.encode())
            if room < 0 and found:
                return
        found = True
        yield document
    if not found:
        name = source_name(source, base, cache=cache)
        raise DataError(
            f"source {name!r} holds no text: "
            f"{tally.empty_files} empty files, {tally.empty_documents} blank documents, nothing else",
            hint="name files with text in `files:`",
        )


def resolve_files(source: "Source", base: Path, *, cache: Path | None = None) -> list[Path]:
    """The files of a source, in the order they are read; none for a data set by name.

    A relative path is looked for in the current folder, then in `base`. `-` is standard input, kept in the
    cache; `stdlib:` and `stdlib:docs` are the Python standard library.

    Raises:
        DataError: A path, glob or folder holds nothing; the message names what is near.
        RecipeError: The source names neither files nor a data set, or both.
    """
    found: dict[Path, None] = {}
    for pattern in _patterns(source):
        if pattern == "-":
            found[files.spool_stdin(cache or default_cache())] = None
        elif pattern in (python_library.SOURCES, python_library.DOCSTRINGS):
            found.update(dict.fromkeys(python_library.library_files()))
        else:
            found.update(dict.fromkeys(files.resolve([pattern], base)))
    return list(found)


def fingerprint(source: "Source", base: Path, *, cache: Path | None = None) -> str:
    """SHA-256 of all that decides the documents: the bytes of the files, in order, and the settings used.

    Names and dates do not count, so a renamed or touched file stays the same and a changed one does not.
    """
    docstrings = python_library.DOCSTRINGS in _patterns(source)
    content: list[object] = [_READER, source.columns.text, source.documents, source.encoding, source.limit]
    if source.dataset is not None:
        content += hub.dataset_fingerprint(source.dataset, source.split, base)
    else:
        for path in resolve_files(source, base, cache=cache):
            content.append([docstrings, _format_of(path, source), files.ending(path)[1], files.hash_of(path)])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def num_bytes(source: "Source", base: Path, *, cache: Path | None = None) -> int:
    """Bytes of the source's files on disk, compressed ones as they lie there, and at most its `limit`.

    0 for a data set by name without a limit.
    """
    if source.dataset is not None:
        return source.limit or 0
    size = sum(path.stat().st_size for path in resolve_files(source, base, cache=cache))
    return size if source.limit is None else min(size, source.limit)


def source_name(source: "Source", base: Path, *, cache: Path | None = None) -> str:
    """What reports call the source: its `name`, else made from what it reads."""
    if source.name is not None:
        return source.name
    if source.dataset is not None:
        return source.dataset
    first = _patterns(source)[0]
    if first == "-":
        return "stdin"
    if first.startswith(python_library.SOURCES):
        return first.strip(":").replace(":", "-")
    path = resolve_files(source, base, cache=cache)[0]
    stem = Path(path.stem).stem if files.ending(path)[1] else path.stem
    return stem or path.name


def default_cache() -> Path:
    """The cache folder in the folder of runs."""
    return Path(os.environ.get("LLMKIT_RUNS") or "runs") / ".cache"


def _patterns(source: "Source") -> list[str]:
    given = [source.files] if isinstance(source.files, str) else list(source.files or [])
    if bool(given) == (source.dataset is not None):
        raise RecipeError(
            "a data source names either `files` or `dataset`" + (", not both" if given else ""),
            hint="files: data/*.txt",
        )
    if python_library.DOCSTRINGS in given and len(given) > 1:
        raise RecipeError(
            f"`{python_library.DOCSTRINGS}` stands alone in `files`",
            hint="make two sources of it, each with a name",
        )
    return given


def _all_documents(source: "Source", base: Path, cache: Path | None, tally: Tally) -> Iterator[Document]:
    patterns = _patterns(source)
    if source.dataset is not None:
        yield from _of_rows(hub.dataset_texts(source.dataset, source.split, source.columns.text, base))
        return
    paths = resolve_files(source, base, cache=cache)
    if python_library.DOCSTRINGS in patterns:
        yield from _of_rows(python_library.docstring_documents(paths, tally))
        return
    for path in paths:
        if _size(path) == 0:
            tally.empty_files += 1
        else:
            yield from _of_file(path, source, tally)


def _of_file(path: Path, source: "Source", tally: Tally) -> Iterator[Document]:
    form, column, where = _format_of(path, source), source.columns.text, files.shown(path)
    if form == "parquet":
        yield from _of_rows(tables.parquet_texts(path, column, tally))
        return
    chunks = text.decode(files.read_chunks(path, tally), source.encoding, where)
    if form == "jsonl":
        yield from _of_rows(tables.jsonl_texts(chunks, column, where))
    elif form in ("csv", "tsv"):
        yield from _of_rows(tables.csv_texts(chunks, column, where, tabs=form == "tsv"))
    else:
        for number, document in text.documents(chunks, source.documents, where):
            yield Document(document, where if number == 1 else f"{where}:{number}")


def _of_rows(rows: Iterable[tuple[str, str]]) -> Iterator[Document]:
    for place, row in rows:
        if len(row) <= _LONGEST_ROW:
            yield Document(row, place)
        else:
            yield from (Document(piece, place) for _, piece in text.pieces([row]))


def _format_of(path: Path, source: "Source") -> str:
    return source.format if source.format != "auto" else _FORMATS.get(files.ending(path)[0], "text")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise files.unreadable(path, error) from error
