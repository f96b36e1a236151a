"""Work in parts: each is done by one process, kept durably when it is finished, and never done again.

A stage of data work is a `Work`, a small picklable value, and a number of parts. Part 17 of a stage is the folder
`part-000017` in the stage's store, published whole or not at all, so a run that is killed at any moment goes on from
the finished parts, and the result does not depend on how many processes there are or in which order they finish.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmkit.durable import naming_full_disks, sweep, verify_folder, write_folder
from llmkit.errors import CorruptError, LlmkitError, RunError
from llmkit.launch.local import end_with_parent

if TYPE_CHECKING:
    from llmkit.data.cluster import Cluster
    from llmkit.data.cluster import Engine as Carrier

Fill = Callable[[int, Path], Mapping[str, object]]
"""Makes one part: fills an empty folder and returns facts for its manifest."""

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""

_SETTLE_S = 10.0
_SPAWN = multiprocessing.get_context("spawn")


class Work(Protocol):
    """What is done to every part of a stage; picklable, for it goes to other processes."""

    def open(self) -> Fill:
        """Load what the work needs (a tokenizer, a model), once a process; then parts can be made."""


@dataclass(frozen=True)
class Stage:
    """One pass over the parts.

    Attributes:
        work: What is done.
        store: Where finished parts are kept; its name says what made them.
        sizes: Bytes of each part's input, for progress.
        worth_bytes: Input from which on it pays to start one more process for it.
    """

    work: Work
    store: Path
    sizes: Sequence[int]
    worth_bytes: int = 0

    def folder(self, number: int) -> Path:
        """Where a part is, or will be."""
        return self.store / f"part-{number:06d}"

    def is_done(self, number: int) -> bool:
        """Whether the part is there, every byte of it as it was written."""
        try:
            verify_folder(self.folder(number))
        except CorruptError:
            return False
        return True


@dataclass(frozen=True)
class Engine:
    """What does the work.

    Attributes:
        workers: Processes; with one, the work is done in the process that asks for it.
        carrier: Another engine of `cluster.py` that runs them; None: this process starts them.
        cluster: What that engine has to know.
    """

    workers: int = 1
    carrier: "Carrier | None" = None
    cluster: "Cluster | None" = None


HERE = Engine()


def finish(stage: Stage, engine: Engine = HERE, *, progress: Progress | None = None) -> list[Path]:
    """Make the parts that are not there yet, and return the folders of all, in order.

    Args:
        stage: What to do.
        engine: What does it.
        progress: Told how far it is, by bytes of input.

    Raises:
        LlmkitError: What went wrong in a worker, as it was raised there.
        RunError: A worker died.
    """
    numbers = range(len(stage.sizes))
    if stage.store.is_dir() and engine.carrier is None:
        sweep(stage.store)  # an engine's jobs of an earlier call may still write there
    missing = [number for number in numbers if not stage.is_done(number)]
    total = sum(stage.sizes)
    todo = sum(stage.sizes[number] for number in missing)
    done = total - todo
    if engine.carrier is not None:
        return _elsewhere(stage, missing, engine, engine.carrier, progress)
    worth = todo // stage.worth_bytes if stage.worth_bytes else len(missing)
    workers = min(engine.workers, len(missing), worth)
    finished = _here(stage, missing) if workers <= 1 else _apart(stage, missing, workers)
    for number in finished:
        done += stage.sizes[number]
        if progress is not None:
            progress(done, total)
    return [stage.folder(number) for number in numbers]


class MakePart:
    """Makes one part unless it is there: what an engine that spreads work over machines calls, again and again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._fill: Fill | None = None

    def __call__(self, number: int) -> None:
        """Make part `number`."""
        if self._stage.is_done(number):
            return
        if self._fill is None:
            self._fill = self._stage.work.open()
        _make(self._fill, self._stage, number)


def _elsewhere(
    stage: Stage, missing: Sequence[int], engine: Engine, carrier: "Carrier", progress: Progress | None
) -> list[Path]:
    from llmkit.data.cluster import run_tasks

    logs = stage.store.parent.parent / "logs" / stage.store.name
    total, before = sum(stage.sizes), sum(stage.sizes) - sum(stage.sizes[number] for number in missing)

    def told(done: int, tasks: int) -> None:
        if progress is not None:
            progress(before + (total - before) * done // max(1, tasks), total)

    run_tasks(
        MakePart(stage),
        missing,
        engine=carrier,
        workers=engine.workers,
        logs=logs,
        cluster=engine.cluster,
        progress=told,
    )
    if progress is not None:
        progress(sum(stage.sizes), sum(stage.sizes))
    return [stage.folder(number) for number in range(len(stage.sizes))]


def _make(fill: Fill, stage: Stage, number: int) -> None:
    facts: dict[str, object] = {"kind": "part", "part": number}
    with naming_full_disks(stage.store), write_folder(stage.folder(number), facts=facts) as folder:
        facts.update(fill(number, folder))


def _here(stage: Stage, numbers: Sequence[int]) -> Iterable[int]:
    fill = stage.work.open() if numbers else None
    for number in numbers:
        assert fill is not None
        _make(fill, stage, number)
        yield number


def _apart(stage: Stage, numbers: Sequence[int], workers: int) -> Iterable[int]:
    """Give the parts out one by one to worker processes; a worker that is done gets the next."""
    waiting = list(reversed(numbers))
    crew: dict[Connection, _Worker] = {}
    try:
        for _ in range(workers):
            worker = _Worker(stage)
            crew[worker.connection] = worker
        for worker in crew.values():
            worker.give(waiting.pop())
        while crew:
            for connection in wait(list(crew)):
                worker = crew[connection]  # type: ignore[index]
                yield worker.take()
                if waiting:
                    worker.give(waiting.pop())
                else:
                    crew.pop(worker.connection).dismiss()
    except LlmkitError:
        until = time.monotonic() + _SETTLE_S
        for worker in crew.values():
            worker.settle(until)
        raise
    finally:
        for worker in crew.values():
            worker.end()


class _Worker:
    """A process that makes one part after the other."""

    def __init__(self, stage: Stage) -> None:
        self._store = stage.store
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, stage, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        self._number = -1

    def give(self, number: int) -> None:
        self._number = number
        # If the worker died meanwhile, taking its answer tells how.
        with suppress(BrokenPipeError):
            self.connection.send(number)

    def take(self) -> int:
        """The part just made.

        Raises:
            LlmkitError: What the worker met.
            RunError: It died.
        """
        try:
            error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if error is not None:
            raise error
        return self._number

    def dismiss(self) -> None:
        with suppress(BrokenPipeError):
            self.connection.send(None)
        self._process.join(timeout=10)
        self.end()

    def settle(self, until: float) -> None:
        """After another worker's error: let this one finish what it has in hand, if that takes seconds only."""
        if self._process.is_alive():
            self.connection.poll(max(0.0, until - time.monotonic()))

    def end(self) -> None:
        """Parts are published whole, so a worker can be ended at any moment."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.connection.close()

    def _died(self) -> RunError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"ended with {code}"
        )
        memory = code == -signal.SIGKILL
        return RunError(
            f"a worker process {how} while it made part {self._number} of {self._store.name}",
            hint="The parts that are finished are kept: run the same command again"
            + (", with fewer `--workers` if memory was short." if memory else "."),
        )


def _serve(connection: Connection, stage: Stage, parent: int) -> None:
    """What a worker process does; Ctrl-C reaches the parent too, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (tie := end_with_parent(parent)) is not None:
        tie()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        fill = stage.work.open()
        while (number := _received(connection)) is not None:
            _make(fill, stage, number)
            connection.send(None)
    except Exception as error:
        connection.send(sendable(error))


def _received(connection: Connection) -> int | None:
    """The next part to make; None when there is none, or when the parent is gone."""
    try:
        number: int | None = connection.recv()
    except EOFError:
        return None
    return number


def sendable(error: Exception) -> Exception:
    """An error of ours or of the system as it is; a bug with the place where it happened."""
    if isinstance(error, LlmkitError):
        return _rebuilt(error)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return RuntimeError("in a worker process:\n" + "".join(traceback.format_exception(error)))


def _rebuilt(error: LlmkitError) -> LlmkitError:
    """The same error without what hangs on it, such as its cause, which may not be picklable."""
    copy = type(error)(error.message)
    copy.hint = error.hint
    return copy
