"""What nodes tell each other of themselves, and what their workers must know to meet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import llmkit
from llmkit.launch.network import INTERFACE_NAMES, Place, interface_of

_PACKAGES = ("torch", "transformers", "accelerate")
_SHOWN = 3
MEETING = "tcp://"
"""How `LLMKIT_RENDEZVOUS` begins where nodes meet: `tcp://HOST:PORT/TOKEN`; else it is a file."""


@dataclass(frozen=True)
class Card:
    """What a node is; all nodes of a run must be the same.

    Attributes:
        verb: The command.
        settings: The recipe's settings by dotted key, as a recipe spells them; secrets as the expressions they are.
        versions: Of what computes.
        device: The kind of device, its maker's name, and how many of them a node has.
        processes: Workers of a node.
    """

    verb: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str
    processes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def differs_from(self, other: Mapping[str, Any]) -> str:
        """In what another node is not as this one, in words; empty where in nothing.

        Args:
            other: Its card, as JSON values.
        """
        for name in ("verb", "device", "processes"):
            here, there = getattr(self, name), other.get(name)
            if here != there:
                return f"{_NAMES[name]} {there!r} there, {here!r} on node 0"
        for name, what in (("versions", "another version of"), ("settings", "another recipe:")):
            here, there = getattr(self, name), other.get(name, {})
            keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
            if keys:
                shown = [
                    f"{key} {there.get(key)!r} there, {here.get(key)!r} on node 0" for key in keys[:_SHOWN]
                ]
                more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                return f"{what} {'; '.join(shown)}{more}"
        return ""


_NAMES = {"verb": "the command is", "device": "it computes on", "processes": "workers of a node are"}


def versions() -> dict[str, str]:
    """Versions of what computes, without importing it."""
    found = {"llmkit": llmkit.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def meeting_env(place: Place, token: str, *, ours: str) -> dict[str, str]:
    """What all workers of a node know of where workers meet.

    Args:
        place: Where rank 0 listens.
        token: Sets this start's words apart from others'.
        ours: This node's address on the way there: what listens here does so on its interface alone.
    """
    env = {
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        "LLMKIT_RENDEZVOUS": f"{MEETING}{place}/{token}",
    }
    interface = interface_of(ours)
    if interface is not None:
        env |= dict.fromkeys(INTERFACE_NAMES, interface)
    return env
