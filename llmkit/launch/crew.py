"""The workers of one start, watched until all of them have ended, and the account of how that came about. No torch."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from llmkit.errors import ExitCode
from llmkit.launch.signals import STOP_SIGNALS, exit_for

POLL_S = 0.05
SETTLE_S = 0.3
"""When one worker dies its peers fail on the lost connection; waiting this long shows which came first."""

LONGEST_LOOK_S = 1.0
"""No look at the workers takes longer, unless this process itself was stopped in between."""

TAIL_LINES = 20
LOST_PEER = 69
"""A worker's exit code when it lost the connection to another one, which is then the one to blame. It stays between
worker and parent: the command's own exit code is 1."""

RESTART = "LLMKIT_RESTART"
"""In a worker's environment: the how-manieth start this is, from 0."""

SAVED = (ExitCode.INTERRUPTED, ExitCode.CTRL_C)


@dataclass(frozen=True)
class Limits:
    """How long the parent waits, in seconds during which it was not stopped itself.

    With the default limits everything has ended within 60 s of a worker's death, or of its being stopped.

    Attributes:
        grace_s: For the others to end by themselves, once one has died.
        stopped_s: For a worker that was stopped (SIGSTOP, a debugger) to be continued.
        lost_s: For the one to blame to end, once others have lost the connection to it.
        stop_grace_s: For all to finish a step and save, once asked to stop. Python's handlers do not run inside
            a hanging C++ call, so there must be an end to waiting.
    """

    grace_s: float = 15.0
    stopped_s: float = 20.0
    lost_s: float = 10.0
    stop_grace_s: float = 300.0


@dataclass(frozen=True)
class Ending:
    """How all workers of one start ended.

    Attributes:
        code: The exit code that tells it.
        reason: Which worker failed and how; empty when none did.
        by_own_words: Whether that worker ended by itself, with an exit code, as it would again.
        asked: Whether someone asked for the end.
    """

    code: int
    reason: str = ""
    by_own_words: bool = False
    asked: bool = False


class Order(NamedTuple):
    """What other nodes ask of this one's workers.

    Attributes:
        kind: A `signal` to pass on; the `end` of this start, as it has failed elsewhere; or to `kill` all at once.
        number: The signal's.
        reason: What failed elsewhere.
    """

    kind: Literal["signal", "end", "kill"]
    number: int = 0
    reason: str = ""


class Others(Protocol):
    """The other nodes of a start, as one node's crew sees them."""

    def failing(self, ending: Ending, blame: int) -> None:
        """Hear how this node's part failed; the lower the blame, the more likely it is the cause of all."""

    def asked(self, number: int) -> None:
        """Hear of a signal to this node."""

    def orders(self) -> list[Order]:
        """What has come from them since the last look."""

    def busy(self) -> bool:
        """Whether this node must wait for others to end."""


@dataclass
class Worker:
    """A started process.

    Attributes:
        rank: Its number.
        process: The process, leader of a group of its own.
        log: Where its output goes, from byte `log_start` on; None for rank 0, which writes to ours.
        log_start: The log's length when it started.
        stopped_s: Seconds it has been stopped (SIGSTOP) by now.
        given_up: Whether it was killed for that.
        node: The number of its node, where there are several.
    """

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int
    stopped_s: float = 0.0
    given_up: bool = False
    node: int | None = None

    @property
    def name(self) -> str:
        """What it is called towards people."""
        where = "" if self.node is None else f" on node {self.node}"
        return f"worker {self.rank} (pid {self.process.pid}){where}"

    @property
    def code(self) -> int | None:
        """The exit code so far: None while it runs, negative for a signal."""
        return self.process.poll()

    @property
    def failed(self) -> bool:
        """Whether it ended other than done or saved."""
        return self.code is not None and self.code not in (0, *SAVED)

    def count_stopped(self, seconds: float) -> None:
        """Add the time since the last look to `stopped_s`, or begin again at 0 when it runs."""
        is_still = self.code is None and is_stopped(self.process.pid)
        self.stopped_s = self.stopped_s + seconds if is_still else 0.0

    def give_up(self) -> None:
        """Kill it, with what it has started, because it was stopped for too long."""
        self.given_up = True
        self.kill()

    def kill(self) -> None:
        """Kill it with the processes that it has started; no other signal ends a stopped one."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> list[str]:
        """The last lines it wrote to its log."""
        if self.log is None:
            return []
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, self.log.stat().st_size - 64_000))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]

    def how_it_ended(self) -> str:
        """Its end in a few words, after its name."""
        code = self.code or 0
        if self.given_up:
            return describe_stopped(self.stopped_s)
        if code == LOST_PEER:
            return "lost the connection to another worker"
        if code >= 0:
            return f"failed with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        often = "; often the machine ran out of memory" if -code == signal.SIGKILL else ""
        return f"was killed by {name}{often}"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP) or is halted in a debugger."""
    import psutil  # here, as only who watches processes needs it

    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:  # some systems no longer know it once it has ended
        return False
    return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def describe_stopped(seconds: float) -> str:
    """What is said of a process that was stopped for too long, after its name."""
    return f"was stopped for {seconds:.0f} s (SIGSTOP, or a debugger) and had to be killed"


class AwakeClock:
    """Seconds since it was made in which this process was running: none pass while it is stopped (Ctrl-Z).

    Else the first look after `fg` would find that workers, stopped and continued together with their parent,
    have been stopped for too long, and that all grace is over.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0.0
        self._last = time.monotonic()

    def tick(self) -> None:
        """Set `step` to the seconds since the last tick, at most `LONGEST_LOOK_S`; `now` goes on by them."""
        last, self._last = self._last, time.monotonic()
        self.step = min(self._last - last, LONGEST_LOOK_S)
        self.now += self.step


@dataclass
class Crew:
    """All workers, and what has happened to them.

    Attributes:
        tell: Gets each line there is to say.
        limits: How long is waited for what.
        arrived: Signals to the parent that have not been acted on; the handler only notes them, as it may
            run in the middle of a `poll`.
        sent: Signals that were passed on.
        deadline: When (by `clock`) workers that still run are killed.
        overdue: Whether that has happened.
        lost_until: How long (by `clock`) is waited for a better cause than that a worker lost its connection.
        others: The other nodes, where there are several.
        ended_by: What failed on another node, once that has ended this start.
    """

    tell: Callable[[str], None]
    limits: Limits
    arrived: list[int]
    workers: list[Worker] = field(default_factory=list)
    clock: AwakeClock = field(default_factory=AwakeClock)
    sent: list[int] = field(default_factory=list)
    deadline: float | None = None
    overdue: bool = False
    lost_until: float | None = None
    others: Others | None = None
    ended_by: str = ""

    def wait(self) -> Ending:
        """Wait until all have ended; the first failure, or a worker stopped for too long, ends the others."""
        cause: Worker | None = None
        while self._running() or self._waits_for_others(cause):
            self.clock.tick()
            self._pass_signals_on()
            if self._obey_others() or self.sent.count(signal.SIGINT) > 1:
                self.kill()
                self.tell("stopped at once; the newest checkpoint resumes")
                return Ending(ExitCode.CTRL_C, asked=True)
            if cause is None and not self.ended_by and (cause := self._find_cause()) is not None:
                self._tell_others(cause)
                self._end_others()
            self._enforce_deadline()
            time.sleep(POLL_S)
        if cause is None and not self.overdue and not self.ended_by:
            cause = self._find_cause()
            self._tell_others(cause)
        return self._ending(cause)

    def kill(self) -> None:
        """Kill what is left, with the processes that workers have started."""
        for worker in self._running():
            worker.kill()

    def _waits_for_others(self, cause: Worker | None) -> bool:
        """Whether other nodes still run; or may yet tell why this one's workers, all ended, lost the connection."""
        if self.others is None or self.others.busy():
            return self.others is not None
        failed = [worker for worker in self.workers if worker.failed]
        if cause is not None or self.ended_by or self.overdue or not failed:
            return False
        return all(worker.code == LOST_PEER for worker in failed) and self._may_yet_fail()

    def _tell_others(self, cause: Worker | None) -> None:
        if self.others is not None and cause is not None:
            self.others.failing(self._ending(cause), _blame(cause))

    def _obey_others(self) -> bool:
        """Do what other nodes ask; whether that is to kill all at once."""
        for order in self.others.orders() if self.others is not None else ():
            if order.kind == "kill":
                return True
            if order.kind == "signal":
                self._signal_all(order.number)
                self._begin_grace(self.limits.stop_grace_s)
            elif not self.ended_by:
                self.ended_by = order.reason
                self.tell(order.reason)
                self._end_others()
        return False

    def _running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.code is None]

    def _find_cause(self) -> Worker | None:
        """The worker that failed first or was stopped for too long, reported, or None.

        Peers soon fail on the lost connection, so look twice: who died of a signal did not die of that, nor who
        did not say so; else who was seen first. Whom they lost may take a while to end: it is waited for.
        """
        failed = [worker for worker in self.workers if worker.failed]
        if not failed:
            return self._find_stopped()
        time.sleep(SETTLE_S)
        failed += [worker for worker in self.workers if worker.failed and worker not in failed]
        cause = min(failed, key=_blame)
        if cause.code == LOST_PEER and self._may_yet_fail():
            return self._find_stopped()
        self._report(cause)
        return cause

    def _may_yet_fail(self) -> bool:
        """Whether the one that others have lost the connection to still runs, and there is time for it to end."""
        if self.lost_until is None:
            self.lost_until = self.clock.now + self.limits.lost_s
        return (bool(self._running()) or self.others is not None) and self.clock.now < self.lost_until

    def _find_stopped(self) -> Worker | None:
        """The worker that has been stopped for too long, killed and reported, or None."""
        for worker in self.workers:
            worker.count_stopped(self.clock.step)
        cause = next((worker for worker in self.workers if worker.stopped_s > self.limits.stopped_s), None)
        if cause is not None:
            cause.give_up()
            self._report(cause)
        return cause

    def _report(self, cause: Worker) -> None:
        how = cause.how_it_ended()
        if self._as_asked(cause):
            how += " before it could save; the newest checkpoint resumes"
        self.tell(f"{cause.name} {how}")
        tail = cause.tail()
        if tail:
            self.tell(f"the end of {cause.log}:")
        for line in tail:
            self.tell(f"  {line}")

    def _as_asked(self, worker: Worker) -> bool:
        """Whether a signal that asks to stop killed it, as happens before a worker has set up handlers.

        Whether it came from us or from someone who sent it to that worker alone makes no difference.
        """
        return -(worker.code or 0) in STOP_SIGNALS

    def _ending(self, cause: Worker | None) -> Ending:
        asked = bool(self.sent)
        if self.ended_by:
            return Ending(ExitCode.FAILED, self.ended_by, asked=asked)
        if cause is None:
            code = max((worker.code or 0 for worker in self.workers), default=0)
            return Ending(ExitCode.FAILED if self.overdue else code, asked=asked)
        code, reason = cause.code or 0, f"{cause.name} {cause.how_it_ended()}"
        if self._as_asked(cause):
            return Ending(exit_for(-code), reason, asked=True)
        by_own_words = code > 0 and code != LOST_PEER
        return Ending(code if by_own_words else ExitCode.FAILED, reason, by_own_words, asked)

    def _end_others(self) -> None:
        for worker in self._running():
            if worker.stopped_s:  # it would not hear of SIGTERM
                worker.give_up()
                self.tell(f"{worker.name} is stopped too and is killed")
        running = self._running()
        if running:
            ranks = ", ".join(str(worker.rank) for worker in running)
            self.tell(f"stopping the other workers ({ranks}): {self.limits.grace_s:g} s to end")
        self._signal_all(signal.SIGTERM)
        self.deadline = self.clock.now + self.limits.grace_s

    def _enforce_deadline(self) -> None:
        if self.deadline is None or self.clock.now < self.deadline:
            return
        late = ", ".join(str(worker.rank) for worker in self._running())
        self.deadline = None
        if late:
            self.tell(f"worker {late} did not end in time and is killed")
            self.overdue = True
            self.kill()

    def _pass_signals_on(self) -> None:
        while self.arrived:
            number = self.arrived.pop(0)
            self._signal_all(number)
            self.sent.append(number)
            self._begin_grace(self.limits.stop_grace_s)
            if self.others is not None:
                self.others.asked(number)

    def _begin_grace(self, seconds: float) -> None:
        if self.deadline is None:
            self.deadline = self.clock.now + seconds

    def _signal_all(self, number: int) -> None:
        """Signal every running worker itself, not its children: it decides what they do."""
        for worker in self.workers:
            worker.process.send_signal(number)


def _blame(worker: Worker) -> int:
    """The lower, the more likely is this failed worker the reason why others failed too."""
    if (worker.code or 0) < 0:
        return 0
    return 2 if worker.code == LOST_PEER else 1
