"""`llmkit show`: examples as the model gets them, what is learned coloured on a terminal; JSON in a pipe."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, TextIO

from llmkit.cli.show import Terminal, coloured, terminal_of

if TYPE_CHECKING:
    from llmkit.data.chat import MaskedPiece

OPEN, CLOSE = "⟦", "⟧"
"""Around what is learned, where there are no colours."""


@dataclass(frozen=True)
class ShownRow:
    """An example to be shown.

    Attributes:
        place: The file and line it comes from.
        pieces: Its tokens.
        facts: What else is to be said of it, by name: its label, what was cut off.
    """

    place: str
    pieces: "Sequence[MaskedPiece]"
    facts: Mapping[str, Any] = field(default_factory=dict)


def show_rows(
    rows: Sequence[ShownRow],
    *,
    as_json: bool = False,
    stream: TextIO | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Show on stdout what the model gets of each row, and what it learns of it.

    Args:
        rows: The examples.
        as_json: One JSON object a line, as in a pipe, also on a terminal.
        stream: Where to write, by default stdout.
        env: The environment, by default this process's.
    """
    stream = sys.stdout if stream is None else stream
    terminal = None if as_json else terminal_of(stream, os.environ if env is None else env)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for row in rows:
        if terminal is None:
            plain = not encoding.lower().startswith("utf")
            lines = [json.dumps(as_object(row), ensure_ascii=plain)]
        else:
            lines = [heading(row), *(painted(row, terminal) if terminal.tints else marked(row)), ""]
        for line in lines:
            stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def as_object(row: ShownRow) -> dict[str, Any]:
    """What a program wants to know; `tokens`, `ids`, `pieces` and `learned` have an entry for each token."""
    return {
        "place": row.place,
        **row.facts,
        "tokens": [piece.token for piece in row.pieces],
        "ids": [piece.id for piece in row.pieces],
        "pieces": [_content(piece) for piece in row.pieces],
        "learned": [piece.learned for piece in row.pieces],
        "num_tokens": len(row.pieces),
        "num_targets": sum(piece.learned for piece in row.pieces),
    }


def heading(row: ShownRow) -> str:
    """The line above an example: where it is from, how long it is, how much of it is learned."""
    targets = sum(piece.learned for piece in row.pieces)
    share = f" ({targets / len(row.pieces):.0%})" if row.pieces else ""
    parts = [f"{len(row.pieces):,} tokens", f"{targets:,} learned{share}"]
    plain = {name: value for name, value in row.facts.items() if not isinstance(value, list | dict)}
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in plain.items()]
    return f"{row.place}: {', '.join(parts)}"


def painted(row: ShownRow, terminal: Terminal) -> list[str]:
    """Lines no wider than the terminal; each token that is learned on another background than the one before."""
    from llmkit.data.tokenizers.pieces import Piece

    plain = [
        Piece(piece.content, piece.id if piece.learned else None, piece.token, 0, 0) for piece in row.pieces
    ]
    return coloured(plain, terminal)


def marked(row: ShownRow) -> list[str]:
    """Lines with marks around each stretch that is learned."""
    from llmkit.report.formatting import visible

    text = ""
    for is_learned, stretch in groupby(row.pieces, key=lambda piece: piece.learned):
        said = "".join(visible(_content(piece)).replace("\t", "⇥").replace("\n", "⏎\n") for piece in stretch)
        text += f"{OPEN}{said}{CLOSE}" if is_learned else said
    return text.removesuffix("\n").split("\n")


def _content(piece: "MaskedPiece") -> str:
    if isinstance(piece.content, str):
        return piece.content
    return "".join(f"<{byte:02X}>" for byte in piece.content)
