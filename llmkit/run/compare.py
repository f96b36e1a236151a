"""Whether two runs made the same: tensors, losses and samples, bit for bit or to rounding. No torch is needed."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.errors import CorruptError
from llmkit.report.run_log import read_metrics, read_samples

_BYTES_AT_ONCE = 2**26
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Finding:
    """What came of comparing one kind of thing.

    Attributes:
        what: `losses`, `weights`, ...
        compared: How many of what: `16 steps`.
        first: What differs first, in words; empty when nothing does.
        step: The step at which it differs, where it has one.
        largest: The largest difference in numbers; infinite where there is something on one side only.
    """

    what: str
    compared: str
    first: str = ""
    step: int | None = None
    largest: float = 0.0

    @property
    def same(self) -> bool:
        """Whether every bit is."""
        return not self.first

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "same": self.same}


def compare_records(one: Path, other: Path, *, what: str, key: str) -> Finding:
    """The records of two run folders that hold `key`: all their figures but times.

    Args:
        one: A run folder.
        other: Another.
        what: The finding's name.
        key: `train/loss` or `eval/loss`.
    """
    a, b = (_figures(folder, key) for folder in (one, other))
    compared = f"{len(a):,} record{'' if len(a) == 1 else 's'}"
    missing = sorted(a.keys() ^ b.keys())
    if missing:
        text = f"only one of the runs has a record of step {missing[0]}"
        return Finding(what, compared, text, missing[0], math.inf)
    differing = [
        (step, name) for step in sorted(a) for name in sorted(a[step]) if a[step][name] != b[step].get(name)
    ]
    if not differing:
        return Finding(what, compared)
    step, name = differing[0]
    largest = max((_apart(a[at][n], b[at].get(n)) for at, n in differing if n == key), default=0.0)
    text = f"step {step}: {name} is {a[step][name]!r} and {b[step].get(name)!r}"
    return Finding(what, compared, text, step, largest)


def compare_samples(one: Path, other: Path) -> Finding:
    """What the models of two run folders wrote."""
    a, b = read_samples(one), read_samples(other)
    compared = f"{len(a):,} text{'' if len(a) == 1 else 's'}"
    for x, y in zip(a, b, strict=False):
        if x != y:
            text = f"step {x.get('step')}: after {x.get('prompt')!r} another text"
            return Finding("samples", compared, text, x.get("step"), math.inf)
    if len(a) != len(b):
        return Finding("samples", compared, f"{len(a)} texts and {len(b)}", None, math.inf)
    return Finding("samples", compared)


def compare_tensors(one: Path, other: Path, *, what: str, files: str) -> Finding:
    """The tensors in the safetensors files of two folders.

    Args:
        one: A folder.
        other: Another.
        what: The finding's name.
        files: Which files, such as `model*.safetensors`.

    Raises:
        CorruptError: A file cannot be read, or there is none.
    """
    a, b = (read_tensors(folder, files) for folder in (one, other))
    compared = f"{len(a):,} tensor{'' if len(a) == 1 else 's'}"
    alone = sorted(a.keys() ^ b.keys())
    if alone:
        return Finding(what, compared, f"only one of the runs has {alone[0]}", None, math.inf)
    differing = [name for name in sorted(a) if not a[name].same_bits(b[name])]
    if not differing:
        return Finding(what, compared)
    by = {name: a[name].largest_difference(b[name]) for name in differing}
    text = f"{differing[0]} differs by {by[differing[0]]:.2e}"
    if len(differing) > 1:
        text += f", and {len(differing) - 1:,} more"
    return Finding(what, compared, text, None, max(by.values()))


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, its bytes mapped and not read."""

    dtype: str
    shape: tuple[int, ...]
    content: npt.NDArray[np.uint8]

    def same_bits(self, other: "Tensor") -> bool:
        """Whether type, shape and every bit are the same: also of NaN, and a zero's sign."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(np.array_equal(a, b) for a, b in self._pieces(other))

    def largest_difference(self, other: "Tensor") -> float:
        """The largest absolute difference; infinite where numbers cannot be compared."""
        if (self.dtype, self.shape) != (other.dtype, other.shape) or self.dtype not in (*_FLOATS, "BF16"):
            return 0.0 if self.same_bits(other) else math.inf
        largest = 0.0
        for a, b in self._pieces(other):
            apart = np.abs(_numbers(a, self.dtype) - _numbers(b, self.dtype)).max(initial=0.0)
            largest = max(largest, float(apart) if np.isfinite(apart) else math.inf)
        return largest

    def _pieces(self, other: "Tensor") -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        for start in range(0, len(self.content), _BYTES_AT_ONCE):
            stop = start + _BYTES_AT_ONCE
            yield self.content[start:stop], other.content[start:stop]


def read_tensors(folder: Path, files: str) -> dict[str, Tensor]:
    """The tensors by name in all of the folder's safetensors files that `files`, a pattern, matches.

    Raises:
        CorruptError: A file cannot be read, or there is none.

    **Source**: the safetensors format: 8 bytes of length, that much JSON, then the tensors' bytes.
    """
    paths = sorted(folder.glob(files))
    if not paths:
        raise CorruptError(f"{folder}: there is no {files}")
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            content = np.memmap(path, np.uint8, "r")
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = (8 + length + offset for offset in entry["data_offsets"])
                    found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), content[start:stop])
        except (OSError, ValueError, KeyError) as error:
            raise CorruptError(f"{path}: not readable as safetensors ({error})") from error
    return found


def _figures(folder: Path, key: str) -> Mapping[int, Mapping[str, Any]]:
    """Step -> the figures of its record that has `key`, without times and speeds."""
    return {
        record["step"]: {
            name: value for name, value in record.items() if name.startswith(("train/", "eval/"))
        }
        for record in read_metrics(folder)
        if key in record
    }


def _numbers(content: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "BF16":  # the upper half of a float32
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return content.view(_FLOATS[dtype]).astype(np.float64)


def _apart(a: Any, b: Any) -> float:
    """Two figures' relative difference."""
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (a, b)):
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def compare_runs(one: Path, other: Path, step: int) -> Sequence[Finding]:
    """All that two finished runs left: losses, weights, optimizer, export, samples.

    Args:
        one: A run folder.
        other: Another.
        step: Their last step, whose checkpoint both have.

    Raises:
        CorruptError: Something is missing or not readable.
    """
    saved = [folder / "checkpoints" / f"step_{step:08d}" for folder in (one, other)]
    models = [folder / "model" for folder in (one, other)]
    return [
        compare_records(one, other, what="losses", key="train/loss"),
        compare_records(one, other, what="held-out", key="eval/loss"),
        compare_tensors(*saved, what="weights", files="model*.safetensors"),
        compare_tensors(*saved, what="optimizer", files="optimizer*.safetensors"),
        compare_tensors(*models, what="export", files="*.safetensors"),
        compare_samples(one, other),
    ]
