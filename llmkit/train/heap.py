"""Memory that was freed, given back to the system when a process holds more than was planned.

Rows of many lengths take blocks of many sizes. What is free between them fits no later block, so what the process
holds grows from step to step, though what is in use does not: after an hour it may be twice the plan.
"""

import ctypes
from collections.abc import Callable

import psutil

from llmkit.plan import Plan

_AGAIN = 1.25
"""Where much stays in use, as much more is let grow before anything is tried again."""
_ROOM = 0.5
"""Share of a micro-batch's memory that must find no hole: what is free is given back before that is too little."""


class Heap:
    """The C library's heap of this process.

    Args:
        planned: Bytes that the process may hold before anything is given back.
    """

    def __init__(self, planned: float) -> None:
        self._planned = self._limit = planned
        self._process = psutil.Process()
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def tidy(self) -> None:
        """Give back what is free, if more is held than may be; between two micro-batches, when little is in use.

        Only the C library of GNU can be asked to; with others nothing happens. Numbers do not change.

        **Source**: malloc_trim(3).
        """
        if self._trim is None or self._process.memory_info().rss <= self._limit:
            return
        self._trim(0)
        self._limit = max(self._planned, _AGAIN * self._process.memory_info().rss)


def held_between(plan: Plan) -> float:
    """Bytes that a process may hold between two micro-batches, so that with the next one it holds what is planned.

    Where rows have one length, what is free is used again as it is, and nothing need be given back below the plan.
    """
    needed = plan.memory.activations + plan.memory.logits
    return plan.memory.total - (_ROOM * needed if plan.micro_batch_tokens else 0)
