"""Several processes that write one checkpoint side by side, in a thread of each."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from llmkit.errors import LostWorkerError, RunError
from llmkit.train.devices import naming_lost_workers

T = TypeVar("T")
# Others wait here while the first process hashes everything. One that died is noticed at once, by its connection.
_TIMEOUT = timedelta(hours=2)
_MEETINGS: list[Any] = []
"""Keeps the last collective of each group alive until the process ends; see `devices.leave`."""


class Together:
    """All processes of the run, in a process group of their own: a thread may talk while training goes on.

    Every process makes it at the same time, and then calls the same methods in the same order.

    Attributes:
        group: The process group; None where this process was started alone.
        rank: This process's number.
        size: How many there are.
    """

    def __init__(self) -> None:
        several = dist.is_initialized()
        self.group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT) if several else None
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    def do(self, work: Callable[[], T], doing: str) -> list[T]:
        """Do one's part, wait for all others, and return all results; raise everywhere what failed anywhere.

        Args:
            work: This process's part; what it returns must be picklable.
            doing: In words, for the error when a process was lost: `saving to DIR`.

        Raises:
            RunError: Another process failed.
            LostWorkerError: Another process is gone.
        """
        if self.group is None:
            return [work()]
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:  # raised below, when the others know
            error = raised
        # As text: not every exception can be pickled, and one that cannot would leave the others waiting.
        told = (str(getattr(error, "message", error)), str(getattr(error, "hint", ""))) if error else None
        outcomes: list[Any] = [None] * self.size
        try:
            with naming_lost_workers():
                dist.all_gather_object(outcomes, (result, told), group=self.group)
        except LostWorkerError as lost:
            raise LostWorkerError(f"{lost.message}, while {doing}", hint=lost.hint) from lost
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise RunError(f"process {rank} could not save: {problem[0]}", hint=problem[1])
        return [outcome for outcome, _ in outcomes]

    def close(self) -> None:
        """Wait for the others; before the process group is destroyed, and when nothing is left to do."""
        if self.group is None:
            return
        meeting = dist.barrier(group=self.group, async_op=True)
        assert meeting is not None
        meeting.wait()
        _MEETINGS.append(meeting)


def check_seen(folder: Path, rank: int, sizes: Mapping[str, int]) -> None:
    """Whether the first process sees what another one has written.

    Args:
        folder: Where.
        rank: The other one.
        sizes: Bytes of its files, by name.

    Raises:
        RunError: It does not.
    """
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise RunError(
                f"process {rank} wrote {size:,} bytes to {file}, the first process sees {found:,} there",
                hint="The run folder must be on a file system that all machines share: choose it with --runs DIR.",
            )
