"""Any node but node 0: it comes to node 0, starts its workers when told, and ends as node 0 ends. No torch."""

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from llmkit.errors import ExitCode, RunError
from llmkit.launch.crew import RESTART, Crew, Ending, Limits, Order
from llmkit.launch.local import Share, run_share
from llmkit.launch.network import Place, resolve
from llmkit.launch.node import Node
from llmkit.launch.signals import describe_stop, exit_for, handling
from llmkit.launch.wire import Link, LostError, Message, Waits, Wire, answer_challenge
from llmkit.launch.workplace import Card, meeting_env

DEADLINE = "LLMKIT_DEADLINE"
"""In a worker's environment on another node than node 0: when, by this machine's clock, it must have ended."""

_LOOK_S = 0.05


@dataclass(frozen=True)
class Farewell:
    """How it ended on node 0.

    Attributes:
        code: Its exit code, which becomes ours.
        said: Its words.
    """

    code: int
    said: str = ""


def follow(
    node: Node,
    card: Card,
    *,
    program: Sequence[str],
    tell: Callable[[str], None],
    comes_back: bool = False,
    env: Mapping[str, str] = os.environ,
    waits: Waits = Waits(),  # noqa: B008 - frozen
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Farewell:
    """Do what node 0 says until it says farewell. To be called from the main thread, for the signals.

    Args:
        node: Which one this is.
        card: What it is.
        program: The workers' program; node 0 only says with which words.
        tell: Gets each line there is to say.
        comes_back: Whether it goes to node 0 again after the connection to it was lost, as `--restarts` asks for.
        env: The workers' environment.
        waits: How long it waits for node 0.
        limits: How long it waits for its workers.

    Raises:
        RunError: Node 0 is not there, was lost, or sent this node away.
    """
    arrived: list[int] = []
    with handling(lambda number, frame: arrived.append(number)):
        while True:
            follower = _Follower(node, program, tell, env, limits, arrived)
            link = _join(node, card, follower, waits)
            if link is None:
                return Farewell(exit_for(arrived[0]), f"stopped by {describe_stop(arrived[0])}")
            tell(f"{node.name}: met node 0 at {node.meeting}")
            try:
                farewell = follower.serve(link)
            finally:
                link.close()
            if farewell is not None:
                return farewell
            lost = f"the connection to node 0 was lost: {link.lost}"
            if arrived or not comes_back:
                raise RunError(lost, hint="What ended it stands there; the newest checkpoint resumes.")
            tell(f"{lost}; going there again for {waits.meet_s:g} s")


def _join(node: Node, card: Card, follower: "_Follower", waits: Waits) -> Link | None:
    """Come to node 0, which may not be there yet; None when someone asks for the end first.

    Raises:
        RunError: It is not found, or does not take this node.
    """
    end, told, begin = time.monotonic() + waits.meet_s, False, time.monotonic()
    addresses = resolve(node.meeting.host, wait_s=waits.resolve_s, tell=follower.tell)
    why = ""
    while time.monotonic() < end and not follower.arrived:
        try:
            wire = Wire(_connect(addresses, node.meeting.port, waits.see_s))
        except OSError as error:
            why = error.strerror or str(error)
        else:
            try:
                return _introduce(wire, node, card, follower, waits)
            except LostError as error:
                why = error.message
                wire.close()
        if not told and time.monotonic() - begin >= waits.say_s:
            told = True
            follower.tell(f"{node.name}: node 0 is not at {node.meeting} yet ({why})")
        time.sleep(min(0.5, waits.say_s))
    if follower.arrived:
        return None
    raise RunError(
        f"node 0 was not met at {node.meeting} within {waits.meet_s:g} s: {why}",
        hint="is it started, is the port open to this machine, and is --rendezvous the same on all nodes?",
    )


def _connect(addresses: Sequence[str], port: int, wait_s: float) -> socket.socket:
    error: OSError | None = None
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=wait_s)
        except OSError as refused:
            error = refused
        else:
            connection.settimeout(None)
            return connection
    raise error or OSError("no address")


def _introduce(wire: Wire, node: Node, card: Card, follower: "_Follower", waits: Waits) -> Link:
    answer_challenge(wire, waits)
    wire.send({"node": node.rank, "most": node.most, "card": card.to_dict()})
    # An agent that this one follows on may first have to be found lost.
    answer = wire.demand(waits.silent_s + waits.see_s)
    if "refused" in answer:
        raise RunError(
            str(answer["refused"]), hint="start all nodes with the same command, of the same installation"
        )
    if "welcome" not in answer:
        raise LostError("it does not speak our language")
    return Link(wire, waits, lambda link, message: follower.inbox.put(message))


@dataclass
class _Follower:
    """This node's part, while it is connected; for its crew, `crew.Others`.

    Attributes:
        arrived: Signals to this process that have not been acted on.
        inbox: What node 0 says; None, once, when it is lost.
        kept: What came for later, while workers run.
        round: The start that is under way.
    """

    node: Node
    program: Sequence[str]
    tell: Callable[[str], None]
    env: Mapping[str, str]
    limits: Limits
    arrived: list[int]
    inbox: SimpleQueue[Message | None] = field(default_factory=SimpleQueue)
    kept: list[Message | None] = field(default_factory=list)
    link: Link | None = None
    round: int = 0
    interrupts: int = 0

    def serve(self, link: Link) -> Farewell | None:
        """Obey node 0 until it says farewell; None when it is lost.

        Raises:
            RunError: A second Ctrl-C came while it waits.
        """
        self.link = link
        while True:
            message = self._next()
            if message is None:
                return None
            if "bye" in message:
                return Farewell(int(message["bye"]), str(message.get("said", "")))
            if "start" in message:
                ending = self._run(message)
                self._say({"ended": asdict(ending)})

    def _next(self) -> Message | None:
        """What node 0 says next; signals meanwhile are passed on to it."""
        while True:
            if self.kept:
                return self.kept.pop(0)
            try:
                return self.inbox.get(timeout=_LOOK_S)
            except Empty:
                while self.arrived:
                    self._leave_when_asked_twice(self.arrived[0])
                    self.asked(self.arrived.pop(0))

    def _leave_when_asked_twice(self, number: int) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def _run(self, order: Message) -> Ending:
        """Start this node's workers as told, and wait for them."""
        assert self.link is not None
        self.round = int(order["round"])
        share, folder = Share(**order["share"]), str(order["folder"])
        if not os.path.isdir(folder):
            reason = f"{self.node.name} has no folder {folder}, in which node 0 was started"
            return self._not_started(reason)
        if order["why"]:
            self.tell(str(order["why"]))
        self.tell(
            f"{self.node.name}: starting {share.count} of {share.world_size} workers, from rank {share.first}"
        )
        env = {
            **self.env,
            **meeting_env(
                Place(self.link.wire.theirs, int(order["port"])), order["token"], ours=self.link.wire.ours
            ),
            RESTART: str(order["start"]),
        }
        if order["left_s"] is not None:  # clocks of two machines do not count from the same moment
            env[DEADLINE] = str(time.monotonic() + float(order["left_s"]))
        crew = Crew(self.tell, self.limits, self.arrived, others=self)
        return run_share(
            crew, share, [*self.program, *order["argv"]], Path(order["logs"]), env, folder=folder
        )

    def _not_started(self, reason: str) -> Ending:
        self.tell(reason)
        ending = Ending(ExitCode.FAILED, reason, by_own_words=True)
        self.failing(ending, 0)
        return ending

    def failing(self, ending: Ending, blame: int) -> None:
        """This node's workers fail."""
        self._say({"failing": asdict(ending), "blame": blame})

    def asked(self, number: int) -> None:
        """A signal came to this node."""
        self._say({"signal": number})

    def busy(self) -> bool:
        """Only node 0 waits for others."""
        return False

    def orders(self) -> list[Order]:
        """What node 0 says while workers run."""
        orders = []
        while not self.inbox.empty():
            message = self.inbox.get()
            if message is None:
                assert self.link is not None
                orders.append(Order("end", reason=f"the connection to node 0 was lost: {self.link.lost}"))
                self.kept.append(None)
            elif message.get("round") == self.round and "order" in message:
                orders.append(
                    Order(message["order"], int(message.get("number", 0)), str(message.get("reason", "")))
                )
            elif "order" not in message:
                self.kept.append(message)
                if "bye" in message:
                    orders.append(Order("end", reason="node 0 has ended"))
        return orders

    def _say(self, message: Message) -> None:
        assert self.link is not None
        self.link.send({**message, "round": self.round})
