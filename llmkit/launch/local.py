"""Worker processes on this machine: one parent starts them, passes signals on, and tells how it ended.

The parent never imports torch. Workers find each other through a file in a private folder, so nothing listens on
the network, and the kernel ends them when the parent dies in whatever way.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import llmkit
from llmkit.errors import ExitCode
from llmkit.hardware import usable_cores
from llmkit.launch.signals import exit_for, handling

POLL_S = 0.05
SETTLE_S = 0.3
"""When one worker dies its peers fail on the lost connection; waiting this long shows which came first."""

GRACE_S = 15.0
"""After a worker has died the others get this long to end by themselves."""

STOP_GRACE_S = 300.0
"""After being asked to stop, workers get this long to finish a step and save. Python's handlers do not run inside
a hanging C++ call, so there must be an end to waiting."""

TAIL_LINES = 20
PR_SET_PDEATHSIG = 1
SAVED = (ExitCode.INTERRUPTED, ExitCode.CTRL_C)


def run_local_workers(
    num_processes: int,
    argv: Sequence[str],
    *,
    logs: Path,
    env: Mapping[str, str] = os.environ,
    on_line: Callable[[str], None] | None = None,
    program: Sequence[str] | None = None,
    grace_s: float = GRACE_S,
    stop_grace_s: float = STOP_GRACE_S,
) -> int:
    """Run `llmkit ARGV` in several processes and wait for all of them.

    Rank 0 writes to our stdout and stderr; the others write to `logs/rank_N.log`. SIGINT, SIGTERM and SIGUSR1
    to this process go to every worker; a second Ctrl-C kills them. If a worker dies the others are ended too.
    To be called from the main thread, for the signals.

    Args:
        num_processes: How many.
        argv: The command line after `llmkit`; RANK tells a worker not to start workers again.
        logs: The run folder's `logs`, made if missing.
        env: The environment to start from.
        on_line: Gets each line that this launcher itself has to say; by default it goes to stderr.
        program: What to start instead of `python -m llmkit`.
        grace_s: Seconds the others have after a worker died.
        stop_grace_s: Seconds all have after being asked to stop.

    Returns:
        0 when all are done; 75 or 130 when they stopped as asked; else the exit code of the worker that
        failed first, or 1 when that was killed by a signal.
    """
    tell = on_line or _to_stderr
    command = [*(program or _own_program()), *argv]
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmkit-")))
        shared = _shared_environment(env, num_processes, private / "rendezvous")
        crew = _Crew(tell, grace_s, stop_grace_s)
        stack.callback(crew.kill)
        stack.enter_context(handling(crew.note_signal))
        for rank in range(num_processes):
            crew.workers.append(_start(rank, command, shared, logs))
        return crew.wait()


def _own_program() -> list[str]:
    """How to start llmkit again; `-P` keeps a stray `random.py` in the current folder from being imported."""
    return [sys.executable, "-P", "-m", "llmkit"]


def _shared_environment(env: Mapping[str, str], num_processes: int, rendezvous: Path) -> dict[str, str]:
    """The environment of all workers; RANK and LOCAL_RANK come on top."""
    ours = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        # Libraries want these two to be there; the meeting itself is at LLMKIT_RENDEZVOUS.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "LLMKIT_RENDEZVOUS": str(rendezvous),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "PYTHONUNBUFFERED": "1",
    }
    threads = str(max(1, usable_cores() // num_processes))
    merged = {"OMP_NUM_THREADS": threads, **env, **ours}
    root = Path(llmkit.__file__).parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # a checkout that may not be installed
        merged["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [env.get("PYTHONPATH")])])
    return merged


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class _Worker:
    """A started process; `log` is where its output goes from byte `log_start` on, None for rank 0."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int

    @property
    def code(self) -> int | None:
        """The exit code so far: None while it runs, negative for a signal."""
        return self.process.poll()

    @property
    def failed(self) -> bool:
        """Whether it ended other than done or saved."""
        return self.code is not None and self.code not in (0, *SAVED)

    def tail(self) -> list[str]:
        """The last lines it wrote to its log."""
        if self.log is None:
            return []
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, self.log.stat().st_size - 64_000))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def _start(rank: int, command: list[str], shared: Mapping[str, str], logs: Path) -> _Worker:
    """Start one worker in its own process group: the terminal's Ctrl-C must reach only the parent."""
    log = logs / f"rank_{rank}.log" if rank else None
    with ExitStack() as stack:
        output: IO[bytes] | None = stack.enter_context(log.open("ab")) if log else None
        start = output.tell() if output else 0
        process = subprocess.Popen(  # noqa: S603 - our own program and arguments, no shell
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=end_with_parent(),
        )
    return _Worker(rank, process, log, start)


def end_with_parent(parent: int | None = None) -> Callable[[], None] | None:
    """What a child does before it becomes a worker: ask Linux to kill it when the parent ends, however.

    Args:
        parent: The parent's process id; by default this process's, for a child that it is about to start.
    """
    if not sys.platform.startswith("linux"):
        return None
    # Both are looked up here: between fork and exec only system calls are safe.
    libc, expected = ctypes.CDLL(None), os.getpid() if parent is None else parent

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != expected:  # it died before the request took hold
            os._exit(ExitCode.FAILED)

    return prepare


@dataclass
class _Crew:
    """All workers, and what has happened to them.

    Attributes:
        arrived: Signals to the parent that have not been acted on; the handler only notes them, as it may
            run in the middle of a `poll`.
        sent: Signals that were passed on.
        deadline: When (monotonic clock) workers that still run are killed.
        overdue: Whether that has happened.
    """

    tell: Callable[[str], None]
    grace_s: float
    stop_grace_s: float
    workers: list[_Worker] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    deadline: float | None = None
    overdue: bool = False

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.arrived.append(number)

    def wait(self) -> int:
        """Wait until all have ended; the first failure ends the others."""
        cause: _Worker | None = None
        while self._running():
            self._pass_signals_on()
            if self.sent.count(signal.SIGINT) > 1:
                self.kill()
                self.tell("stopped at once; the newest checkpoint resumes")
                return ExitCode.CTRL_C
            if cause is None and (cause := self._find_cause()) is not None:
                self._end_others()
            self._enforce_deadline()
            time.sleep(POLL_S)
        if cause is None and self.overdue:
            return ExitCode.FAILED
        return self._exit_code(cause or self._find_cause())

    def _running(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.code is None]

    def _find_cause(self) -> _Worker | None:
        """The worker that failed first, reported, or None.

        Peers soon fail on the lost connection, so look twice: who died of a signal did not die of that; else
        who was seen first.
        """
        first = [worker for worker in self.workers if worker.failed]
        if not first:
            return None
        time.sleep(SETTLE_S)
        failed = [worker for worker in self.workers if worker.failed]
        cause = next((worker for worker in failed if (worker.code or 0) < 0), first[0])
        self._report(cause)
        return cause

    def _report(self, cause: _Worker) -> None:
        how = _how_it_ended(cause.code or 0)
        if self._as_asked(cause):
            how += " before it could save; the newest checkpoint resumes"
        self.tell(f"worker {cause.rank} (pid {cause.process.pid}) {how}")
        tail = cause.tail()
        if tail:
            self.tell(f"the end of {cause.log}:")
        for line in tail:
            self.tell(f"  {line}")

    def _as_asked(self, worker: _Worker) -> bool:
        """Whether a signal that asked it to stop killed it, as happens before a worker has set up handlers."""
        return -(worker.code or 0) in self.sent

    def _exit_code(self, cause: _Worker | None) -> int:
        if cause is None:
            return max((worker.code or 0 for worker in self.workers), default=0)
        code = cause.code or 0
        if self._as_asked(cause):
            return exit_for(-code)
        return code if code > 0 else ExitCode.FAILED

    def _end_others(self) -> None:
        running = self._running()
        if running:
            ranks = ", ".join(str(worker.rank) for worker in running)
            self.tell(f"stopping the other workers ({ranks}): {self.grace_s:g} s to end")
        self._signal_all(signal.SIGTERM)
        self.deadline = time.monotonic() + self.grace_s

    def _enforce_deadline(self) -> None:
        if self.deadline is None or time.monotonic() < self.deadline:
            return
        late = ", ".join(str(worker.rank) for worker in self._running())
        if late:
            self.tell(f"worker {late} did not end in time and is killed")
        self.deadline, self.overdue = None, True
        self.kill()

    def _pass_signals_on(self) -> None:
        while self.arrived:
            number = self.arrived.pop(0)
            self._signal_all(number)
            self.sent.append(number)
            if self.deadline is None:
                self.deadline = time.monotonic() + self.stop_grace_s

    def _signal_all(self, number: int) -> None:
        """Signal every running worker itself, not its children: it decides what they do."""
        for worker in self.workers:
            worker.process.send_signal(number)

    def kill(self) -> None:
        """Kill what is left, with the processes that workers have started."""
        for worker in self._running():
            os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in self.workers:
            worker.process.wait()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    often = "; often the machine ran out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{often}"


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
