"""`llmkit tokenize --show`: the pieces of a text, coloured on a terminal, as JSON in a pipe."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.data.tokenizers.pieces import Piece

FIRST_BYTES = 10_000
"""How much of a file is shown on a terminal."""

_RESET = "\x1b[0m"
_UNDERLINED = "4;"
# Letters in black on light tints, so that they can be read whatever the terminal's own colours are.
_PALE = tuple(f"38;5;16;48;5;{tint}" for tint in (153, 223, 158, 183))
_PLAIN = tuple(f"30;{tint}" for tint in (46, 43, 42, 45))
_MARKS = "|¦‖"


@dataclass(frozen=True)
class Terminal:
    """What a terminal can do.

    Attributes:
        columns: Its width.
        tints: Codes of the backgrounds to alternate between; none where colours are not wanted or not there.
    """

    columns: int
    tints: Sequence[str] = ()


def show_pieces(
    subject: str,
    tokenizer: str,
    *,
    as_json: bool = False,
    stream: TextIO | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Show on stdout how a tokenizer cuts a text.

    Args:
        subject: The text; a file's name for the text in it, `-` for the text on stdin.
        tokenizer: A tokenizer's folder or name.
        as_json: One JSON object, as in a pipe, also on a terminal.
        stream: Where to write, by default stdout.
        env: The environment, by default this process's.

    Raises:
        DataError: The file cannot be read or is no text in UTF-8.
        UsageError: The text is no Unicode, or the tokenizer cannot tell its pieces.
        MissingError: There is no such tokenizer.
    """
    stream = sys.stdout if stream is None else stream
    terminal = None if as_json else terminal_of(stream, os.environ if env is None else env)
    text, is_all = read_text(subject, FIRST_BYTES if terminal else None)
    found = _pieces(text, tokenizer)
    if terminal is None:
        plain = not (stream.encoding or "utf-8").lower().startswith("utf")
        _write(stream, [json.dumps(as_object(text, found), ensure_ascii=plain)])
        return
    lines = coloured(found, terminal) if terminal.tints else separated(found)
    _write(stream, [*lines, counted(text, found, is_all=is_all)])


def _pieces(text: str, name: str) -> "list[Piece]":
    from llmkit.data.tokenizers import open_tokenizer

    tokenizer = open_tokenizer(name)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UsageError(f"{name} is written in Python and does not tell its pieces")

    from llmkit.data.tokenizers.pieces import pieces

    return pieces(tokenizer, text)


def terminal_of(stream: TextIO, env: Mapping[str, str]) -> Terminal | None:
    """What the terminal can do that `stream` goes to; None if it goes elsewhere."""
    if not stream.isatty():
        return None
    columns = max(20, shutil.get_terminal_size().columns)
    name = env.get("TERM", "")
    if env.get("NO_COLOR") or name in ("", "dumb", "unknown"):
        return Terminal(columns)
    many = "256" in name or bool(env.get("COLORTERM"))
    return Terminal(columns, _PALE if many else _PLAIN)


def read_text(subject: str, limit: int | None) -> tuple[str, bool]:
    """The text that is meant, a file's up to `limit` bytes, and whether that is all of it.

    Raises:
        DataError: The file cannot be read or is no text in UTF-8.
        UsageError: The text is no Unicode.
    """
    from llmkit.data.files import read_chunks
    from llmkit.data.places import Tally
    from llmkit.data.text import decode

    if subject == "-":
        return _limited(decode(iter(lambda: sys.stdin.buffer.read(2**16), b""), "utf-8", "stdin"), limit)
    if os.path.isfile(subject):  # not pathlib's, which fails where a text is too long for a path
        return _limited(decode(read_chunks(Path(subject), Tally()), "utf-8", subject), limit)
    try:
        subject.encode()
    except UnicodeEncodeError as error:
        half = subject[error.start]
        raise UsageError(f"the text to show is no Unicode: {half!r} is half a character") from error
    return subject, True


def _limited(chunks: Iterable[str], limit: int | None) -> tuple[str, bool]:
    if limit is None:
        return "".join(chunks), True
    read = b""
    for chunk in chunks:
        read += chunk.encode()
        if len(read) > limit:
            # What the limit leaves of a character goes.
            return read[:limit].decode(errors="ignore"), False
    return read.decode(), True


def as_object(text: str, pieces: "Sequence[Piece]") -> dict[str, Any]:
    """What a program wants to know.

    `tokens`, `ids`, `pieces` and `offsets` (begin and end in bytes of UTF-8) have an entry for each token; text that
    is in no token is between the offsets. A piece that ends inside a character is written as `<E4><BD>`.
    """
    real = [piece for piece in pieces if piece.id is not None]
    return {
        "text": text,
        "tokens": [piece.token for piece in real],
        "ids": [piece.id for piece in real],
        "pieces": [_content(piece) for piece in real],
        "offsets": [[piece.start, piece.end] for piece in real],
        "characters": len(text),
        "bytes": len(text.encode()),
    }


def _content(piece: "Piece") -> str:
    return (
        piece.content
        if isinstance(piece.content, str)
        else "".join(f"<{byte:02X}>" for byte in piece.content)
    )


def counted(text: str, pieces: "Sequence[Piece]", *, is_all: bool = True) -> str:
    """The last line: tokens, characters, bytes per token; and what the lines above do not show."""
    from llmkit.report.formatting import format_bytes

    tokens, size = sum(piece.id is not None for piece in pieces), len(text.encode())
    parts = [f"{tokens:,} tokens", f"{len(text):,} characters", f"{size:,} bytes"]
    parts += [f"{size / tokens:.2f} bytes per token"] if tokens else []
    if left := len(pieces) - tokens:
        parts.append(f"{left:,} stretches in no token")
    return ", ".join(parts) + (
        "" if is_all else f"; the first {format_bytes(size)} only, in a pipe all of it"
    )


def separated(pieces: "Sequence[Piece]") -> list[str]:
    """Lines with a mark between pieces, one that the text does not hold if there is such a one."""
    shown = [_visible(piece) for piece in pieces]
    mark = next((mark for mark in _MARKS if not any(mark in one for one in shown)), _MARKS[0])
    lines = mark.join(shown).split("\n")
    return lines if lines[-1] else lines[:-1]


def coloured(pieces: "Sequence[Piece]", terminal: Terminal) -> list[str]:
    """Lines no wider than the terminal, each piece on another background than the one before."""
    stretches, tint = [], 0
    for piece in pieces:
        style = ""
        if piece.id is not None:
            style, tint = terminal.tints[tint % len(terminal.tints)], tint + 1
            style = style if isinstance(piece.content, str) else _UNDERLINED + style
        stretches.append((_visible(piece), style))
    return painted(stretches, terminal.columns)


def painted(stretches: Iterable[tuple[str, str]], columns: int) -> list[str]:
    """Lines no wider than `columns`, of stretches of text, each with the codes of its colours.

    The lines are cut here, by the width of each character, for a terminal that wraps by itself may fill the rest
    of the line with the colour.
    """
    lines, column = [""], 0
    for text, style in stretches:
        parts, column = _in_columns(text, column, columns)
        lines[-1] += _painted(parts[0], style)
        lines += [_painted(part, style) for part in parts[1:]]
    return lines if lines[-1] else lines[:-1]


def _in_columns(text: str, column: int, columns: int) -> tuple[list[str], int]:
    """`text` cut at line ends and where the terminal's edge is, if it begins in `column`; and where it ends."""
    from llmkit.report.formatting import cell_width

    parts = [""]
    for char in text:
        width = cell_width(char) if char != "\n" else 0
        if char == "\n" or column + width > columns:
            parts.append("")
            column = 0
        if char != "\n":
            parts[-1] += char
            column += width
    return parts, column


def _painted(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}{_RESET}" if text and style else text


def _visible(piece: "Piece") -> str:
    """The piece with signs for what has no ink; each line end is followed by a real one."""
    from llmkit.report.formatting import visible

    if not piece.content and piece.id is not None:
        return "∅"
    return visible(_content(piece)).replace("\t", "⇥").replace("\n", "⏎\n")


def _write(stream: TextIO, lines: Iterable[str]) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()
