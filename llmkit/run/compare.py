"""Whether two runs made the same: tensors, losses and samples, bit for bit or to rounding. No torch is needed."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.errors import CorruptError
from llmkit.report.run_log import read_metrics, read_samples
from llmkit.train.steps import checkpoint_path

_BYTES_AT_ONCE = 2**26
_SMALLEST_MOVE = 1e-4
"""Training that moves the weights by less than this share of their norm is taken to move them by that much: else the
rounding of each update would count."""
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Finding:
    """What came of comparing one kind of thing.

    Attributes:
        what: `losses`, `weights`, ...
        compared: How many of what: `16 records`; empty when neither run has any, which may be right.
        first: What differs first, in words; empty when nothing does.
        step: The step at which it differs, where it has one.
        largest: The largest difference in numbers; infinite where there is none in numbers.
        apart: What is held against a tolerance. Of figures, the largest difference relative to themselves; of weights,
            the norm of all differences as a share of what training has moved them since the two runs parted; of the
            optimizer, the norm of the differences relative to the tensors, of its worst kind of tensor. Never finite
            where two things cannot be compared in numbers.
        unlike: Whether something is there on one side only, in another number, type or shape: no rounding does that.
    """

    what: str
    compared: str
    first: str = ""
    step: int | None = None
    largest: float = 0.0
    apart: float = 0.0
    unlike: bool = False

    @property
    def same(self) -> bool:
        """Whether nothing differs, to the last bit."""
        return not self.first

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `same` is None where there was nothing to compare."""
        return {**asdict(self), "same": self.same if self.compared or self.first else None}


def compare_records(one: Path, other: Path, *, what: str, key: str) -> Finding:
    """The records of two run folders that hold `key`: all their figures but times.

    Args:
        one: A run folder.
        other: Another.
        what: The finding's name.
        key: `train/loss` or `eval/loss`.
    """
    a, b = (_figures(folder, key) for folder in (one, other))
    compared = _count(a, "record")
    numbers = [Counter(step for step, _ in records) for records in (a, b)]
    uneven = sorted(step for step in {*numbers[0], *numbers[1]} if numbers[0][step] != numbers[1][step])
    if uneven:
        step = uneven[0]
        text = (
            f"of step {step} one of the runs has {numbers[0][step]} and the other {numbers[1][step]} records"
        )
        return Finding(what, compared, text, step, math.inf, math.inf, unlike=True)
    differing = [
        (step, name, x.get(name), y.get(name))
        for (step, x), (_, y) in zip(a, b, strict=True)
        for name in sorted({*x, *y})
        if x.get(name) != y.get(name)
    ]
    if not differing:
        return Finding(what, compared)
    step, name, *values = differing[0]
    largest = max((_apart(x, y) for _, n, x, y in differing if n == key), default=0.0)
    text = f"step {step}: {name} is {values[0]!r} and {values[1]!r}"
    return Finding(what, compared, text, step, largest, largest)


def compare_samples(one: Path, other: Path) -> Finding:
    """What the models of two run folders wrote."""
    a, b = read_samples(one), read_samples(other)
    compared = _count(a, "text")
    if len(a) != len(b):
        text = f"{len(a)} texts and {len(b)}"
        return Finding("samples", compared, text, None, math.inf, math.inf, unlike=True)
    for x, y in zip(a, b, strict=True):
        if x != y:
            text = f"step {x.get('step')}: after {x.get('prompt')!r} another text"
            return Finding("samples", compared, text, x.get("step"), math.inf, math.inf)
    return Finding("samples", compared)


def compare_tensors(one: Path, other: Path, *, what: str, files: str, moved: float | None = None) -> Finding:
    """The tensors in the safetensors files of two folders.

    Args:
        one: A folder.
        other: Another.
        what: The finding's name.
        files: Which files, such as `model*.safetensors`.
        moved: The norm that the difference is a share of; None: that of the tensors of `one`, each kind (the first
            part of the names) for itself.

    Raises:
        CorruptError: A file cannot be read, or there is none.
    """
    a, b = (read_tensors(folder, files) for folder in (one, other))
    compared = _count(a, "tensor")
    alone = sorted(a.keys() ^ b.keys())
    if alone:
        text = f"only one of the runs has {alone[0]}"
        return Finding(what, compared, text, None, math.inf, math.inf, unlike=True)
    differing = [name for name in sorted(a) if not a[name].same_bits(b[name])]
    if not differing:
        return Finding(what, compared)
    by = {name: a[name].largest_difference(b[name]) for name in differing}
    text = f"{differing[0]} differs by {by[differing[0]]:.2e}"
    if len(differing) > 1:
        text += f", and {len(differing) - 1:,} more"
    unlike = any(not a[name].is_like(b[name]) for name in differing)
    apart = _norm_ratio(a, b) if moved is None else norm_of_difference(a, b) / max(moved, 1e-300)
    return Finding(what, compared, text, None, max(by.values()), apart, unlike)


def distance_moved(start: Path, end: Path) -> float:
    """The norm of what training has added to the weights between two checkpoints, at least `_SMALLEST_MOVE` of theirs.

    Raises:
        CorruptError: A file cannot be read, or there is none.
    """
    a, b = (read_tensors(folder, "model*.safetensors") for folder in (start, end))
    return max(norm_of_difference(a, b), _SMALLEST_MOVE * _norm(b))


def norm_of_difference(a: "Tensors", b: "Tensors") -> float:
    """The 2-norm of all differences of tensors that both have; infinite where one cannot be formed."""
    return math.hypot(*(tensor.norm_of_difference(b[name]) for name, tensor in a.items() if name in b))


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, its bytes mapped and not read."""

    dtype: str
    shape: tuple[int, ...]
    content: npt.NDArray[np.uint8]

    def same_bits(self, other: "Tensor") -> bool:
        """Whether type, shape and every bit are the same: also of NaN, and a zero's sign."""
        if not self.is_like(other):
            return False
        return all(np.array_equal(a, b) for a, b in self._pieces(other))

    def largest_difference(self, other: "Tensor") -> float:
        """The largest absolute difference; infinite where numbers cannot be compared."""
        if not (self.is_like(other) and self.is_float):
            return 0.0 if self.same_bits(other) else math.inf
        return max((float(np.abs(apart).max()) for apart in self._differences(other)), default=0.0)

    def norm_of_difference(self, other: "Tensor") -> float:
        """The 2-norm of the difference; infinite where numbers cannot be compared."""
        if not (self.is_like(other) and self.is_float):
            return 0.0 if self.same_bits(other) else math.inf
        return math.hypot(*(float(np.linalg.norm(apart)) for apart in self._differences(other)))

    def norm(self) -> float:
        """The 2-norm of its numbers; 0 of what is no floating point."""
        if not self.is_float:
            return 0.0
        return math.hypot(*(float(np.linalg.norm(_numbers(a, self.dtype))) for a, _ in self._pieces(self)))

    def is_like(self, other: "Tensor") -> bool:
        """Whether type and shape are the same."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)

    @property
    def is_float(self) -> bool:
        """Whether it holds floating point."""
        return self.dtype in (*_FLOATS, "BF16")

    def _differences(self, other: "Tensor") -> Iterator[npt.NDArray[np.float64]]:
        """Piece by piece; infinite where a number is not finite on either side."""
        for a, b in self._pieces(other):
            with np.errstate(invalid="ignore"):
                apart = _numbers(a, self.dtype) - _numbers(b, self.dtype)
            yield np.where(np.isfinite(apart), apart, math.inf)

    def _pieces(self, other: "Tensor") -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        for start in range(0, len(self.content), _BYTES_AT_ONCE):
            stop = start + _BYTES_AT_ONCE
            yield self.content[start:stop], other.content[start:stop]


Tensors = Mapping[str, Tensor]


def read_tensors(folder: Path, files: str) -> dict[str, Tensor]:
    """The tensors by name in all of the folder's safetensors files that `files`, a pattern, matches.

    Raises:
        CorruptError: A file cannot be read, or there is none, or there is no tensor in them.

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
    if not found:
        raise CorruptError(f"{folder}: {files} holds no tensor")
    return found


def _figures(folder: Path, key: str) -> Sequence[tuple[int, Mapping[str, Any]]]:
    """Each record that has `key`, by steps: the step, and its figures without times and speeds."""
    return sorted(
        (
            (
                record["step"],
                {name: value for name, value in record.items() if name.startswith(("train/", "eval/"))},
            )
            for record in read_metrics(folder)
            if key in record
        ),
        key=lambda one: one[0],
    )


def _count(things: Sized, name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}" if things else ""


def _norm(tensors: Tensors) -> float:
    return math.hypot(*(tensor.norm() for tensor in tensors.values()))


def _norm_ratio(a: Tensors, b: Tensors) -> float:
    """The norm of the differences as a share of that of `a`, of the kind of tensors for which it is the largest."""
    ratios = []
    for kind in {name.split(".")[0] for name in a}:
        mine = {name: tensor for name, tensor in a.items() if name.split(".")[0] == kind}
        ratios.append(norm_of_difference(mine, b) / max(_norm(mine), 1e-300))
    return max(ratios)


def _numbers(content: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "BF16":  # the upper half of a float32
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return content.view(_FLOATS[dtype]).astype(np.float64)


def _apart(a: Any, b: Any) -> float:
    """Two figures' relative difference."""
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (a, b)):
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def compare_runs(one: Path, other: Path, step: int, *, moved: float | None = None) -> Sequence[Finding]:
    """All that two finished runs left: losses, weights, optimizer, export, samples.

    Args:
        one: A run folder.
        other: Another.
        step: Their last step, whose checkpoint both have.
        moved: How far training has moved the weights since the runs parted, from `distance_moved`.

    Raises:
        CorruptError: Something is missing or not readable.
    """
    saved = [checkpoint_path(folder / "checkpoints", step) for folder in (one, other)]
    models = [folder / "model" for folder in (one, other)]
    losses = compare_records(one, other, what="losses", key="train/loss")
    return [
        losses if losses.compared else replace(losses, first="neither run has recorded one", unlike=True),
        compare_records(one, other, what="held-out", key="eval/loss"),
        compare_tensors(*saved, what="weights", files="model*.safetensors", moved=moved),
        compare_tensors(*saved, what="optimizer", files="optimizer*.safetensors"),
        compare_tensors(*models, what="export", files="*.safetensors", moved=moved),
        compare_samples(one, other),
    ]
