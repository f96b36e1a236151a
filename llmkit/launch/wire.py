"""What agents say to each other: JSON lines over one connection a node, a proof of the common secret first, then beats.

An empty line every few seconds says that a node is there. Who is not heard of for `Waits.silent_s` counts as lost; a
connection that closes tells it at once. What is said is not encrypted; who knows the secret may read the run folder.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from llmkit.errors import RunError, UsageError

KEY = "key"
"""The file with the secret, in a folder that only its user may open."""
_LONGEST_LINE = 4_000_000
_PROTOCOL = 1

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Waits:
    """How long nodes wait for each other, in seconds.

    Attributes:
        meet_s: For all nodes to come, at the start and after one was lost.
        last_call_s: For more to come, once there are as many as there must be.
        resolve_s: For node 0's name to be known.
        silent_s: Without a word or a beat until a node counts as lost. A network that is cut for half of that is
            waited for: its next try may come as late as that after it is mended.
        beat_s: Between two beats.
        see_s: For a file that node 0 wrote to be seen on another node; network file systems take a while.
        say_s: Until it is said for whom is waited.
    """

    meet_s: float = 600.0
    last_call_s: float = 30.0
    resolve_s: float = 60.0
    silent_s: float = 45.0
    beat_s: float = 2.0
    see_s: float = 20.0
    say_s: float = 3.0


def waits_of(env: Mapping[str, str]) -> Waits:
    """The waits, as the environment sets them in seconds.

    `LLMKIT_NODES_WAIT` is for nodes to come, `LLMKIT_NODES_SILENCE` until one that says nothing counts as lost.

    Raises:
        UsageError: One of them is no number of seconds.
    """
    waits = Waits()
    meet_s = _seconds(env, "LLMKIT_NODES_WAIT", waits.meet_s)
    silent_s = _seconds(env, "LLMKIT_NODES_SILENCE", waits.silent_s)
    return replace(
        waits,
        meet_s=meet_s,
        last_call_s=min(waits.last_call_s, meet_s),
        resolve_s=min(waits.resolve_s, meet_s),
        silent_s=silent_s,
        beat_s=min(waits.beat_s, silent_s / 5),
    )


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"{name}: {text!r} is not a number of seconds", hint=f"such as {name}={default:g}")
    return seconds


class LostError(RunError):
    """The other end is gone, or not who it should be; the message says how."""


class Wire:
    """A connection with messages on it.

    Attributes:
        heard: When (`time.monotonic()`) anything last came.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._rest = b""
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self.heard = time.monotonic()

    @property
    def ours(self) -> str:
        """Our own address on it."""
        return str(self._socket.getsockname()[0])

    @property
    def theirs(self) -> str:
        """The other end's address."""
        return str(self._socket.getpeername()[0])

    def send(self, message: Message | None) -> None:
        """Send a message, or with None a beat.

        Raises:
            LostError: The connection is broken.
        """
        line = json.dumps(message).encode() + b"\n" if message is not None else b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError as error:
            raise LostError(f"the connection broke ({error.strerror or error})") from error

    def receive(self, wait_s: float) -> Message | None:
        """The next message; None when none comes in time, beats not counted.

        Raises:
            LostError: The connection is broken or closed, or what comes is no message.
        """
        end = time.monotonic() + wait_s
        while b"\n" not in self._rest:
            if not self._poll.poll(max(0.0, end - time.monotonic()) * 1000):
                return None
            self._read()
        line, _, self._rest = self._rest.partition(b"\n")
        if not line:
            return None
        try:
            message = json.loads(line)
        except ValueError as error:
            raise LostError("it does not speak our language: is another program there?") from error
        if not isinstance(message, dict):
            raise LostError("it does not speak our language: is another program there?")
        return message

    def demand(self, wait_s: float) -> Message:
        """The next message, which must come in time.

        Raises:
            LostError: It does not.
        """
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            if (message := self.receive(end - time.monotonic())) is not None:
                return message
        raise LostError(f"no answer came within {wait_s:g} s")

    def close(self) -> None:
        """Close it; who reads it meanwhile sees its end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError as error:
            raise LostError(f"the connection broke ({error.strerror or error})") from error
        if not data:
            raise LostError("it closed the connection")
        if len(self._rest) > _LONGEST_LINE:
            raise LostError("it does not speak our language: is another program there?")
        self._rest += data
        self.heard = time.monotonic()


class Link:
    """A wire that is listened to in the background, and kept alive by beats.

    Attributes:
        wire: The connection.
        lost: Why it is lost; empty while it is not.
    """

    def __init__(self, wire: Wire, waits: Waits, hear: Callable[["Link", Message | None], None]) -> None:
        """Begin to listen.

        Args:
            wire: The connection, both ends of which have shown who they are.
            waits: How often to beat, and how long silence may last.
            hear: Given each message, in the background; None, once, when the link is lost.
        """
        self.wire = wire
        self.lost = ""
        self._waits = waits
        self._hear = hear
        self._closing = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message; to a node that is lost nothing is sent, which its link tells."""
        with contextlib.suppress(LostError):  # the listener sees the same, and tells it
            self.wire.send(message)

    def close(self) -> None:
        """End it, without a word of loss."""
        self._closing.set()
        self.wire.close()

    def _listen(self) -> None:
        next_beat = 0.0
        try:
            while not self._closing.is_set():
                message = self.wire.receive(self._waits.beat_s / 2)
                if message is not None:
                    self._hear(self, message)
                now = time.monotonic()
                # What came while this very process was stopped has been read by now: the silence is the other's.
                if now - self.wire.heard > self._waits.silent_s:
                    raise LostError(f"nothing was heard of it for {self._waits.silent_s:g} s")
                if now >= next_beat:
                    self.wire.send(None)
                    next_beat = now + self._waits.beat_s
        except LostError as error:
            if not self._closing.is_set():
                self.lost = error.message
                self.wire.close()
                self._hear(self, None)


def challenge(wire: Wire, key_file: Path, key: str, wait_s: float) -> None:
    """Node 0's side: have a newcomer prove that it can read the secret, and prove the same.

    Raises:
        LostError: It cannot; the message is for people.
    """
    nonce = secrets.token_hex(16)
    wire.send({"llmkit": _PROTOCOL, "key": str(key_file), "nonce": nonce})
    answer = wire.demand(wait_s)
    if answer.get("unseen"):
        raise LostError(
            f"it does not see {key_file.parent.parent}: the folder of runs must be shared by all nodes"
        )
    theirs = str(answer.get("nonce", ""))
    if not hmac.compare_digest(str(answer.get("proof", "")), _proof(key, "node", nonce, theirs)):
        raise LostError("it does not know this run's secret: is it of another run?")
    wire.send({"proof": _proof(key, "node 0", theirs, nonce)})


def answer_challenge(wire: Wire, waits: Waits) -> None:
    """The other nodes' side of `challenge`.

    Raises:
        LostError: Whoever listens there is not node 0 of this run.
        RunError: The folder of runs is not shared.
    """
    asked = wire.demand(waits.see_s)
    if asked.get("llmkit") != _PROTOCOL:
        raise LostError("it speaks another version of our language: is it another version of llmkit?")
    key = _read_key(Path(str(asked.get("key"))), waits.see_s)
    if key is None:
        wire.send({"unseen": True})
        folder = Path(str(asked.get("key"))).parent.parent
        raise RunError(
            f"what node 0 wrote to {folder} is not seen on this node",
            hint="the folder of runs must be shared by all nodes and have the same path: --runs /shared/runs on each",
        )
    nonce, theirs = secrets.token_hex(16), str(asked.get("nonce"))
    wire.send({"nonce": nonce, "proof": _proof(key, "node", theirs, nonce)})
    proof = str(wire.demand(waits.see_s).get("proof", ""))
    if not hmac.compare_digest(proof, _proof(key, "node 0", nonce, theirs)):
        raise LostError("it does not know this run's secret")


def _read_key(path: Path, wait_s: float) -> str | None:
    """The secret, once it can be seen; nothing but a file of ours is read."""
    if path.name != KEY or not path.parent.name.startswith(".scratch-"):
        return None
    end = time.monotonic() + wait_s
    while True:
        try:
            return path.read_text()
        except PermissionError as error:
            raise RunError(
                f"{path}: only the user who runs node 0 may read this", hint="run all nodes as the same user"
            ) from error
        except OSError:
            if time.monotonic() >= end:
                return None
            time.sleep(0.2)


def _proof(key: str, who: str, *nonces: str) -> str:
    return hmac.new(key.encode(), " ".join((who, *nonces)).encode(), hashlib.sha256).hexdigest()


Inbox = SimpleQueue[tuple[int, Message | None]]
"""By the number of a node: what it said, or None, once, when it is lost."""
