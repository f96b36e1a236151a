"""Whole runs in processes that are prepared once: a server imports everything and forks a process for each.

Importing takes seconds, and a proof by hundreds of crashes would consist of little else. The server has no threads, so
what it forks is as good as a new process; what such a process does is the real command line, and its workers are the
real ones, forked where the launcher would start Python anew. `Point` says what happens to it, and where.

Run as a program, this file is the server: requests come and answers go as lines of JSON.
"""

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 240.0
ORDER = "LLMKIT_TEST_ORDER"
"""The environment's word for the file that is told which rows each step learnt from."""


@dataclass(frozen=True)
class Point:
    """Something happens somewhere in a run, each time the same.

    Attributes:
        do: A signal that the process gives itself: `SIGKILL`, `SIGTERM`, ...; `hold SIGTERM`: likewise, and the
            thread that comes here waits until the run has noticed; `time is up`: hours pass for `--max-time`.
        where: `door` (a call that changes the disk), `update` (gradients are there, weights not yet changed), `batch`
            (the second batch of held-out rows), `phase` (a part of the run begins), `function` (the n-th call of any
            Python function in the main thread).
        name: The door's call or the phase.
        path: A text in the path or target of the door's call.
        when: `before`, `middle` or `after` the door's call.
        step: The step of `update` and `batch`.
        nth: Not the first time, but this one.
        rank: The process it happens in.
    """

    do: str
    where: str
    name: str = ""
    path: str = ""
    when: str = "before"
    step: int = -1
    nth: int = 1
    rank: int = 0


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code or minus a signal, and its words."""

    code: int
    said: str


class Server:
    """Runs commands, one after the other, in processes forked from one that is prepared. To be closed.

    Args:
        folder: For its own files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._log = (folder / "server.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._log.close()

    def run(self, words: Sequence[str], *points: Point, env: dict[str, str] | None = None) -> Ended:
        """Run `llmkit WORDS` and wait for its end."""
        request = {"words": list(words), "points": [asdict(p) for p in points], "env": env or {}}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "server.log").read_text()[-4000:]
        return Ended(**json.loads(answer))


@cache
def shared_server() -> Server:
    """A server for all tests of this process, which ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="llmkit-test-")
    atexit.register(folder.cleanup)
    server = Server(Path(folder.name))
    atexit.register(server.__exit__)
    return server


# --- in the server and what it forks ------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        output = folder / "said"
        child = forked(lambda request=request: run_command(request), output)
        code = child.wait(LIMIT_S)
        said = output.read_text(errors="replace")
        answers.write(json.dumps({"code": code, "said": said}) + "\n")
        answers.flush()


def prepare() -> None:
    """Import what a run imports, and put the few things in place that differ from a real start."""
    import accelerate  # noqa: F401
    import masked
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import llmkit.cli
    import llmkit.run
    import llmkit.train.watching
    import llmkit.train.worker
    from llmkit.launch import local

    torch.set_num_threads(1)
    masked.register(masked.NAME, masked.BREAKABLE)
    llmkit.train.watching.measure_peak_flops = lambda *_: 1e12  # a third of a second, for a figure of speed
    local._start = start_worker
    record_order()


def run_command(request: dict[str, Any]) -> int:
    """What a forked process does."""
    from llmkit.cli import main

    os.environ.update(request["env"])
    for point in request["points"]:
        put_in_place(Point(**point))
    return main(request["words"])


def start_worker(
    rank: int,
    command: list[str],
    env: dict[str, str],
    logs: Path,
    folder: str | None = None,
    handed: tuple[int, ...] = (),
) -> Any:
    """Do as `launch.local._start`, by a fork; `handed` are open here and stay so in it."""
    from llmkit.launch.crew import Worker
    from llmkit.train import worker

    log = logs / f"rank_{rank}.log" if rank else None
    start = log.stat().st_size if log and log.exists() else 0

    def work() -> int:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        if folder is not None:
            os.chdir(folder)
        _here["rank"] = rank
        return worker.main(command[-1])

    process = forked(work, log, own_group=True)
    _here["rank"] = -1  # what was meant for workers must not happen to their parent
    return Worker(rank, process, log, start)


@dataclass
class forked:  # noqa: N801 - used as a function
    """A forked process with the part of `subprocess.Popen` that its parent needs.

    Attributes:
        work: What it does; its result is the exit code.
        output: The file that its words are appended to; None: the parent's output.
        own_group: Whether it gets a process group of its own.
    """

    work: Callable[[], int]
    output: Path | None
    own_group: bool = False
    returncode: int | None = None
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        from llmkit.launch.local import end_with_parent

        tie = end_with_parent()
        others = os.listdir("/proc/self/task")
        assert len(others) == 1, "a process with threads must not be forked"
        self.pid = os.fork()
        if self.pid == 0:
            tie()
            self._become()
        if self.own_group:
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(self.pid, self.pid)

    def _become(self) -> None:
        code = 99
        try:
            if self.own_group:
                os.setpgid(0, 0)
            self._redirect()
            code = self.work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _redirect(self) -> None:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if self.output is not None:
            mode = os.O_APPEND if self.own_group else os.O_TRUNC
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | mode, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = LIMIT_S) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


_here = {"rank": 0, "step": -1, "batch": 0}
"""Where this process is, as far as points ask for it."""

_noticed = threading.Event()


def put_in_place(point: Point) -> None:
    """See to it that the point's deed is done in its place; processes forked from here on know of it too."""
    places = {
        "door": _at_door,
        "update": _at_update,
        "batch": _at_batch,
        "phase": _at_phase,
        "function": _at_function,
    }
    places[point.where](point)


def happen(point: Point) -> None:
    """Do what the point says."""
    if point.do == "time is up":
        from llmkit.launch import signals

        signals.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 1e9)
        return
    hold, _, name = point.do.rpartition(" ")
    os.kill(os.getpid(), signal.Signals[name])
    if hold:
        assert _noticed.wait(LIMIT_S), "the run has noticed nothing"


class _Turn:
    """True at the n-th time that the point's process asks."""

    def __init__(self, point: Point) -> None:
        self._rank = point.rank
        self._left = point.nth

    def __call__(self) -> bool:
        if _here["rank"] == self._rank:
            self._left -= 1
            return self._left == 0
        return False


def _at_door(point: Point) -> None:
    from injection import _tear

    from llmkit.durable import calls

    mine, before = _Turn(point), calls.fail_point
    inside = {"middle": "after", "before": "before", "after": "after"}[point.when]

    def watch(call: calls.Call) -> int | None:
        here = call.name == point.name and any(point.path in str(p) for p in (call.path, call.target) if p)
        if here and call.when == inside and mine():
            if point.when == "middle":
                _tear(call.path)
            happen(point)
        return before(call) if before else None

    calls.fail_point = watch
    if point.do.startswith("hold"):
        _tell_when_noticed()


def _tell_when_noticed() -> None:
    """Let a held thread go on once the run saves because it was asked to stop, or waits for its writer."""
    from llmkit.train.saving import Saver

    wait = Saver.wait

    def noticing(self: Saver) -> None:
        _noticed.set()
        wait(self)

    Saver.wait = noticing


def _at_update(point: Point) -> None:
    from llmkit.train import loop

    mine, advance, set_lr = _Turn(point), loop.advance, loop.set_lr

    def advancing(run, state, clock):
        _here["step"] = state.step
        return advance(run, state, clock)

    def setting(*arguments):
        if _here["step"] == point.step and mine():
            happen(point)
        set_lr(*arguments)

    loop.advance, loop.set_lr = advancing, setting


def _at_batch(point: Point) -> None:
    from llmkit.evaluate import split
    from llmkit.train import loop

    mine, observe, measure = _Turn(point), loop.observe, split._measure

    def observing(run, state, rows):
        _here.update(step=state.step, batch=0)
        return observe(run, state, rows)

    def measuring(core, batch, found):
        _here["batch"] += 1
        if _here["step"] == point.step and _here["batch"] == 2 and mine():
            happen(point)
        return measure(core, batch, found)

    loop.observe, split._measure = observing, measuring


def _at_phase(point: Point) -> None:
    from llmkit.report import console

    for kind in (console.PlainReporter, console.QuietReporter):
        _watch_phases(kind, point)


def _watch_phases(kind: type, point: Point) -> None:
    before, mine = kind.phase, _Turn(point)

    def phase(self, name: str, detail: str = "") -> None:
        before(self, name, detail)
        if name == point.name and mine():
            happen(point)

    kind.phase = phase


def _at_function(point: Point) -> None:
    mine = _Turn(point)

    def profile(frame: object, event: str, argument: object) -> None:
        if event == "call" and mine():
            sys.setprofile(None)
            happen(point)

    sys.setprofile(profile)


def record_order() -> None:
    """Tell the file of `ORDER` which rows each step learns from, and how many processes prepare them."""
    from llmkit.train import loop

    train_step = loop.train_step

    def recording(run, step, micro_batches, counts):
        if ORDER in os.environ:
            lines = [
                json.dumps({"step": step, "micro": index, "rows": _hashes(batch), "helpers": _num_children()})
                for index, batch in micro_batches
            ]
            with open(os.environ[ORDER], "a") as file:
                file.write("".join(f"{line}\n" for line in lines))
        return train_step(run, step, micro_batches, counts)

    loop.train_step = recording


def _hashes(batch: dict[str, Any]) -> list[str]:
    """A short hash of all that each row of a batch holds."""
    arrays = [tensor.numpy() for name, tensor in sorted(batch.items()) if tensor.dim() > 0]
    return [
        hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).hexdigest()[:16]
        for row in range(len(arrays[0]))
    ]


def _num_children() -> int:
    found = 0
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found += len((thread / "children").read_text().split())
    return found


if __name__ == "__main__":
    import sessions  # what is pickled or patched must not live in `__main__`

    sessions.serve(Path(sys.argv[1]))
