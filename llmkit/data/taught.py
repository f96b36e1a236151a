"""What a teacher said, on disk: for each key (a row, or a training position) a line for each position that is learned.

The store is cut into parts of a fixed number of keys. Each is a folder of its own, sealed: a kill leaves whole parts,
and a longer run adds to what a shorter one made.

Shapes: L lines, K outputs that are kept of each, N keys of a part.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.data.loader import MicroBatches, StepExamples, seeded_rows
from llmkit.data.npy import NpyWriter
from llmkit.data.rows import Ints
from llmkit.data.sample_batches import SampleBatches
from llmkit.data.seeds import row_seed
from llmkit.durable import naming_full_disks, one_at_a_time, sweep_beside, verify_folder, write_folder
from llmkit.errors import CorruptError

Floats = npt.NDArray[np.float32]
IDS, LOGS, REST = "taught_ids", "taught_logs", "taught_rest"
"""In an example and in a batch: what the teacher said of its targets."""
_OPEN = 256
_UNLEARNED = -100


@dataclass(frozen=True)
class Lines:
    """What a teacher said of some positions.

    Attributes:
        ids_LK: Its likeliest outputs.
        logs_LK: The logarithms of their probabilities, in nats.
        rest_L: That of all others together; minus infinity where there are none.
    """

    ids_LK: npt.NDArray[Any]
    logs_LK: Floats
    rest_L: Floats

    def __len__(self) -> int:
        return len(self.rest_L)

    def __getitem__(self, some: slice | Ints) -> "Lines":
        return Lines(self.ids_LK[some], self.logs_LK[some], self.rest_L[some])

    def arrays(self) -> dict[str, Any]:
        """As an example has them."""
        return {IDS: self.ids_LK.astype(np.int64), LOGS: np.array(self.logs_LK), REST: np.array(self.rest_L)}


@dataclass
class TaughtStore:
    """The parts of one cache.

    Attributes:
        folder: Its own.
        by: What a key is: `row` or `position`.
        num_keys: Keys that the run needs.
        rows_a_part: Keys of a part.
        top_k: Outputs of a line.
        outputs: Outputs that there are.
    """

    folder: Path
    by: str
    num_keys: int
    rows_a_part: int
    top_k: int
    outputs: int

    def __post_init__(self) -> None:
        self._open: OrderedDict[int, tuple[Ints, Lines]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # each process maps the files itself

    @property
    def num_parts(self) -> int:
        """Parts that the run needs."""
        return -(-self.num_keys // self.rows_a_part)

    def keys(self, part: int) -> range:
        """The keys of a part that the run needs."""
        return range(part * self.rows_a_part, min((part + 1) * self.rows_a_part, self.num_keys))

    def part(self, number: int) -> Path:
        """Where a part lies."""
        return self.folder / f"part-{number:06d}"

    def has(self, number: int) -> bool:
        """Whether a part is there, with all keys that the run needs.

        Raises:
            CorruptError: It is damaged.
        """
        if not self.part(number).is_dir():
            return False
        return int(verify_folder(self.part(number))["stop"]) >= self.keys(number).stop

    def write(self, number: int, made: Iterable[Lines]) -> None:
        """Keep a part, unless another process has meanwhile.

        Args:
            number: Which.
            made: The lines of each of its keys, in their order; asked for only when they are needed.
        """
        ids = np.dtype(np.uint16 if self.outputs <= 1 << 16 else np.uint32)
        with naming_full_disks(self.folder), one_at_a_time(self.folder / f".part-{number:06d}.lock"):
            if self._is_there(number):
                return
            sweep_beside(self.part(number))
            facts = {
                "kind": "what a teacher said",
                "start": self.keys(number).start,
                "stop": self.keys(number).stop,
            }
            with write_folder(self.part(number), facts=facts) as folder:
                files = {
                    "ids": NpyWriter(folder / "ids.npy", ids, width=self.top_k),
                    "logs": NpyWriter(folder / "logs.npy", np.dtype(np.float32), width=self.top_k),
                    "rest": NpyWriter(folder / "rest.npy", np.dtype(np.float32)),
                    "ends": NpyWriter(folder / "ends.npy", np.dtype(np.int64)),
                }
                for lines in made:
                    for name, values in zip(files, (lines.ids_LK, lines.logs_LK, lines.rest_L), strict=False):
                        files[name].append(values)
                    files["ends"].append(np.array([files["rest"].length]))
                for file in files.values():
                    file.close()

    def _is_there(self, number: int) -> bool:
        try:
            return self.has(number)
        except CorruptError:
            return False

    def lines(self, key: int) -> Lines:
        """What the teacher said of a key.

        Raises:
            CorruptError: The cache has no such key.
        """
        number, place = divmod(key, self.rows_a_part)
        ends_N, lines = self._part(number)
        if place >= len(ends_N):
            raise CorruptError(f"{self.part(number)}: it ends before {self.by} {key:,}")
        return lines[slice(int(ends_N[place - 1]) if place else 0, int(ends_N[place]))]

    def _part(self, number: int) -> tuple[Ints, Lines]:
        if number not in self._open:
            folder = self.part(number)
            maps = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "logs", "rest")]
            self._open[number] = np.load(folder / "ends.npy"), Lines(*maps)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def store_of(folder: Path, planned: Mapping[str, Any]) -> TaughtStore:
    """The store that a plan speaks of (`plan.taught`)."""
    names = ("by", "num_keys", "rows_a_part", "top_k", "outputs")
    return TaughtStore(folder, **{name: planned[name] for name in names})


class TaughtBatches:
    """The micro-batches of a step, each example with what the teacher said of it.

    Args:
        batches: The same without it.
        store: Complete.
    """

    def __init__(self, batches: MicroBatches | SampleBatches, store: TaughtStore) -> None:
        self._batches = batches
        self._store = store

    def of_step(self, step: int) -> StepExamples:
        """As of the batches.

        Raises:
            CorruptError: What is kept is of other rows.
        """
        return [
            (
                micro,
                [self._taught(one, key) for one, key in zip(examples, self._keys(step, micro), strict=True)],
            )
            for micro, examples in self._batches.of_step(step)
        ]

    def _keys(self, step: int, micro: int) -> Sequence[int | None]:
        """The key of each example; None of one that stands where there is no row."""
        batches, by_row = self._batches, self._store.by == "row"
        if isinstance(batches, MicroBatches):
            positions, sources, rows = batches.places(step, [micro])
            starts = np.cumsum([0, *batches.rows.sizes])
            return [int(key) for key in (starts[sources] + rows if by_row else positions)]
        numbers = batches.numbers(step)
        group = batches.shares(numbers)[micro]
        return [
            int(numbers[place]) if by_row else step * batches.rows_per_step + place for place in group
        ] or [None]

    def _taught(self, example: Mapping[str, Any], key: int | None) -> dict[str, Any]:
        lines = self._store.lines(0 if key is None else key)
        lines = lines[:0] if key is None else lines
        learned = int((example["targets"] != _UNLEARNED).sum())
        if len(lines) != learned:
            raise CorruptError(
                f"{self._store.folder}: {len(lines)} lines are kept of {self._store.by} {key:,}, which has {learned} "
                "targets",
                hint="remove that folder; the teacher is then asked again",
            )
        return {**example, **lines.arrays()}


def made_up(example: Mapping[str, Any], top_k: int, outputs: int) -> dict[str, Any]:
    """An example with lines that say nothing, of the size of true ones."""
    count = int((example["targets"] != _UNLEARNED).sum())
    rest = np.log1p(-top_k / outputs) if top_k < outputs else -np.inf
    lines = Lines(
        np.tile(np.arange(top_k), (count, 1)),
        np.full((count, top_k), -np.log(outputs), np.float32),
        np.full(count, rest, np.float32),
    )
    return {**example, **lines.arrays()}


def examples_of(
    batches: MicroBatches | SampleBatches, by: str, keys: Sequence[int]
) -> list[Mapping[str, Any]]:
    """The examples that stand for some keys: those of rows, or as they come at training positions."""
    seed, places = batches.order.seed, np.asarray(keys, dtype=np.int64)
    seeds = [row_seed(seed, key) for key in keys]
    if isinstance(batches, MicroBatches):
        rows = batches.rows
        where = rows.locate(places) if by == "row" else batches.order.locate(places)
        found = seeded_rows(rows, *where, seeds, isolate=batches.isolate, other=batches.other)
        return [batches.encode(row) for row in found]
    if by == "row":
        numbers = places.tolist()
    else:
        sources, within = batches.order.locate(places)
        groups = batches.groups
        pairs = zip(sources.tolist(), within.tolist(), strict=True)
        numbers = [w if groups is None else int(groups[s][w]) for s, w in pairs]
    return [batches.encode({**batches.rows[n], "seed": s}) for n, s in zip(numbers, seeds, strict=True)]
