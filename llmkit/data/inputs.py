"""What a source's settings mean: its files, in order, and the form of each."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.data import files, python_library, remote
from llmkit.data.files import File
from llmkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from llmkit.recipe.schema import Source

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".warc": "warc",
}


def resolve_files(source: "Source", base: Path, *, cache: Path | None = None) -> list[File]:
    """The files of a source, in the order they are read; none for a data set by name.

    A relative path is looked for in the current folder, then in `base`. `-` is standard input, kept in the
    cache; `stdlib:` and `stdlib:docs` are the Python standard library.

    Raises:
        DataError: A path, glob, folder or URL holds nothing; the message names what is near.
        MissingError: A URL's driver is not installed, or it cannot be reached.
        RecipeError: The source names neither files nor a data set, or both.
    """
    found: dict[File, None] = {}
    local: str | None
    for pattern in patterns(source):
        local = None
        if pattern == "-":
            found[files.spool_stdin(cache or default_cache())] = None
        elif pattern in (python_library.SOURCES, python_library.DOCSTRINGS):
            found.update(dict.fromkeys(python_library.library_files()))
        elif remote.is_url(pattern) and (local := remote.local_path(pattern)) is None:
            found.update(dict.fromkeys(remote.resolve(pattern)))
        else:
            found.update(dict.fromkeys(files.resolve([local or pattern], base)))
    return list(found)


def default_cache() -> Path:
    """The cache folder in the folder of runs."""
    return Path(os.environ.get("LLMKIT_RUNS") or "runs") / ".cache"


def patterns(source: "Source") -> list[str]:
    """What stands in the source's `files`; nothing for a data set by name.

    Raises:
        RecipeError: The source names neither files nor a data set, or both.
    """
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


def format_of(path: File, source: "Source") -> str:
    """The form of a file: the source's `format`, or what its ending says.

    Raises:
        DataError: The ending says JSON, which is one value and not a document a line.
    """
    if source.format == "auto" and files.ending(path)[0] == ".json":
        name = files.shown(path)
        raise DataError(
            f"{name}: a .json file is one value, and nothing says where its documents are",
            hint=f"jq -c '.[]' {name} > {name}l; or set `format: jsonl` (an object a line) or `format: text`",
        )
    return source.format if source.format != "auto" else _FORMATS.get(files.ending(path)[0], "text")
