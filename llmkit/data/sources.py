"""Sources of text: what a recipe names, as a stream of documents and as a fingerprint of its content."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmkit.data import files, hub, python_library
from llmkit.data.inputs import default_cache, format_of, patterns, resolve_files
from llmkit.data.parts import parts_of, read_part
from llmkit.data.places import Document, FileFault, Tally
from llmkit.data.remote import is_url
from llmkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmkit.recipe.schema import Source

__all__ = [
    "Document",
    "Tally",
    "check_found",
    "default_cache",
    "fingerprint",
    "num_bytes",
    "read_documents",
    "resolve_files",
    "source_name",
    "source_names",
]

_READER = 2
"""Part of every fingerprint: raised when the same files come to give other documents."""
_PART_BYTES = 2**26
_MAGIC = re.compile(r"[*?\[]")
_SAY_NOTHING = {"part", "parts", "shard", "data", "train", "file", "chunk", "split", "text"}


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
    before = tally.documents
    for part in parts_of(source, base, cache=cache, part_bytes=_PART_BYTES):
        yield from read_part(part, source, tally=tally)
    if tally.documents == before:
        check_found(replace(tally, documents=0), source_name(source, base, cache=cache))


def check_found(tally: Tally, name: str) -> None:
    """Check that a source gave documents; `tally` is that of all its parts together.

    Raises:
        DataError: It gave none; says what there was instead.
    """
    if tally.documents:
        return
    if not tally.num_skipped:
        raise DataError(
            f"source {name!r} holds no text: "
            f"{tally.empty_files} empty files, {tally.empty_documents} blank documents, nothing else",
            hint="name files with text in `files:`",
        )
    reasons = [f"{count:,} rows: {reason}" for reason, count in tally.skipped_rows.items()]
    reasons += [f"{count:,} files: {reason}" for reason, count in tally.skipped_files.items()]
    example = tally.examples[0]
    what = example.what if example.number is None else f"{example.where}: {example.what}"
    raise DataError(
        f"source {name!r} gave no document, for all of it was skipped ({'; '.join(reasons)}); the first: {what}",
        hint=example.hint,
    )


def fingerprint(source: "Source", base: Path, *, cache: Path | None = None) -> str:
    """SHA-256 of all that decides the documents: the bytes of the files, in order, and the settings used.

    Names and dates do not count, so a renamed or touched file stays the same and a changed one does not. A file
    that cannot be read counts as just that where `on_error` skips it.

    Raises:
        DataError: A file cannot be read, and is not to be skipped.
    """
    docstrings = python_library.DOCSTRINGS in patterns(source)
    content: list[object] = [_READER, source.columns.text, source.documents, source.encoding, source.limit]
    if source.dataset is not None:
        content += hub.dataset_fingerprint(source.dataset, source.split, base)
    else:
        for path in resolve_files(source, base, cache=cache):
            content.append(
                [docstrings, format_of(path, source), files.ending(path)[1], _content(path, source)]
            )
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def num_bytes(source: "Source", base: Path, *, cache: Path | None = None) -> int:
    """Bytes of the source's files on disk, compressed ones as they lie there, and at most its `limit`.

    0 for a data set by name without a limit, and for a file that cannot be read where `on_error` skips it.

    Raises:
        DataError: A file cannot be looked at, and is not to be skipped.
    """
    if source.dataset is not None:
        return source.limit or 0
    size = sum(_size(path, source) for path in resolve_files(source, base, cache=cache))
    return size if source.limit is None else min(size, source.limit)


def _content(path: files.File, source: "Source") -> str:
    try:
        return files.hash_of(path)
    except FileFault:
        if source.on_error == "stop":
            raise
        return "unreadable"  # reading counts it as skipped


def _size(path: files.File, source: "Source") -> int:
    try:
        return files.size_of(path)
    except FileFault:
        if source.on_error == "stop":
            raise
        return 0


def source_name(source: "Source", base: Path, *, cache: Path | None = None) -> str:
    """What reports call the source: its `name`, else made from what it reads.

    A file gives its name without endings, a folder its own, a glob the name's beginning (`web-*.jsonl`) if
    that says something, else the folder before it.
    """
    if source.name is not None:
        return source.name
    if source.dataset is not None:
        return source.dataset
    first = patterns(source)[0]
    if first == "-":
        return "stdin"
    if first.startswith(python_library.SOURCES):
        return first.strip(":").replace(":", "-")
    return _name_of(first) or _stem(resolve_files(source, base, cache=cache)[0].stem)


def source_names(sources: Sequence["Source"], base: Path, cache: Path | None = None) -> list[str]:
    """The sources' names, all different: of those that we made, equal ones get `-2`, `-3` and so on.

    Raises:
        RecipeError: The recipe gives two sources one name.
    """
    given = [source.name for source in sources if source.name is not None]
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"two sources are called {twice!r}", hint="give each `name:` once")
    taken = set(given)
    names = []
    for source in sources:
        name = source_name(source, base, cache=cache)
        if source.name is None:
            tries = (f"{name}-{number}" if number > 1 else name for number in count(1))
            name = next(attempt for attempt in tries if attempt not in taken)
            taken.add(name)
        names.append(name)
    return names


def _name_of(pattern: str) -> str:
    """A name for a path, glob or URL; empty if it says nothing (`*.txt`)."""
    path = urlsplit(pattern).path if is_url(pattern) else pattern
    folders, last = os.path.split(path.rstrip("/"))
    magic = _MAGIC.search(last)
    if magic is None and not glob.has_magic(folders):
        return _stem(last) if last not in (".", "..") else ""
    stem = last[: magic.start()].strip("-_. ") if magic else ""
    if len(stem) > 1 and stem.lower() not in _SAY_NOTHING:
        return stem
    plain = [folder for folder in folders.split("/") if folder not in ("", ".", "..", "~")]
    before = list(takewhile(lambda folder: not glob.has_magic(folder), plain))
    return before[-1] if before else ""


def _stem(name: str) -> str:
    """A file's name without its ending, and without the one before a compression's: `web.jsonl.gz` is `web`."""
    path = Path(name)
    stem = Path(path.stem).stem if files.ending(path)[1] else path.stem
    return stem or name
