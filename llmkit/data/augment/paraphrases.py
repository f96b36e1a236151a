"""Texts said otherwise, made before training and kept in a folder: what `back_translate` puts in place of a text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.data.augment.rows import TEXTS
from llmkit.data.samples import RowStore

FILE = "paraphrases.jsonl"


class Paraphrases:
    """Texts and what may stand for them; nothing stands for a text that is not there.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._known: dict[str, str] = {}
        for line in (folder / FILE).read_bytes().splitlines():
            one = json.loads(line)
            if one["paraphrase"] is not None:
                self._known[one["text"]] = one["paraphrase"]

    def of(self, text: str) -> str:
        """What stands for a text: another one, or itself."""
        return self._known.get(text, text)


def texts_of(rows: RowStore, task: str) -> list[str]:
    """The different texts of a task's rows that may be said otherwise, in the order in which they first come."""
    return list(dict.fromkeys(text for number in range(len(rows)) for text in _texts(rows[number], task)))


def _texts(row: Mapping[str, Any], task: str) -> Iterator[str]:
    yield from (row[name] for name in TEXTS[task] if name in row)


def as_lines(texts: Sequence[str], said: Sequence[tuple[str | None, str]]) -> bytes:
    """A line of JSON for each text: itself, its paraphrase or null, and why there is none."""
    made = [
        {"text": text, "paraphrase": paraphrase, "why": why}
        for text, (paraphrase, why) in zip(texts, said, strict=True)
    ]
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in made)
