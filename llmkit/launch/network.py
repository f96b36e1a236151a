"""Where nodes meet: names, addresses, the interface on the way, and a port to listen on. No torch."""

import errno
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.errors import RunError, UsageError

BACKLOG = 1024
"""Connections that may wait to be accepted: a thousand nodes come in the same second."""

INTERFACE_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Variables that tell torch's libraries over which network interface to talk."""


@dataclass(frozen=True)
class Place:
    """A host and a port, as a person writes them.

    Attributes:
        host: A name or an address.
        port: From 1 on; 0 lets the system choose, where one listens.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_place(text: str, said_by: str) -> Place:
    """`HOST:PORT`, or `[ADDRESS]:PORT` for IPv6.

    Args:
        text: What was given.
        said_by: Where, for the error.

    Raises:
        UsageError: It is not of this form.
    """
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_number = port.isascii() and port.isdigit()
    if not colon or not host or not is_number or (":" in host and not text.startswith("[")):
        raise UsageError(
            f"{said_by}: {text!r} is not HOST:PORT",
            hint="such as node0:29400 or 10.0.0.7:29400; [fd00::7]:29400 for IPv6",
        )
    if not 0 < int(port) < 65536:
        raise UsageError(f"{said_by}: {text!r}: ports go from 1 to 65535", hint="such as 29400")
    return Place(host, int(port))


def resolve(host: str, *, wait_s: float = 0.0, tell: Callable[[str], None] = lambda line: None) -> list[str]:
    """The addresses of a host, IPv4 first.

    Args:
        host: A name or an address.
        wait_s: How long a name that is not known yet is asked for: in Kubernetes it comes with the pod.
        tell: Told once that it is waited for.

    Raises:
        RunError: The name has no address.
    """
    end, told = time.monotonic() + wait_s, False
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            if time.monotonic() >= end:
                raise RunError(
                    f"the host name {host!r} has no address on this machine ({error.strerror})",
                    hint="check --rendezvous, or give the address of node 0 instead of its name",
                ) from error
            if not told:
                tell(f"the host name {host!r} has no address yet: asking for {wait_s:g} s")
                told = True
            time.sleep(min(1.0, max(0.05, wait_s / 20)))
        else:
            addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
            return sorted(addresses, key=lambda address: ":" in address)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def listen(place: Place, addresses: list[str]) -> socket.socket:
    """Listen at one address of this machine, the first of those given that is its own; never on all of them.

    Args:
        place: As the person wrote it, for errors; its port counts.
        addresses: Those of the host.

    Raises:
        RunError: None of them is this machine's, or the port is taken.
    """
    if not is_loopback_name(place.host) and all(is_loopback(address) for address in addresses):
        raise RunError(
            f"{place.host} is {addresses[0]} on this machine, which no other node can reach",
            hint="give node 0's address on the network instead: --rendezvous ADDRESS:PORT",
        )
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return socket.create_server((address, place.port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise RunError(
                    f"port {place.port} of {address} is taken{_by_whom(place.port)}",
                    hint="end that, or give every node another port: --rendezvous HOST:PORT",
                ) from error
            if error.errno != errno.EADDRNOTAVAIL:
                raise RunError(f"cannot listen at {place}: {error.strerror}") from error
    known = "" if addresses == [place.host] else f" ({', '.join(addresses)})"
    raise RunError(
        f"{place.host}{known} is not this machine, which is to be node 0",
        hint="--rendezvous is the address of node 0 itself; behind a service of Kubernetes, a headless one",
    )


def is_loopback_name(host: str) -> bool:
    """Whether somebody who writes this host means this machine alone."""
    if host == "localhost":
        return True
    try:
        return is_loopback(host)
    except ValueError:
        return False


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this address; None where none has.

    gloo and NCCL take a name; left alone, they may take one that leads nowhere.
    """
    import psutil  # here, as only who starts workers on several nodes needs it

    wanted = address.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == wanted for one in addresses):
            return str(name)
    return _of_loopback() if is_loopback(address) else None  # 127.0.1.1 stands on no interface


def _of_loopback() -> str | None:
    """The interface that has 127.0.0.1."""
    return interface_of("127.0.0.1")


def _by_whom(port: int) -> str:
    """Who listens at a port, as far as this user may know."""
    import psutil

    try:
        taken = [
            one
            for one in psutil.net_connections("tcp")
            if one.laddr and one.laddr.port == port and one.status == "LISTEN"
        ]
        pid = next((one.pid for one in taken if one.pid), None)
        if pid is not None:
            return f" by {psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        pass
    return " by a process that this user cannot see"
