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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import llmkit
from llmkit.errors import ExitCode
from llmkit.hardware import usable_cores
from llmkit.launch.crew import RESTART, SAVED, Crew, Ending, Limits, Worker
from llmkit.launch.network import INTERFACE_NAMES
from llmkit.launch.signals import describe_stop, exit_for, handling

PR_SET_PDEATHSIG = 1
LISTENING = "LLMKIT_LISTENING"
"""In rank 0's environment, where nodes meet: the number of the open socket at which the others find it."""
WORKER = (sys.executable, "-P", "-m", "llmkit.train.worker")
"""The program of a worker that trains; the job's file is its word."""
FINAL = (ExitCode.DONE, ExitCode.USAGE, ExitCode.MISSING, ExitCode.GATE, *SAVED)
"""Ends that another start would not change."""


def run_local_workers(
    num_processes: int,
    argv: Sequence[str],
    *,
    logs: Path,
    env: Mapping[str, str] = os.environ,
    on_line: Callable[[str], None] | None = None,
    program: Sequence[str] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    restarts: int = 0,
    progress: Callable[[], int] | None = None,
) -> int:
    """Run `llmkit ARGV` in one or more processes, and wait for all of them.

    Rank 0 writes to our stdout and stderr; the others write to `logs/rank_N.log`. SIGINT, SIGTERM and SIGUSR1
    to this process go to every worker; a second Ctrl-C kills them. If a worker dies, or is stopped (SIGSTOP) for
    too long, it is named and the others are ended too: by default within 60 s. To be called from the main
    thread, for the signals.

    After a failure all are started again, in a new world and with the number of the start in LLMKIT_RESTART, at
    most `restarts` times; not when the command line, something missing or a gate was the reason, not after
    someone asked to stop, and not when a worker ended by itself though nothing was gained since the last start.

    Args:
        num_processes: How many.
        argv: The command line after `llmkit`; RANK tells a worker not to start workers again.
        logs: The run folder's `logs`, made if missing.
        env: The environment to start from.
        on_line: Gets each line that this launcher itself has to say; by default it goes to stderr.
        program: What to start instead of `python -m llmkit`.
        limits: How long is waited for what.
        restarts: How many times all may be started again.
        progress: What is gained so far, as the newest checkpoint's step; without it every start counts as a gain.

    Returns:
        0 when all are done; 75 or 130 when they stopped as asked; else the exit code of the worker that
        failed first, or 1 when that was killed by a signal. Of several starts, the last one's.
    """
    tell = on_line or to_stderr
    command = [*(program or _own_program()), *argv]
    logs.mkdir(parents=True, exist_ok=True)
    arrived: list[int] = []

    def once(start: int) -> Ending:
        crew = Crew(tell, limits, arrived)
        return run_alone(crew, num_processes, command, logs, {**env, RESTART: str(start)})

    with handling(lambda number, frame: arrived.append(number)):
        return start_again(once, restarts=restarts, progress=progress, tell=tell, arrived=arrived).code


def start_again(
    once: Callable[[int], Ending],
    *,
    restarts: int,
    progress: Callable[[], int] | None,
    tell: Callable[[str], None],
    arrived: list[int],
) -> Ending:
    """Start, and after a failure start again, as `run_local_workers` promises.

    Args:
        once: Does one start, given its number from 0.
        restarts: How many times more.
        progress: What is gained so far; without it every start counts as a gain.
        tell: Gets each line there is to say.
        arrived: Signals that ask for the end.
    """
    for start in range(restarts + 1):
        before = progress() if progress else -1
        ending = once(start)
        if restarts == 0 or ending.asked or ending.code in FINAL:
            break
        gained = progress is None or progress() > before
        if useless := _why_not_again(ending, left=restarts - start, gained=gained):
            tell(f"not started again: {useless}")
            break
        if arrived:
            tell(f"not started again: {describe_stop(arrived[0])} came; the newest checkpoint resumes")
            return Ending(exit_for(arrived[0]), asked=True)
        tell(f"restart {start + 1} of {restarts}: {ending.reason}")
    return ending


def _why_not_again(ending: Ending, *, left: int, gained: bool) -> str:
    """Why it would be of no use to start again after a failure; empty when it may be."""
    if ending.by_own_words and not gained:
        return f"{ending.reason}, and nothing was gained since it was started; it would fail again"
    return "" if left else "all restarts are used up"


@dataclass(frozen=True)
class Share:
    """The part of a world that one node's workers are.

    Attributes:
        first: Rank of the first of them.
        count: How many they are.
        world_size: Workers of all nodes.
        node: The node's number, where there are several.
    """

    first: int
    count: int
    world_size: int
    node: int | None = None

    def place(self, local_rank: int) -> dict[str, str]:
        """A worker's place in the world, in the variables that torch and accelerate read."""
        rank = {"RANK": str(self.first + local_rank), "WORLD_SIZE": str(self.world_size)}
        if self.world_size == 1:
            # LOCAL_RANK would make accelerate open a process group, and with it a port, for one process.
            return rank
        return {**rank, "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(self.count)}


def run_alone(
    crew: Crew, num_processes: int, command: list[str], logs: Path, env: Mapping[str, str]
) -> Ending:
    """Start all workers of one machine and wait until they have ended; what is left is killed, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="llmkit-") as private:
        meeting = {
            # Libraries want these two to be there; the meeting itself is at LLMKIT_RENDEZVOUS.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "LLMKIT_RENDEZVOUS": str(Path(private) / "rendezvous"),
            # What libraries send, NCCL's first messages too, stays on this machine.
            **dict.fromkeys(INTERFACE_NAMES, "lo0" if sys.platform == "darwin" else "lo"),
        }
        share = Share(0, num_processes, num_processes)
        return run_share(crew, share, command, logs, {**env, **meeting})


def run_share(
    crew: Crew,
    share: Share,
    command: list[str],
    logs: Path,
    env: Mapping[str, str],
    *,
    folder: str | None = None,
    listening: socket.socket | None = None,
) -> Ending:
    """Start one node's workers and wait until they have ended; what is left is killed, whatever happens here.

    Args:
        crew: Watches them.
        share: Which ranks they are.
        command: What each of them is.
        logs: Where all but rank 0 write to.
        env: Their environment, but for their places.
        folder: The folder they are started in; by default this process's.
        listening: A socket that rank 0 takes over, and is told the number of.
    """
    env = _shared_environment(env, share.count, share.world_size)
    with ExitStack() as stack:
        stack.callback(crew.kill)
        for local_rank in range(share.count):
            own = share.place(local_rank)
            handed: tuple[int, ...] = ()
            if listening is not None and local_rank == 0:
                own, handed = {**own, LISTENING: str(listening.fileno())}, (listening.fileno(),)
            worker = _start(share.first + local_rank, command, {**env, **own}, logs, folder, handed)
            crew.workers.append(replace(worker, node=share.node))
        if listening is not None:  # whoever waits at it is to notice when rank 0 ends
            listening.close()
        return crew.wait()


def _own_program() -> list[str]:
    """How to start llmkit again; `-P` keeps a stray `random.py` in the current folder from being imported."""
    return [sys.executable, "-P", "-m", "llmkit"]


def _shared_environment(env: Mapping[str, str], count: int, world_size: int) -> dict[str, str]:
    """The environment of a node's workers; their ranks come on top."""
    merged = {**env, "PYTHONUNBUFFERED": "1"}
    if world_size > 1:  # one alone computes as it would without a parent
        merged.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    return finding_our_code(merged)


def finding_our_code(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports llmkit from where this one has it."""
    root = Path(llmkit.__file__).parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return dict(env)
    # A checkout may not be installed.
    return {**env, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [env.get("PYTHONPATH")])])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(
    rank: int,
    command: list[str],
    env: Mapping[str, str],
    logs: Path,
    folder: str | None,
    handed: tuple[int, ...],
) -> Worker:
    """Start one worker in its own process group: the terminal's Ctrl-C must reach only the parent."""
    log = logs / f"rank_{rank}.log" if rank else None
    with ExitStack() as stack:
        output: IO[bytes] | None = stack.enter_context(log.open("ab")) if log else None
        start = output.tell() if output else 0
        process = subprocess.Popen(  # noqa: S603 - our own program and arguments, no shell
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=end_with_parent(),
            cwd=folder,
            pass_fds=handed,
        )
    return Worker(rank, process, log, start)


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


def to_stderr(line: str) -> None:
    """Say a line."""
    sys.stderr.write(line + "\n")
