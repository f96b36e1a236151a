"""Saving without stopping: between two steps a copy is taken, and one thread writes it while training goes on.

The copy goes to buffers on the host that are kept from one save to the next. At most one checkpoint is being written;
what went wrong there is raised at the next step. Which checkpoints stay is decided by step number, never by clock.

**Source**: Mohan, Phanishayee and Chidambaram, "CheckFreq: Frequent, Fine-Grained DNN Checkpointing", FAST 2021,
section 4 (snapshot, then persist in the background).
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from llmkit.errors import CorruptError, RunError, UsageError
from llmkit.plan.saving import UNKNOWN_BYTES_PER_S, reserve_s
from llmkit.registry import MEASURED, lower_is_better
from llmkit.train.checkpoint import Checkpoints, Tensors, verify
from llmkit.train.state import TrainState

BEST = "best.json"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay.

    Attributes:
        last: So many of the newest.
        every: Those whose step is a multiple; 0 is none.
        best: The one that was best by this metric, such as `eval/loss`; None for none.
    """

    last: int
    every: int = 0
    best: str | None = None

    def surplus(self, steps: list[int], best: int | None) -> list[int]:
        """Of the steps, ascending, those whose checkpoints may go."""
        stay = {*steps[-self.last :], best}
        return [step for step in steps if step not in stay and not self._marks(step)]

    def _marks(self, step: int) -> bool:
        """Whether it stays for good by its number. Step 0 does not: nothing was learnt by it."""
        return self.every > 0 and step > 0 and step % self.every == 0


@dataclass
class Best:
    """The best checkpoint so far, remembered in `checkpoints/best.json`.

    Attributes:
        metric: By which metric.
        step: Of which step; None where there was none yet.
        value: The metric there.
    """

    metric: str
    step: int | None = None
    value: float = math.nan

    @classmethod
    def of(
        cls,
        checkpoints: Checkpoints,
        metric: str,
        *,
        up_to: int,
        warn: Callable[[str], None] = lambda text: None,
    ) -> "Best":
        """What an earlier session left, unless it is of another metric, gone, or later than the resumed step.

        What is damaged, this note or the checkpoint it tells of, is named through `warn` and does not count.

        Args:
            checkpoints: Of the run.
            metric: By which metric.
            up_to: The step that the run goes on from, whose checkpoint has been verified.
            warn: Gets the words.

        Raises:
            UsageError: It is not known whether more or less of this metric is better.
            RunError: What is there cannot be read at the moment.
        """
        _check_direction(metric)
        try:
            found = checkpoints.read_note(BEST) or {}
            step = found.get("step")
            if found.get("metric") != metric or step not in checkpoints.steps() or step > up_to:
                return cls(metric)
            if step < up_to:
                verify(checkpoints.path(step))
        except CorruptError as error:
            warn(
                f"the best checkpoint up to now, by {metric}, is not known or damaged, and no longer counts: {error}"
            )
            return cls(metric)
        return cls(metric, step, found["value"])

    def remember(self, checkpoints: Checkpoints) -> None:
        """Leave this for the next session."""
        checkpoints.write_note(BEST, {"metric": self.metric, "step": self.step, "value": self.value})

    def beaten_by(self, figures: Mapping[str, float]) -> bool:
        """Whether these figures are better than all before.

        Raises:
            UsageError: The evaluation has no such metric.
        """
        if self.metric not in figures:
            measured = ", ".join(sorted(figures))
            raise UsageError(
                f"checkpoint.keep_best: {self.metric!r} is not measured while training",
                hint=f"choose one of {measured}"
                if measured
                else "there is no held-out text: raise `held_out`",
            )
        value = figures[self.metric]
        if self.step is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < self.value if lower_is_better(self.metric) else value > self.value


def _check_direction(metric: str) -> None:
    if metric not in MEASURED:
        known = ", ".join(MEASURED)
        raise UsageError(
            f"checkpoint.keep_best: it is not known whether more or less of {metric!r} is better",
            hint=f"choose one of {known}",
        )


class HostCopy:
    """Buffers on the host that tensors are copied into, kept from one time to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: Any = None

    def reserve(self, tensors: Tensors) -> None:
        """Make the buffers, so that the first copy does not pay for it: fresh memory costs on first touch."""
        for name, tensor in tensors.items():
            if not self._fits(name, tensor):
                self._buffers[name] = _host_buffer(tensor)

    def take(self, tensors: Tensors) -> None:
        """Copy `tensors`; what is done to them after this call does not reach the copy."""
        self.reserve(tensors)
        for name in self._buffers.keys() - tensors.keys():
            del self._buffers[name]
        for name, tensor in tensors.items():
            # Other devices than these have nothing here that says when a copy is complete.
            self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
        # On a GPU the copies are queued behind the step, and the next step behind them: the host need not wait.
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tensors(self) -> Tensors:
        """The copy, complete."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._buffers

    def _fits(self, name: str, tensor: torch.Tensor) -> bool:
        kept = self._buffers.get(name)
        return kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype


def _host_buffer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


@dataclass
class _Writing:
    """One save in its thread, and what went wrong in it."""

    thread: threading.Thread
    error: list[BaseException]

    @classmethod
    def start(cls, work: Callable[[], None]) -> "_Writing":
        """Begin `work` in a thread."""
        error: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as raised:  # raised again in the training thread, by `Saver.check`
                error.append(raised)

        thread = threading.Thread(target=guarded, name="save", daemon=True)
        thread.start()
        return cls(thread, error)


class Writer(Protocol):
    """Takes a model's tensors and writes them as a checkpoint: `Checkpoints`, or `ShardedWriter`."""

    def tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
        """Weights and the optimizer's tensors that this process writes, by name."""
        ...

    def write(
        self,
        weights: Tensors,
        moments: Tensors,
        state: TrainState,
        *,
        before_writing: Callable[[], None],
        before_publishing: Callable[[], None],
    ) -> Path:
        """Write a checkpoint of their copies."""
        ...


class Saver:
    """Saves the checkpoints of a run; the first process has one that writes, the others one that only counts.

    All processes make theirs before the first evaluation ends: it reads what was best, which a save writes anew.

    Args:
        checkpoints: Where.
        keep: Which of them stay.
        background: Write while training goes on; else `save` returns when all is on the disk.
        writer: Writes tensors; by default `checkpoints`. With a `ShardedWriter` every process has one.
        writes: Whether this process writes.
        tidies: Whether it also removes what need not stay; one process does.
        resumed: The step of the checkpoint that the run goes on from, which need not be saved again.
        expected_bytes: Size of a checkpoint, for `seconds` until one has been written.
        before_publishing: (step) -> None; called by the writer before the checkpoint becomes visible.
        warn: Gets what a person should know of the best checkpoint of an earlier session.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        keep: Keep,
        *,
        background: bool,
        writer: Writer | None = None,
        writes: bool = True,
        tidies: bool = True,
        resumed: int | None = None,
        expected_bytes: int = 0,
        before_publishing: Callable[[int], None] = lambda step: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._checkpoints = checkpoints
        self._keep = keep
        self._background = background
        self._writer: Writer = checkpoints if writer is None else writer
        self._writes = writes
        self._tidies = tidies
        self._before_publishing = before_publishing
        self._copy = {"model": HostCopy(), "optimizer": HostCopy()}
        self._writing: _Writing | None = None
        self._saved = resumed
        self._guessed_s = expected_bytes / UNKNOWN_BYTES_PER_S
        self._longest_s = 0.0
        self._abandoned = False
        self._best: Best | None = None
        if keep.best is not None and writes:
            self._best = Best.of(checkpoints, keep.best, up_to=resumed or 0, warn=warn)
        elif keep.best is not None:  # it saves nothing, so what was best does not matter to it
            self._best = Best(keep.best)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; its error is raised unless another one is on its way.

        Not after a second Ctrl-C: what is not visible by then will not be, for another run may have the folder.
        """
        if isinstance(error, KeyboardInterrupt):
            self._abandoned = True
            return
        self._join()
        if error is None:
            self.check()

    @property
    def seconds(self) -> float:
        """How long a save takes until it is on the disk, generously: as the longest so far, or by its size."""
        return reserve_s(self._longest_s or self._guessed_s)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far; None where there is none, or none is looked for."""
        return self._best.step if self._best is not None else None

    @property
    def failed(self) -> bool:
        """Whether a save has failed: `check` raises its error."""
        return self._writing is not None and bool(self._writing.error)

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._writing is not None and self._writing.thread.is_alive()

    def pause(self, seconds: float) -> None:
        """Wait until what is being written is on the disk, but not longer than so."""
        if self._writing is not None:
            self._writing.thread.join(seconds)

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self._writing is not None and self._writing.error:
            raise self._writing.error[0]

    def wait(self) -> None:
        """Wait until everything is on the disk, and raise what went wrong."""
        self._join()
        self.check()

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the buffers for the copies; called when the optimizer has its state."""
        if self._background and self._writes:
            weights, moments = self._writer.tensors(model, optimizer)
            self._copy["model"].reserve(weights)
            self._copy["optimizer"].reserve(moments)

    def is_best(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether the evaluation of a step was better than all before, by the metric to keep the best by.

        Of step 0, which nothing was learnt by, it is only looked whether the metric is there.

        Raises:
            UsageError: It is not.
        """
        if self._best is None or not self._best.beaten_by(figures) or step == 0:
            return False
        self._best = Best(self._best.metric, step, figures[self._best.metric])
        return True

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Save a checkpoint of `state`, unless that is done or being done.

        Returns when the copy is taken, or without `background` when all is on the disk. A save before this one is
        waited for first, and its error raised.
        """
        if not self._writes:
            return
        self.wait()
        best = (
            self._best
        )  # as it is now: one that is found while this is being written is not on the disk yet
        if self._saved == state.step:
            self._tidy(state.step, best)
            return
        start = time.perf_counter()
        weights, moments = self._writer.tensors(model, optimizer)
        if self._background:
            self._copy["model"].take(weights)
            self._copy["optimizer"].take(moments)
        self._saved = state.step

        def write() -> None:
            if self._background:
                self._write(self._copy["model"].tensors(), self._copy["optimizer"].tensors(), state)
            else:
                self._write(_on_host(weights), _on_host(moments), state)
            self._tidy(state.step, best)
            self._longest_s = max(self._longest_s, time.perf_counter() - start)

        if self._background:
            self._writing = _Writing.start(write)
        else:
            write()

    def _write(self, weights: Tensors, moments: Tensors, state: TrainState) -> None:
        self._writer.write(
            weights,
            moments,
            state,
            before_writing=lambda: _check_finite(weights, state.step),
            before_publishing=lambda: self._announce(state.step),
        )

    def _announce(self, step: int) -> None:
        self._before_publishing(step)
        if self._abandoned:
            raise RunError(f"step {step}: stopped before its checkpoint was complete")

    def _tidy(self, step: int, best: Best | None) -> None:
        """Remember the best and remove what need not stay. Later checkpoints, not gone on from, go too."""
        if not self._tidies:
            return
        if best is not None and best.step == step:
            best.remember(self._checkpoints)
        steps = self._checkpoints.steps()
        until_now = [one for one in steps if one <= step]
        stays = best.step if best is not None else None
        for one in [*self._keep.surplus(until_now, stays), *(one for one in steps if one > step)]:
            self._checkpoints.remove(one)

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.thread.join()


def _check_finite(weights: Tensors, step: int) -> None:
    broken = next((name for name, tensor in weights.items() if not _is_finite(tensor)), None)
    if broken is not None:
        raise RunError(
            f"step {step}: the weights of {broken} are not finite, so nothing is saved over good ones",
            hint="The last checkpoint is untouched. A lower `train.optim.lr` or a longer `warmup` usually helps.",
        )


def _on_host(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite. By numpy, a piece at a time: torch would take the cores from the training."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype not in (torch.float32, torch.float64, torch.float16):
        tensor = tensor.float()
    flat = tensor.detach().reshape(-1).numpy()
    size = 1 << 20
    return all(bool(np.isfinite(flat[i : i + size]).all()) for i in range(0, len(flat), size))
