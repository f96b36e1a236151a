"""Finding recipes: a path, stdin, or the name of one that ships with llmkit."""

import sys
from pathlib import Path

from llmkit.errors import RecipeError
from llmkit.recipe.positions import Kind, Text
from llmkit.recipe.problems import as_error
from llmkit.recipe.reading import UnreadableError, decode
from llmkit.registry import nearest

_HERE = Path(__file__).resolve().parent


def packaged_folder() -> Path:
    """The folder of shipped recipes: inside the package, or beside it in a source checkout."""
    inside = _HERE / "packaged"
    return inside if inside.is_dir() else _HERE.parent.parent / "recipes"


def packaged_names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in packaged_folder().glob("*.yaml"))


def find_recipe(source: str, base: Path | None = None) -> Path:
    """The file that a path or a shipped recipe's name stands for.

    Args:
        source: A path, tried from `base` and from the current folder, or a shipped name.
        base: The folder of the recipe that extends this one.

    Raises:
        RecipeError: There is no such recipe; the message lists those there are.
    """
    folders = [base, Path()] if base is not None else [Path()]
    for folder in folders:
        path = folder / Path(source).expanduser()
        if _is_file(path):
            return path
    shipped = packaged_folder() / f"{source.removesuffix('.yaml')}.yaml"
    if "/" not in source and _is_file(shipped):
        return shipped
    raise RecipeError(f"there is no recipe `{source}`", hint=_hint(source))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _hint(source: str) -> str:
    names = packaged_names()
    here = sorted(path.name for path in Path().glob("*.yaml"))
    close = nearest(source, [*names, *here])
    guess = f"did you mean `{close}`? " if close else ""
    return f"{guess}shipped recipes: {', '.join(names)}; `llmkit init gpt my.yaml` makes one of your own"


def read_text(path: Path, label: str, kind: Kind) -> Text:
    """The text of a recipe file.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {label}: {error.strerror}") from error
    return decoded(content, label, kind)


def read_stdin() -> Text:
    """The text of a recipe on stdin."""
    return decoded(sys.stdin.buffer.read(), "stdin", "file")


def decoded(content: bytes, label: str, kind: Kind) -> Text:
    """Bytes as text.

    Raises:
        RecipeError: They are no text.
    """
    try:
        return Text(label, decode(content, label), kind)
    except UnreadableError as error:
        raise as_error(label, [error.problem]) from error
