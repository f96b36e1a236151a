"""Labelled rows, kept once: each a line of JSON, with what is known of it before training: its length, what is learned.

Shapes: N rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llmkit.data.npy import NpyWriter
from llmkit.data.rows import Ints
from llmkit.durable import read_manifest, write_file, write_folder
from llmkit.errors import DataError

LabelledRow = dict[str, Any]
"""One row in its task's canonical form, with its `place`; from the loader also `seed`."""

Part = Literal["train", "held_out"]


@dataclass(frozen=True)
class Measured:
    """Rows with what encoding them showed.

    Attributes:
        rows: The rows.
        lengths: Tokens of each, as the model reads it.
        targets: Targets of each.
        cut: Tokens of each that did not fit and were cut off.
        groups: The number of what each was made of, rising: windows of one text have the same.
        num_dropped: Rows that were left out because they are too long.
        num_unusable: Rows that were left out because the task cannot use them.
        num_passed_over: Answers in the rows that are not learned, as they melt into what is before them.
    """

    rows: Sequence[LabelledRow]
    lengths: Sequence[int]
    targets: Sequence[int]
    cut: Sequence[int]
    groups: Sequence[int]
    num_dropped: int = 0
    num_unusable: int = 0
    num_passed_over: int = 0

    def facts(self) -> dict[str, Any]:
        """Counts for plan and report."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        return {
            "num_rows": len(self.rows),
            "num_tokens": int(lengths.sum()),
            "num_targets": int(sum(self.targets)),
            "longest": int(lengths.max(initial=0)),
            "num_idle": int(sum(count == 0 for count in self.targets)),
            "num_cut": int(sum(cut > 0 for cut in self.cut)),
            "tokens_cut": int(sum(self.cut)),
            "num_passed_over": self.num_passed_over,
        }


class RowStore(Protocol):
    """Rows by number, with their lengths."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each row [N]."""

    @property
    def groups(self) -> Ints:
        """The number of what each row was made of [N]; rows with the same one belong together."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> LabelledRow: ...


class RowsHeld:
    """Rows that are in memory."""

    def __init__(self, measured: Measured) -> None:
        self.lengths: Ints = np.asarray(measured.lengths, dtype=np.int64)
        self.groups: Ints = np.asarray(measured.groups, dtype=np.int64)
        self._rows = measured.rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> LabelledRow:
        return self._rows[number]


class Samples:
    """The rows of one part, read when they are asked for.

    Args:
        folder: What `write_samples` made.
        part: Which part of it.

    Attributes:
        lengths: Tokens of each row [N].
        targets: Targets of each row [N].
        groups: The number of what each row was made of [N].
        facts: As of `Measured.facts`.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self.folder = folder
        self.part = part
        self.lengths: Ints = np.load(folder / f"{part}-lengths.npy")
        self.targets: Ints = np.load(folder / f"{part}-targets.npy")
        self.groups: Ints = np.load(folder / f"{part}-groups.npy")
        self.facts: Mapping[str, Any] = read_manifest(folder)["parts"][part]
        self._ends: Ints = np.load(folder / f"{part}-ends.npy")
        self._text: Any = None

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> LabelledRow:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        start = int(self._ends[number - 1]) if number else 0
        row: LabelledRow = json.loads(bytes(self._bytes()[start : int(self._ends[number])]))
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_text": None}  # each process maps the file itself

    def _bytes(self) -> Any:
        if self._text is None:
            path = self.folder / f"{self.part}.jsonl"
            self._text = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        return self._text


def write_samples(folder: Path, parts: Mapping[Part, Measured], facts: Mapping[str, Any]) -> None:
    """Keep rows in a folder, with a manifest of `facts` and the counts of each part.

    Raises:
        DataError: There is no row to train on.
    """
    if not parts["train"].rows:
        raise DataError("no row is left to train on", hint="look at what was left out, above")
    manifest = {**facts, "parts": {name: part.facts() for name, part in parts.items()}}
    with write_folder(folder, facts=manifest) as temporary:
        for name, part in parts.items():
            lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in part.rows]
            write_file(temporary / f"{name}.jsonl", b"".join(lines))
            ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
            arrays = {"ends": ends, "lengths": part.lengths, "targets": part.targets, "groups": part.groups}
            for what, values in arrays.items():
                _write_array(temporary / f"{name}-{what}.npy", np.asarray(values, dtype=np.int64))


def _write_array(path: Path, values: Ints) -> None:
    writer = NpyWriter(path, np.dtype(np.int64))
    writer.append(values)
    writer.close()
