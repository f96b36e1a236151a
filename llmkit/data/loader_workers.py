"""Processes that prepare the next steps' examples; what comes out is what one process would have made."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

from llmkit.data.pipeline import sendable
from llmkit.errors import RunError
from llmkit.launch.crew import AwakeClock, Limits, describe_stopped, is_stopped
from llmkit.launch.local import end_with_parent
from llmkit.launch.signals import STOP_SIGNALS

T = TypeVar("T")

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that it has not
_AHEAD = 2
_LOOK_S = 0.1
_WATCH_S = 0.2


class LoaderWorkers(Generic[T]):
    """Calls a function of the step in several processes and yields what it gives, in the order of the steps.

    Worker i of n takes every n-th step from the i-th on, so nothing depends on which is faster, and there is no
    history of any generator to depend on: a step's result follows from its number. Workers do not react to the
    signals that ask a run to stop, for the step under way needs what they prepare. They hold nothing that could be
    lost, so they are ended by SIGKILL, and by the kernel when the thread that started them ends in whatever way. One
    that is stopped (SIGSTOP, a debugger) for too long is killed, else the run would wait for it for ever.

    Args:
        of_step: Picklable; called in the workers.
        steps: Which steps.
        workers: Processes; 0: the calling thread does the work itself.
        leaving: Once set, nothing more is yielded.
        stopped_s: Seconds for a process that was stopped to be continued; while this one is stopped too, none pass.
    """

    def __init__(
        self,
        of_step: Callable[[int], T],
        steps: Sequence[int],
        workers: int,
        leaving: threading.Event,
        *,
        stopped_s: float = Limits.stopped_s,
    ) -> None:
        self._of_step = of_step
        self._steps = steps
        self._leaving = leaving
        self._crew: list[tuple[SpawnProcess, Connection]] = []
        self._workers = min(workers, len(steps))
        self._stopped_s = stopped_s
        self._given_up: tuple[SpawnProcess, float] | None = None
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()

    def prepared(self) -> Generator[tuple[int, T], None, None]:
        """Each step with what the function made of it; to be closed.

        Raises:
            LlmkitError: What the function raised in a worker.
            RunError: A worker died.
        """
        if not self._workers:
            yield from ((step, self._of_step(step)) for step in self._steps)
            return
        with closing(self):
            self._start()
            asked = self._workers * _AHEAD
            for number in range(min(asked, len(self._steps))):
                self._ask(number)
            for number, step in enumerate(self._steps):
                if not self._awaited(number):
                    return
                result = self._take(number)
                if number + asked < len(self._steps):
                    self._ask(number + asked)
                yield step, result

    def close(self) -> None:
        """End the processes; may be called twice."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        self.kill()
        for process, connection in self._crew:
            process.join()
            connection.close()
        self._crew = []

    def kill(self) -> None:
        """Kill the processes, from whatever thread; `prepared`, which may wait for one of them, then ends."""
        for process, _ in list(self._crew):
            process.kill()

    def _start(self) -> None:
        shield_from_stop_signals()
        resource_tracker.ensure_running()  # it unblocks some of them in this thread
        shield_from_stop_signals()
        for _ in range(self._workers):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(theirs, self._of_step, os.getpid()), daemon=True)
            process.start()
            # With our copy of its end closed, the pipe breaks when the worker dies, be it amid a message.
            theirs.close()
            self._crew.append((process, ours))
        # In a thread: who reads a message that a process has not finished writing cannot look at that process.
        self._watcher = threading.Thread(target=self._watch, name="watch-loaders", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Kill a process that has been stopped for too long; who waits for it then finds its pipe broken."""
        clock = AwakeClock()
        stopped_s = {process: 0.0 for process, _ in self._crew}
        while not self._closed.wait(_WATCH_S):
            clock.tick()
            for process in stopped_s:
                is_still = process.pid is not None and is_stopped(process.pid)
                stopped_s[process] = stopped_s[process] + clock.step if is_still else 0.0
                if stopped_s[process] > self._stopped_s:
                    self._given_up = process, stopped_s[process]
                    process.kill()
                    return

    def _ask(self, number: int) -> None:
        try:
            self._crew[number % self._workers][1].send(self._steps[number])
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(number) from None

    def _awaited(self, number: int) -> bool:
        """Wait for the answer; False when nobody wants it any more."""
        while not self._leaving.is_set():
            if self._crew[number % self._workers][1].poll(_LOOK_S):
                return True
        return False

    def _take(self, number: int) -> T:
        try:
            done, result = self._crew[number % self._workers][1].recv()
        except (EOFError, OSError):  # OSError: in the middle of a message
            raise self._died(number) from None
        if not done:
            raise result
        answer: T = result
        return answer

    def _died(self, number: int) -> RunError:
        process = self._crew[number % self._workers][0]
        process.join(timeout=10)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        short = " Often the machine is out of memory: fewer need less." if code == -signal.SIGKILL else ""
        if self._given_up is not None and self._given_up[0] is process:
            how, short = describe_stopped(self._given_up[1]), ""
        return RunError(
            f"a process that prepares batches (pid {process.pid}, one of `machine.loader_workers: "
            f"{self._workers}`) {how} before it had made step {self._steps[number] + 1}",
            hint=f"The same command goes on from the newest checkpoint.{short}",
        )


def shield_from_stop_signals() -> None:
    """Leave the signals that ask to stop to other threads; processes started from this thread never get them.

    A new process inherits the thread's signal mask, so there is no moment in which a signal to the whole group
    could end it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _serve(connection: Connection, of_step: Callable[[int], object], parent: int) -> None:
    """What a worker process does, until its parent is gone or ends it."""
    shield_from_stop_signals()
    if (tie := end_with_parent(parent)) is not None:
        tie()
    while True:
        try:
            step = connection.recv()
            try:
                answer = (True, of_step(step))
            except Exception as error:  # raised where the step is wanted
                answer = (False, sendable(error))
            connection.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
