"""A teacher that is asked once: what it says of all rows is kept on disk before training, by all processes together."""

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from llmkit.data.loader import MicroBatches
from llmkit.data.rows import Ints
from llmkit.data.sample_batches import SampleBatches
from llmkit.data.taught import Lines, TaughtStore, examples_of
from llmkit.durable import make_folders
from llmkit.errors import CorruptError, CtrlCError, InterruptedRunError, LostWorkerError, RunError
from llmkit.launch.signals import STOP_SIGNALS, TIME_IS_UP, describe_stop
from llmkit.objectives.base import size_of
from llmkit.objectives.taught import Taught
from llmkit.plan.describe import bytes_text
from llmkit.report.console import Reporter

_TOKENS = 4096
"""Tokens that a teacher reads at a time. Not the run's, which go by the machine: the same rows then give the same bits
whatever the processes and whenever a part of them was made."""
_REASONS = (*STOP_SIGNALS, TIME_IS_UP)


@dataclass(frozen=True)
class Asking:
    """What a teacher is asked, and where its words are kept.

    Attributes:
        store: Where.
        objective: What is learned of a row.
        batches: Which rows there are, and what is made of them.
        bf16: Compute matrix products in bfloat16, as the run does.
        stop: What asks this process to stop, or 0.
    """

    store: TaughtStore
    objective: Taught
    batches: MicroBatches | SampleBatches
    bf16: bool
    stop: Callable[[], int]

    def make(self, part: int, teacher: PreTrainedModel) -> None:
        """Ask of the rows of a part, and keep it.

        Raises:
            InterruptedRunError: This process was asked to stop.
        """
        self.store.write(part, self._lines(part, teacher))

    def _lines(self, part: int, teacher: PreTrainedModel) -> Iterator[Lines]:
        for examples in _together(self.batches, self.store.by, self.store.keys(part), self.objective):
            if self.stop():
                raise InterruptedRunError("asked to stop")
            device = teacher.device.type
            with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
                found = self.objective.ask(teacher, examples)
            yield from found


def teach(
    asking: Asking,
    load: Callable[[], PreTrainedModel],
    accelerator: Accelerator,
    reporter: Reporter,
    *,
    num_bytes: int,
) -> None:
    """See that the store holds all that the run needs; every process calls it.

    Args:
        asking: What is asked.
        load: Gives the teacher, frozen, in evaluation mode; not called where nothing is missing.
        accelerator: The processes, and the device.
        reporter: Told what happens.
        num_bytes: What the whole store takes, about.

    Raises:
        RunError: It does not fit on the disk, or cannot be written.
        InterruptedRunError: A signal; what is whole stays.
    """
    store = asking.store
    missing, damaged = _from_first(accelerator, lambda: _missing(store))
    for line in damaged:
        reporter.warn(f"{line}; the teacher is asked again")
    what = f"{store.num_keys:,} {store.by}s"
    if not missing:
        reporter.note(f"the teacher is not loaded: what it says of {what} is in {store.folder}")
        return
    left = int(num_bytes * sum(len(store.keys(part)) for part in missing) / store.num_keys)
    _refuse_full_disk(store.folder, left, accelerator)
    reporter.phase("teach", f"the teacher is asked of {what}, {bytes_text(left)} to write")
    teacher = load().to(accelerator.device)
    world, rank = accelerator.num_processes, accelerator.process_index
    for start in range(0, len(missing), world):
        with _meeting(accelerator, asking.stop):
            for part in missing[start + rank : start + rank + 1]:
                asking.make(part, teacher)
        reporter.progress("teach", min(start + world, len(missing)), len(missing), unit="part")


def _missing(store: TaughtStore) -> tuple[list[int], list[str]]:
    """Parts that are to be made, and what is wrong with those that are damaged."""
    missing, damaged = [], []
    for part in range(store.num_parts):
        try:
            if not store.has(part):
                missing.append(part)
        except CorruptError as error:
            missing.append(part)
            damaged.append(error.message)
    return missing, damaged


def _together(
    batches: MicroBatches | SampleBatches, by: str, keys: Sequence[int], objective: Taught
) -> Iterator[list[Mapping[str, Ints]]]:
    """The examples of some keys, as many at a time as have not too many tokens with the longest's padding."""
    found: list[Mapping[str, Ints]] = []
    longest = 0
    for key in keys:
        (one,) = examples_of(batches, by, [key])
        size = size_of(objective.base, one)
        if found and max(longest, size) * (len(found) + 1) > _TOKENS:
            yield found
            found, longest = [], 0
        found.append(one)
        longest = max(longest, size)
    if found:
        yield found


@contextmanager
def _meeting(accelerator: Accelerator, stop: Callable[[], int]) -> Iterator[None]:
    """Wait for the others after this process's share; what stops one of them stops all.

    Raises:
        RunError: Of this process, or another's.
        InterruptedRunError: One was asked to stop.
    """
    failed: RunError | None = None
    try:
        yield
    except InterruptedRunError:
        pass  # the others are told below
    except RunError as error:
        failed = error
    reason = stop()
    facts = [failed is not None, *(reason == known for known in _REASONS)]
    failures, *reasons = accelerator.reduce(torch.tensor(facts, dtype=torch.int64), "sum").tolist()
    if failed is not None:
        raise failed
    if failures:
        raise LostWorkerError("another process could not keep what the teacher said; its own words say why")
    asked = next((known for known, count in zip(_REASONS, reasons, strict=True) if count), 0)
    if asked:
        kind = CtrlCError if asked == signal.SIGINT else InterruptedRunError
        raise kind(
            f"stopped by {describe_stop(asked)} while the teacher was asked; what it said up to now is kept",
            hint="The same command goes on from there.",
        )


def _refuse_full_disk(folder: Path, needed: int, accelerator: Accelerator) -> None:
    """Refuse before the teacher is loaded what does not fit on the disk.

    Raises:
        RunError: It does not.
    """

    def free() -> int:
        make_folders(folder)
        return shutil.disk_usage(folder).free

    left = _from_first(accelerator, free)
    if needed > left:
        raise RunError(
            f"distil.cache: what the teacher says takes about {bytes_text(needed)}, and {bytes_text(left)} are free at "
            f"{folder}",
            hint="a smaller `distil.cache.top_k`, another disk with --runs DIR, or leave `cache` out",
        )


def _from_first(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """Let the first process decide, and all others take its decision."""
    decision = [decide() if accelerator.is_main_process else None]
    broadcast_object_list(decision)
    return decision[0]
