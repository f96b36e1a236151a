"""The training loop. Read this first: everything that changes a run stands here, from top to bottom.

A step: its micro-batches (a pure function of its number), the targets they hold on all devices, forward and
backward on each, clip, set the learning rate (a pure function of the step), update. The loss is a sum divided
once by that count, so it is the mean over the step's targets however they are split over micro-batches and
devices.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from llmkit.errors import CtrlCError, InterruptedRunError, RunError
from llmkit.objectives.base import Batch, LossModule
from llmkit.optim import set_lr
from llmkit.train.callbacks import Callback
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.state import TrainState, mix_seed

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MicroBatch = tuple[int, Batch]
"""A micro-batch and its number within the step, counted over all devices."""


@dataclass(frozen=True)
class Schedule:
    """When things happen; a step count of 0 is never.

    Attributes:
        num_steps: The run's length.
        tokens_per_step: Positions that one step computes, over all devices.
        log_every: Figures are recorded after every so many steps.
        eval_every: Held-out loss and samples, likewise.
        eval_rows: Held-out rows that such an evaluation takes, or None for all; the last one takes all.
        checkpoint_every: Checkpoints, likewise.
        lr_at: The learning rate of the update that starts at a step.
        grad_clip: The largest norm of the gradient; infinity leaves it alone.
    """

    num_steps: int
    tokens_per_step: int
    log_every: int
    eval_every: int
    eval_rows: int | None
    checkpoint_every: int
    lr_at: Callable[[int], float]
    grad_clip: float


@dataclass(frozen=True)
class Training:
    """The parts of a run. Only the weights, the optimizer and the clock change while it goes.

    Attributes:
        accelerator: Device work: backward, reduction, clipping.
        module: Model and objective as prepared by the accelerator: `module(batch)` is a `Loss`.
        core: The same without wrapping.
        optimizer: As prepared by the accelerator.
        micro_batches: A step -> this process's share of it, on the device.
        evaluate: A number of held-out rows, or None for all -> figures named `eval/...`; every process calls it.
        sample: A step -> (prompt, continuation) pairs; the first process calls it.
        stop_signal: () -> the signal that asked this process to stop, or 0.
        watch_speed: (tokens per second) -> further figures: utilisation, memory.
    """

    accelerator: Accelerator
    module: torch.nn.Module
    core: LossModule
    optimizer: torch.optim.Optimizer
    micro_batches: Callable[[int], Sequence[MicroBatch]]
    schedule: Schedule
    seed: int
    checkpoints: Checkpoints
    evaluate: Callable[[int | None], Mapping[str, float]]
    sample: Callable[[int], Sequence[tuple[str, str]]]
    stop_signal: Callable[[], int]
    watch_speed: Callable[[float], Mapping[str, float]]
    callbacks: Sequence[Callback]


def train(run: Training, state: TrainState) -> tuple[TrainState, Mapping[str, float]]:
    """Train from `state` to the end of the schedule, and measure the result on all held-out rows.

    The last step's checkpoint is always saved, before that measurement.

    Returns:
        The last state, and its figures named `eval/...`.

    Raises:
        InterruptedRunError: A signal asked to stop; the state was saved first.
        RunError: The loss or the gradient is not finite.
    """
    schedule = run.schedule
    run.module.train()
    if state.step == 0:
        observe(run, state, schedule.eval_rows)
    clock = Clock()
    for step in range(state.step, schedule.num_steps):
        micro_batches = run.micro_batches(step)
        num_targets, signum = agree(run, micro_batches)
        if signum:
            save(run, state)
            raise _interrupted(signum, state)
        total, grad_norm = train_step(run, step, micro_batches, num_targets)

        saving = _due(step + 1, schedule.checkpoint_every) or step + 1 == schedule.num_steps
        logging = _due(step + 1, schedule.log_every) or step + 1 == schedule.num_steps
        if saving or logging or run.accelerator.device.type == "cpu":  # elsewhere, looking costs a sync
            loss = _finite_loss(run, total / num_targets, grad_norm, step + 1)
        # After the sync, if there was one: before it, a GPU has only been given the work.
        state = state.after(tokens=schedule.tokens_per_step, seconds=clock.lap(schedule.tokens_per_step))
        if logging:
            _record_step(run, state, loss, float(grad_norm), clock.tokens_per_s())
        if _due(state.step, schedule.eval_every) and state.step < schedule.num_steps:
            observe(run, state, schedule.eval_rows)
        if saving:
            save(run, state)
        clock.restart()
    return state, observe(run, state, None)


def train_step(
    run: Training, step: int, micro_batches: Sequence[MicroBatch], num_targets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: from its micro-batches to new weights.

    Args:
        run: The parts.
        step: Steps made so far.
        micro_batches: This process's share of the step.
        num_targets: Terms of the loss over all devices.

    Returns:
        This process's loss sum in nats, and the norm of the gradient before clipping; both on the device.
    """
    accelerator = run.accelerator
    # accelerate divides by the micro-batches, DDP by the processes: both take means, the loss here is a sum.
    scale = len(micro_batches) * accelerator.num_processes / num_targets
    total = torch.zeros((), device=accelerator.device)
    for index, batch in micro_batches:
        torch.manual_seed(mix_seed(run.seed, step, index))  # dropout: the same on any number of devices
        with accelerator.accumulate(run.module):
            loss = run.module(batch)
            accelerator.backward(loss.total * scale)
        total += loss.total.detach()
    grad_norm = accelerator.clip_grad_norm_(run.core.parameters(), run.schedule.grad_clip)
    set_lr(run.optimizer, run.schedule.lr_at(step))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, grad_norm


def agree(run: Training, micro_batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """What all processes must know before a step: its number of targets, and whether any was asked to stop.

    Returns:
        Targets over all devices, and the signal to obey: 0 for none.

    Raises:
        RunError: The step has no targets: there is nothing to learn.
    """
    mine = sum(int(batch["num_targets"]) for _, batch in micro_batches)
    signum = run.stop_signal()
    asked = [signum == known for known in _STOP_SIGNALS]
    facts = torch.tensor([mine, *asked], dtype=torch.int64)
    num_targets, *counts = run.accelerator.reduce(facts, "sum").tolist()
    if num_targets == 0:
        raise RunError("a step without a single target: nothing to learn from", hint="look at the data")
    return num_targets, next((known for known, count in zip(_STOP_SIGNALS, counts, strict=True) if count), 0)


def observe(run: Training, state: TrainState, rows: int | None) -> Mapping[str, float]:
    """Evaluate on so many held-out rows (None: all) and draw samples; every process takes part."""
    figures = run.evaluate(rows)
    if not run.accelerator.is_main_process:
        return figures
    samples = run.sample(state.step)
    for callback in run.callbacks:
        callback.on_record({"step": state.step, **figures}, num_steps=run.schedule.num_steps)
        for prompt, text in samples:
            callback.on_sample(state.step, prompt, text)
    return figures


def save(run: Training, state: TrainState) -> None:
    """Save a checkpoint; the first process writes, the others wait."""
    if run.accelerator.is_main_process:
        if not all(bool(torch.isfinite(weight).all()) for weight in run.core.parameters()):
            raise RunError(f"step {state.step}: weights are not finite, so nothing is saved over good ones")
        for callback in run.callbacks:
            callback.on_save(state.step)
        run.checkpoints.save(run.core.model, run.optimizer, state)
    run.accelerator.wait_for_everyone()


class Clock:
    """Seconds spent in steps; what lies between `lap` and `restart` (evaluation, saving) does not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._tokens = 0

    def lap(self, tokens: int) -> float:
        """End a step of `tokens`; return its seconds."""
        now = time.perf_counter()
        seconds = now - self._start
        self._start = now
        self._seconds += seconds
        self._tokens += tokens
        return seconds

    def restart(self) -> None:
        """Begin the next step now."""
        self._start = time.perf_counter()

    def tokens_per_s(self) -> float:
        """Speed since the last call."""
        speed = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._seconds, self._tokens = 0.0, 0
        return speed


def _finite_loss(run: Training, mine: torch.Tensor, grad_norm: torch.Tensor, step: int) -> float:
    loss = float(run.accelerator.reduce(mine, "sum"))
    if math.isfinite(loss) and math.isfinite(float(grad_norm)):
        return loss
    raise RunError(
        f"step {step}: the loss is {loss}, the gradient's norm {float(grad_norm)}: not finite",
        hint="The last checkpoint is untouched. A lower `train.optim.lr`, a longer `warmup` or "
        "`machine.precision=fp32` usually helps.",
    )


def _record_step(
    run: Training, state: TrainState, loss: float, grad_norm: float, tokens_per_s: float
) -> None:
    record = {
        "step": state.step,
        "tokens": state.tokens,
        "elapsed_s": round(state.elapsed_s, 3),
        "train/loss": loss,
        "train/lr": run.schedule.lr_at(state.step - 1),
        "train/grad_norm": grad_norm,
        "tokens_per_s": round(tokens_per_s, 1),
        **run.watch_speed(tokens_per_s),
    }
    for callback in run.callbacks:
        callback.on_record(record, num_steps=run.schedule.num_steps)


def _interrupted(signum: int, state: TrainState) -> InterruptedRunError:
    kind = CtrlCError if signum == signal.SIGINT else InterruptedRunError
    return kind(
        f"stopped by {signal.Signals(signum).name} after step {state.step}; everything is saved",
        hint="The same command goes on from there.",
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
