"""The Python standard library as text that every machine has: its sources, or its docstrings as prose."""

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmkit.data.files import shown, unreadable
from llmkit.data.places import FileFault, Tally
from llmkit.errors import MissingError

SOURCES = "stdlib:"
DOCSTRINGS = "stdlib:docs"

_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"),
    *("encodings", "pydoc_data"),  # tables of characters and of help pages, hardly any code
}


def library_files() -> list[Path]:
    """The library's own `.py` files, sorted; without tests, installed packages, IDLE, 2to3 and tables.

    Raises:
        MissingError: This Python comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(root).parent.parts)
    ]
    if not found:
        raise MissingError(
            f"this Python has no standard library sources in {root}",
            hint="use a Python from python.org or uv",
        )
    return found


def docstring_documents(files: list[Path], tally: Tally) -> Iterator[tuple[str, str]]:
    """One document a module: the docstrings of the module, its classes and functions, in order, as prose.

    Yields:
        The file and the text; empty where a module has no docstrings.
    """
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable(path, error) from error
        tally.bytes_read += len(content)
        yield shown(path), _docstrings(content, path)


def _docstrings(content: bytes, path: Path) -> str:
    try:
        module = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        reason = "Python cannot parse it"
        raise FileFault(f"{shown(path)}: {reason} ({error})", reason=reason) from error
    found = [ast.get_docstring(node, clean=False) for node in _in_order(module)]
    return "\n\n".join(inspect.cleandoc(text).strip() for text in found if text and text.strip())


def _in_order(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes that can have a docstring, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _in_order(child)
