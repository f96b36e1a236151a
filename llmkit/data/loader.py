"""A step's micro-batches: pure functions of the step, the same global batch on any number of devices.

Nothing here has a state to save: step 70,000 is asked for as directly as step 0.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from llmkit.data.loader_workers import LoaderWorkers, shield_from_stop_signals
from llmkit.data.order import RowOrder
from llmkit.data.rows import Ints, Row, Rows
from llmkit.data.seeds import OTHER, held_out_seed, mix_seed, row_seed

Encode = Callable[[Any], Mapping[str, Ints]]
StepExamples = list[tuple[int, list[Mapping[str, Ints]]]]


class Batches(Protocol):
    """What `Prefetcher` prepares."""

    def of_step(self, step: int) -> StepExamples:
        """This rank's `(global micro-batch number, examples)` of a step."""
        ...


class MicroBatches:
    """Deals each step's rows out to ranks.

    Step s holds the training positions [s*R, (s+1)*R) for R = rows_per_step. The step's micro-batch k holds
    its rows [k*m, (k+1)*m) for m = micro_batch_size and goes to rank k % world_size. Each row's `seed` follows from
    the order's seed and the row's position, so what is random about it does not depend on ranks or processes.

    Args:
        rows: Where rows come from.
        order: Which row comes when.
        rows_per_step: R, over all ranks.
        micro_batch_size: m.
        world_size: Number of ranks.
        rank: The rank asked for.
        isolate: See `Rows.take`.
        other: Whether each row also has `other`, the ids of a row that shares no document with it, and
            `other_positions`.
        encode: What is made of each row; by default the row itself.

    Raises:
        ValueError: The ranks cannot share R rows evenly (the plan sees to it that they can).
    """

    def __init__(
        self,
        rows: Rows,
        order: RowOrder,
        *,
        rows_per_step: int,
        micro_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        isolate: bool = False,
        other: bool = False,
        encode: Encode = dict,
    ) -> None:
        if rows_per_step % (micro_batch_size * world_size):
            raise ValueError(
                f"{rows_per_step} rows cannot be shared by {world_size} ranks "
                f"in micro-batches of {micro_batch_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.rows = rows
        self.order = order
        self.rows_per_step = rows_per_step
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.rank = rank
        self.isolate = isolate
        self.other = other
        self.encode = encode

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step over all ranks."""
        return self.rows_per_step // self.micro_batch_size

    def of_step(self, step: int) -> StepExamples:
        """This rank's `(global micro-batch index, examples)` of optimizer step `step`, counted from 0."""
        mine = range(self.rank, self.num_micro, self.world_size)
        positions, sources, rows = self.places(step, mine)
        seeds = [row_seed(self.order.seed, position) for position in positions.tolist()]
        found = seeded_rows(self.rows, sources, rows, seeds, isolate=self.isolate, other=self.other)
        examples = [self.encode(row) for row in found]
        size = self.micro_batch_size
        return [(k, examples[i * size : (i + 1) * size]) for i, k in enumerate(mine)]

    def places(self, step: int, micro: Sequence[int]) -> tuple[Ints, Ints, Ints]:
        """Training position, source and row of each row in these micro-batches of a step, of whatever rank."""
        starts = np.asarray(micro, dtype=np.int64)[:, None] * self.micro_batch_size
        within = (starts + np.arange(self.micro_batch_size)).reshape(-1)
        positions = step * self.rows_per_step + within
        return positions, *self.order.locate(positions)


def evaluation_rows(
    rows: Rows,
    *,
    micro_batch_size: int,
    max_rows: int | None = None,
    world_size: int = 1,
    rank: int = 0,
    isolate: bool = False,
    other: bool = False,
) -> Iterator[list[Row]]:
    """Rows in plain order, each once, the batches dealt to ranks in turn; the last batch may be smaller.

    A row's `seed` follows from its number alone: what is random about it is the same in every evaluation.

    Args:
        rows: The rows, made with `partial=True` so that no token is left out.
        micro_batch_size: Rows in a batch.
        max_rows: At most so many, evenly spaced over all rows; None takes all.
        world_size: Number of ranks.
        rank: The rank asked for. Ranks may get a different number of batches: add sums, never means; and see
            `evaluation_rounds`.
        isolate: See `Rows.take`.
        other: See `MicroBatches`; `other` is empty where nearly all the text is one document.
    """
    index = evenly_spaced(len(rows), max_rows)
    for start in range(rank * micro_batch_size, len(index), world_size * micro_batch_size):
        chosen = index[start : start + micro_batch_size]
        seeds = [held_out_seed(number) for number in chosen.tolist()]
        yield seeded_rows(rows, *rows.locate(chosen), seeds, isolate=isolate, other=other, held_out=True)


def seeded_rows(
    rows: Rows,
    sources: Ints,
    numbers: Ints,
    seeds: Sequence[int],
    *,
    isolate: bool,
    other: bool,
    held_out: bool = False,
) -> list[Row]:
    """Rows with their `seed`, and `other` where it is asked for; see `MicroBatches`.

    Raises:
        DataError: They are not `held_out`, and nearly all the text is one document.
    """
    found = rows.take(sources, numbers, isolate=isolate)
    seeded = [{**row, "seed": np.asarray(seed)} for row, seed in zip(found, seeds, strict=True)]
    if not other:
        return seeded
    places = zip(sources.tolist(), numbers.tolist(), seeds, strict=True)
    take = rows.find_other if held_out else rows.take_other
    nothing: Row = {"ids": np.zeros(0, np.int64), "positions": np.zeros(0, np.int64)}
    others = [take(source, number, mix_seed(seed, OTHER)) or nothing for source, number, seed in places]
    return [
        {**row, "other": one["ids"], "other_positions": one["positions"]}
        for row, one in zip(seeded, others, strict=True)
    ]


def evaluation_rounds(rows: Rows, *, micro_batch_size: int, max_rows: int | None, world_size: int) -> int:
    """Batches of the rank that has most of them; the others have that many or one less."""
    num_rows = len(evenly_spaced(len(rows), max_rows))
    return -(-num_rows // (micro_batch_size * world_size))


def evenly_spaced(num_rows: int, limit: int | None) -> Ints:
    """At most `limit` of 0..num_rows-1, evenly spaced and always the same."""
    if limit is None or limit >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * num_rows // limit


class Prefetcher:
    """Prepares the next steps' batches in a thread, in order; what comes out is what `of_step` gives.

    Use it as a context manager, or iterate to the end: either way the thread and its processes are gone afterwards.

    Args:
        batches: Where the batches come from.
        start: First step.
        stop: The step to end before; None goes on until closed.
        depth: Steps kept ready.
        workers: Processes that prepare them; 0: the thread does it itself.
    """

    def __init__(
        self,
        batches: Batches,
        start: int,
        stop: int | None = None,
        *,
        depth: int = 2,
        workers: int = 0,
    ) -> None:
        self._queue: queue.Queue[tuple[int, StepExamples] | BaseException | None] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        steps = range(start, sys.maxsize if stop is None else stop)
        self._workers = LoaderWorkers(batches.of_step, steps, workers, self._closing)
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, StepExamples]]:
        """The steps in order, each with its batches; an error of the thread is raised here."""
        try:
            while not self._closing.is_set():
                item = self._queue.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """End the thread and wait until it is gone; may be called twice."""
        self._closing.set()
        self._workers.kill()  # the thread may be reading what a worker has not finished writing
        self._thread.join()

    def _work(self) -> None:
        shield_from_stop_signals()  # so that they wake the main thread, whatever it waits for
        try:
            with closing(self._workers.prepared()) as steps:
                for item in steps:
                    self._put(item)
                    if self._closing.is_set():
                        return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: tuple[int, StepExamples] | BaseException | None) -> None:
        # A put that waited forever would keep the thread after its consumer has gone.
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
