"""How several processes share a measurement. No torch at import."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _alone(found: Mapping[int, Any]) -> Mapping[int, Any]:
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Share:
    """This process's part of the work.

    Attributes:
        rank: Its number.
        world_size: How many processes share the work.
        gather: What this process found, by number -> what all found, on every process, by number in ascending order.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Mapping[int, Any]], Mapping[int, Any]] = _alone


ALONE = Share()
"""The whole work."""


def gather_everywhere(found: Mapping[int, Any]) -> Mapping[int, Any]:
    """What all processes of a group found, by number; each gets all of it."""
    from torch import distributed

    everything: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, dict(found))
    return dict(sorted(pair for part in everything for pair in part.items()))
