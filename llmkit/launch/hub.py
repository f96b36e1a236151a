"""Node 0: the others meet here, are started together, and hear how it ended. No torch."""

import os
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmkit.durable import scratch_folder, write_file
from llmkit.errors import ExitCode, RunError
from llmkit.launch.crew import RESTART, SAVED, SETTLE_S, Crew, Ending, Limits, Order
from llmkit.launch.local import Share, run_alone, run_share, start_again
from llmkit.launch.network import Place, listen, resolve
from llmkit.launch.node import Node
from llmkit.launch.signals import exit_for, handling
from llmkit.launch.wire import KEY, Inbox, Link, LostError, Message, Waits, Wire, challenge
from llmkit.launch.workplace import Card, meeting_env

LOST_NODE = -1
"""The blame of a node that was lost: before any worker's."""


@dataclass(frozen=True)
class Work:
    """What is started on all nodes.

    Attributes:
        argv: What follows the worker's program, given the number of nodes: it may have to be planned anew.
        program: The worker's program, which the other nodes know by themselves.
        logs: The run folder's `logs`.
        restarts: How many times all may be started again.
        progress: What is gained so far.
        deadline: When (`time.monotonic()`) the workers must have saved and ended; None for never.
    """

    argv: Callable[[int], Sequence[str]]
    program: Sequence[str]
    logs: Path
    restarts: int = 0
    progress: Callable[[], int] | None = None
    deadline: float | None = None


class Hub:
    """Where nodes meet, on node 0. A context: the others are told its end.

    Attributes:
        node: This node.
        card: What this node is; the others must be the same.
        per_node: Workers that each node starts.
        count: Nodes that are there, this one too, once they have met.
    """

    def __init__(
        self,
        node: Node,
        card: Card,
        runs: Path,
        *,
        per_node: int,
        tell: Callable[[str], None],
        waits: Waits = Waits(),  # noqa: B008 - frozen
    ) -> None:
        self.node, self.card, self.per_node, self.waits = node, card, per_node, waits
        self.count = 1
        self.tell = tell
        self.inbox: Inbox = Inbox()
        self.links: dict[int, Link] = {}
        self.passing: list[int] | None = None
        self._runs = runs
        self._refused = ""
        self._lock = threading.Lock()
        self._active = ExitStack()
        self._rounds = 0

    def __enter__(self) -> "Hub":
        with ExitStack() as stack:
            place = self.node.meeting
            server = stack.enter_context(
                listen(place, resolve(place.host, wait_s=self.waits.resolve_s, tell=self.tell))
            )
            folder = stack.enter_context(scratch_folder(self._runs.absolute() / ".cache" / "nodes"))
            self.key = secrets.token_hex(32)
            write_file(folder / KEY, self.key)
            self.address = str(server.getsockname()[0])
            stack.callback(_wake, server)
            threading.Thread(target=self._accept, args=(server, folder / KEY), daemon=True).start()
            try:
                self.count = len(self.gather([]))
            except BaseException as error:
                self._leave(error)
                raise
            self._active = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(error)
        self._active.close()

    def run(self, work: Work, *, limits: Limits = Limits(), env: Mapping[str, str] = os.environ) -> Ending:  # noqa: B008
        """Run workers on all nodes and wait for all of them, as `run_local_workers` does on one.

        Args:
            work: What they are.
            limits: How long this node waits for its own workers.
            env: Their environment.

        Raises:
            RunError: Not as many nodes are there as must be.
        """
        work.logs.mkdir(parents=True, exist_ok=True)
        arrived: list[int] = []
        said: list[str] = []

        def tell(line: str) -> None:
            said.append(line)
            self.tell(line)

        def once(start: int) -> Ending:
            ranks = self.gather(arrived)
            if arrived:
                return Ending(exit_for(arrived[0]), asked=True)
            self.count = len(ranks)
            argv = [str(word) for word in work.argv(len(ranks))]
            why = said[-1] if start and said else ""
            return self._start(start, why, ranks, work, argv, Crew(tell, limits, arrived), env)

        self.passing = arrived
        try:
            with handling(lambda number, frame: arrived.append(number)):
                return start_again(
                    once, restarts=work.restarts, progress=work.progress, tell=tell, arrived=arrived
                )
        finally:
            self.passing = None

    def gather(self, arrived: list[int]) -> list[int]:
        """Wait until as many nodes are there as there may be, or as must be and no more come; their numbers.

        Args:
            arrived: Not empty once someone asks for the end; then it is waited for no longer.

        Raises:
            RunError: Too few came in time, or one is not like this one.
        """
        begin, told, enough_since = time.monotonic(), False, None
        while not arrived:
            self._hear_between()
            if self._refused:
                raise RunError(
                    self._refused, hint="start all nodes with the same command, of the same installation"
                )
            ranks = [0, *sorted(self.links)]
            now = time.monotonic()
            if len(ranks) == self.node.most:
                return ranks
            enough_since = (enough_since or now) if len(ranks) >= self.node.least else None
            if enough_since is not None and now - enough_since >= self.waits.last_call_s:
                return ranks
            if now - begin >= self.waits.meet_s:
                raise self._too_few(ranks)
            if not told and now - begin >= self.waits.say_s:
                told = True
                self.tell(f"waiting at {self.address}:{self.node.meeting.port} for {self._absent(ranks)}")
            time.sleep(0.05)
        return [0, *sorted(self.links)]

    def _absent(self, ranks: Sequence[int]) -> str:
        names = [str(rank) for rank in range(self.node.most) if rank not in ranks]
        return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"

    def _too_few(self, ranks: Sequence[int]) -> RunError:
        return RunError(
            f"{len(ranks)} of {self.node.most} nodes came in {self.waits.meet_s:g} s; missing: {self._absent(ranks)}",
            hint=f"start it with --rendezvous {self.node.meeting}; what it said itself stands there",
        )

    def _hear_between(self) -> None:
        """Between starts: forget who is lost, and note who asks for the end."""
        while not self.inbox.empty():
            rank, message = self.inbox.get()
            if message is None:
                self.tell(self.forget(rank))
            elif "signal" in message and self.passing is not None:
                self.passing.append(int(message["signal"]))

    def forget(self, rank: int) -> str:
        """A node is lost: count it no longer, until it comes back; say how it was lost."""
        with self._lock:
            link = self.links.pop(rank, None)
        return f"node {rank} was lost: {link.lost if link and link.lost else 'it ended'}"

    def _accept(self, server: socket.socket, key_file: Path) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # it is over
                return
            threading.Thread(target=self._admit, args=(connection, key_file), daemon=True).start()

    def _admit(self, connection: socket.socket, key_file: Path) -> None:
        """Let a newcomer prove itself, and look whether it is like this node."""
        wire = Wire(connection)
        try:
            theirs = wire.theirs
            # It reads the secret from a file that may take `see_s` to be seen.
            challenge(wire, key_file, self.key, 2 * self.waits.see_s)
            hello = wire.demand(self.waits.see_s)
            rank = int(hello["node"])
            if refused := self._check(rank, hello):
                self._refused = self._refused or refused
                wire.send({"refused": refused})
                return
            if not self._is_free(rank):
                self.tell(f"a second agent, at {theirs}, says it is node {rank}; it is sent away")
                wire.send(
                    {"refused": f"another agent is node {rank} already; give each node its own --node-rank"}
                )
                return
            wire.send({"welcome": self.node.most})
            with self._lock:
                self.links[rank] = Link(wire, self.waits, lambda link, message: self._hear(rank, message))
        except (LostError, KeyError, ValueError, TypeError, OSError) as error:
            said = error.message if isinstance(error, LostError) else "it does not speak our language"
            with suppress(OSError):
                self.tell(f"someone at {theirs} was sent away: {said}")
            wire.close()

    def _check(self, rank: int, hello: Message) -> str:
        """Why a node cannot take part; empty when it can."""
        if not 0 < rank < self.node.most or hello.get("most") != self.node.most:
            return (
                f"node {rank} of {hello.get('most')} came, and node 0 waits for {self.node.most - 1} others"
            )
        differs = self.card.differs_from(hello.get("card", {}))
        return f"node {rank} is not like node 0: {differs}" if differs else ""

    def _is_free(self, rank: int) -> bool:
        """Whether nobody else is this node, or who was is found to be lost."""
        since = time.monotonic()
        while (link := self.links.get(rank)) is not None and not link.lost:
            if link.wire.heard > since + self.waits.beat_s:
                return False
            time.sleep(0.05)
        return True

    def _hear(self, rank: int, message: Message | None) -> None:
        """In the background: a message of a node. Between starts a signal to it counts as one to this process."""
        if message is not None and "signal" in message and self.passing is None:
            os.kill(os.getpid(), int(message["signal"]))
            return
        self.inbox.put((rank, message))

    def _start(
        self,
        start: int,
        why: str,
        ranks: Sequence[int],
        work: Work,
        argv: Sequence[str],
        crew: Crew,
        env: Mapping[str, str],
    ) -> Ending:
        """One start on these nodes."""
        command = [*work.program, *argv]
        env = {**env, RESTART: str(start)}
        if len(ranks) == 1:
            return run_alone(crew, self.per_node, command, work.logs, env)
        self._rounds += 1
        turn = _Round(self, self._rounds, ranks, crew)
        crew.others = turn
        size = self.per_node * len(ranks)
        token = secrets.token_hex(16)
        listening = listen(Place(self.address, 0), [self.address])
        port = int(listening.getsockname()[1])
        left = None if work.deadline is None else work.deadline - time.monotonic()
        for number, rank in enumerate(ranks[1:], start=1):
            share = Share(number * self.per_node, self.per_node, size, rank)
            self.links[rank].send(
                {
                    "start": start,
                    "round": self._rounds,
                    "why": why,
                    "share": asdict(share),
                    "argv": list(argv),
                    "folder": os.getcwd(),
                    "logs": str(work.logs.absolute()),
                    "port": port,
                    "token": token,
                    "left_s": left,
                }
            )
        share = Share(0, self.per_node, size, 0)
        meeting = meeting_env(Place(self.address, port), token, ours=self.address)
        own = run_share(crew, share, command, work.logs, {**env, **meeting}, listening=listening)
        return turn.ending(own)

    def _leave(self, error: BaseException | None) -> None:
        """Tell the others that it is over, and with which exit code."""
        code = int(getattr(error, "exit_code", ExitCode.FAILED)) if error is not None else 0
        if isinstance(error, KeyboardInterrupt):
            code = int(ExitCode.CTRL_C)
        said = str(getattr(error, "message", "")) if error is not None else ""
        for link in list(self.links.values()):
            link.send({"bye": code, "said": said})
            link.close()


@dataclass
class _Failure:
    blame: int
    rank: int
    ending: Ending


@dataclass
class _Round:
    """One start on several nodes, as node 0 sees it.

    Attributes:
        hub: Where messages come in.
        number: Which start it is; messages of earlier ones are left aside.
        ranks: The nodes that take part.
        crew: This node's workers.
    """

    hub: Hub
    number: int
    ranks: Sequence[int]
    crew: Crew
    running: set[int] = field(default_factory=set)
    failures: list[_Failure] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    asked_of: Counter[tuple[int, int]] = field(default_factory=Counter)
    queue: list[Order] = field(default_factory=list)
    since: float = 0.0
    ended: bool = False
    killed: bool = False

    def __post_init__(self) -> None:
        self.running = set(self.ranks[1:])

    def failing(self, ending: Ending, blame: int) -> None:
        """This node's own part failed."""
        self._fail(0, ending, blame)

    def asked(self, number: int) -> None:
        """A signal came to this node."""
        self._pass_on(0, number)

    def busy(self) -> bool:
        """Whether another node has not ended."""
        return bool(self.running)

    def orders(self) -> list[Order]:
        """Read what has come, decide, and give what this node's own workers must hear."""
        while not self.hub.inbox.empty():
            rank, message = self.hub.inbox.get()
            if message is None:
                self._lose(rank)
            elif message.get("round") == self.number:
                self._hear(rank, message)
        self._decide()
        orders, self.queue = self.queue, []
        return orders

    def _hear(self, rank: int, message: Message) -> None:
        if "signal" in message:
            self._pass_on(rank, int(message["signal"]))
        if "failing" in message:
            self._fail(rank, Ending(**message["failing"]), int(message["blame"]))
        if "ended" in message:
            self.running.discard(rank)
            self.endings.append(Ending(**message["ended"]))

    def _lose(self, rank: int) -> None:
        reason = self.hub.forget(rank)
        if rank in self.running:
            self.running.discard(rank)
            self._fail(rank, Ending(ExitCode.FAILED, reason), LOST_NODE)

    def _fail(self, rank: int, ending: Ending, blame: int) -> None:
        if not self.failures:
            self.since = self.crew.clock.now
        self.failures.append(_Failure(blame, rank, ending))

    def _pass_on(self, rank: int, number: int) -> None:
        """Let all nodes but the one that it came from hear of a signal; of a second Ctrl-C there, all at once."""
        self.asked_of[rank, number] += 1
        if number == signal.SIGINT and self.asked_of[rank, number] > 1:
            self.killed = True
            self._order({"order": "kill"}, but=0)
            self.queue.append(Order("kill"))
            return
        self._order({"order": "signal", "number": number}, but=rank)
        if rank:
            self.queue.append(Order("signal", number))

    def _decide(self) -> None:
        """End it everywhere once it is known what failed first: a lost connection may yet have a better cause."""
        if self.ended or not self.failures:
            return
        first = self._cause()
        waited = self.crew.clock.now - self.since
        if waited < (SETTLE_S if first.blame < 2 else self.crew.limits.lost_s) and self.running:
            return
        self.ended = True
        self._order({"order": "end", "reason": first.ending.reason}, but=first.rank)
        if first.rank:
            self.queue.append(Order("end", reason=first.ending.reason))

    def _cause(self) -> _Failure:
        return min(self.failures, key=lambda failure: failure.blame)

    def _order(self, order: dict[str, Any], *, but: int) -> None:
        for rank in self.running - {but}:
            link = self.hub.links.get(rank)
            if link is not None:
                link.send({**order, "round": self.number})

    def ending(self, own: Ending) -> Ending:
        """How it ended on all nodes together."""
        asked = own.asked or bool(self.asked_of) or any(one.asked for one in self.endings)
        if self.killed:
            return Ending(ExitCode.CTRL_C, asked=True)
        if self.failures:
            cause = self._cause().ending
            return Ending(cause.code, cause.reason, cause.by_own_words, asked)
        codes = [own.code, *(one.code for one in self.endings)]
        bad = [code for code in codes if code not in (0, *SAVED)]
        return Ending(bad[0] if bad else max(codes), asked=asked)


def _wake(server: socket.socket) -> None:
    """Let whoever waits at a socket see that it is over; some systems say it is not connected."""
    with suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)
