"""The training loop. Read this first: everything that changes a run stands here, from top to bottom.

A step: its micro-batches (a pure function of its number), the targets they hold on all devices, forward and
backward on each, clip, set the learning rate (a pure function of the step), update. The loss is a sum divided
once by that count, so it is the mean over the step's targets however they are split over micro-batches and
devices. An objective of several losses has a sum and a count of each.

Arriving at a step, after an update or when a resume begins there, the run evaluates and saves if that is due. So
a resume repeats the evaluation of its first step, and nothing about evaluations need be remembered.
"""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from accelerate import Accelerator

from llmkit.errors import CtrlCError, InterruptedRunError, LostWorkerError, RunError
from llmkit.launch.signals import STOP_SIGNALS, TIME_IS_UP, describe_stop
from llmkit.objectives.base import TARGETS, Batch, LossModule
from llmkit.optim import add_noise, hold_back, set_lr
from llmkit.train.accelerators import as_inputs, end_step
from llmkit.train.ahead import look_ahead
from llmkit.train.callbacks import Callback
from llmkit.train.communication import EveryStep, Exchange
from llmkit.train.early import Patience
from llmkit.train.numbers import Numbers
from llmkit.train.parallel import whole
from llmkit.train.saving import Saver
from llmkit.train.state import TrainState, mix_seed

_MEET_S = 5.0
_REASONS = (*STOP_SIGNALS, TIME_IS_UP)
POSITIONS = "num_positions"
"""In a batch of rows that have many lengths: the positions that the model reads."""
MicroBatch = tuple[int, Batch]
"""A micro-batch and its number within the step, counted over all devices."""


@dataclass(frozen=True)
class Schedule:
    """When things happen; a step count of 0 is never.

    Attributes:
        num_steps: The run's length.
        tokens_per_step: Positions that one step computes, over all devices; of rows of many lengths, about.
        log_every: Figures are recorded after every so many steps.
        eval_every: Held-out loss and samples, likewise.
        eval_rows: Held-out rows that such an evaluation takes, or None for all; the last one takes all.
        checkpoint_every: Checkpoints, likewise.
        keep_every: Checkpoints that stay for good, likewise.
        lr_at: The learning rate of the update that starts at a step.
        grad_clip: The largest norm of the gradient; infinity leaves it alone.
        grad_noise: The standard deviation of the noise on the first step's gradient.
    """

    num_steps: int
    tokens_per_step: int
    log_every: int
    eval_every: int
    eval_rows: int | None
    checkpoint_every: int
    keep_every: int
    lr_at: Callable[[int], float]
    grad_clip: float
    grad_noise: float = 0.0

    def logs(self, step: int) -> bool:
        """Whether figures are recorded at a step."""
        return _due(step, self.log_every) or step == self.num_steps

    def evaluates(self, step: int) -> bool:
        """Whether held-out rows are measured at a step, before the measurement of all of them at the end."""
        return step == 0 or (_due(step, self.eval_every) and step < self.num_steps)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due at a step."""
        return _due(step, self.checkpoint_every) or _due(step, self.keep_every) or step == self.num_steps


@dataclass(frozen=True)
class Training:
    """The parts of a run. Only the weights, the optimizer, the saver and the clock change while it goes.

    Attributes:
        accelerator: Device work: backward, reduction, clipping.
        module: Model and objective as prepared by the accelerator: `module(batch)` is a `Loss`.
        core: The same without wrapping.
        optimizer: As prepared by the accelerator.
        micro_batches: A step -> this process's share of it, on the device.
        numbers: What becomes of losses and gradients that are not finite.
        saver: Writes checkpoints while training goes on.
        evaluate: A number of held-out rows, or None for all, and what to call between batches -> figures named
            `eval/...`; every process calls it.
        sample: A step -> (prompt, continuation) pairs; the first process calls it.
        stop: Seconds that stopping takes -> what asks this process to stop now, or 0.
        watch_speed: (tokens per second) -> further figures: utilisation, memory.
        patience: When a run ends early; None for never.
        choose: The state after the last step -> the one whose weights are the result, which the model has then.
        readers: Processes that read the same rows; all others read different ones.
        together: Whether every process draws samples, for none has the whole model.
        exchange: How what processes learn comes together.
        tidy: Called after each micro-batch; see `heap`.
    """

    accelerator: Accelerator
    module: torch.nn.Module
    core: LossModule
    optimizer: torch.optim.Optimizer
    micro_batches: Callable[[int], Sequence[MicroBatch]]
    schedule: Schedule
    seed: int
    numbers: Numbers
    saver: Saver
    evaluate: Callable[[int | None, Callable[[], object]], Mapping[str, float]]
    sample: Callable[[int], Sequence[tuple[str, str]]]
    stop: Callable[[float], int]
    watch_speed: Callable[[float], Mapping[str, float]]
    callbacks: Sequence[Callback]
    patience: Patience | None = None
    choose: Callable[[TrainState], TrainState] = lambda state: state
    readers: int = 1
    together: bool = False
    exchange: Exchange = field(default_factory=EveryStep)
    tidy: Callable[[], None] = lambda: None

    @property
    def speaks(self) -> bool:
        """Whether this process counts what it read: one of those that read the same rows does."""
        return self.accelerator.process_index % self.readers == 0


class StopAskedError(Exception):
    """Every process leaves what it does: one of them was asked to stop.

    Attributes:
        reason: A signal's number, or `TIME_IS_UP`.
    """

    def __init__(self, reason: int) -> None:
        super().__init__(describe_stop(reason))
        self.reason = reason


def train(run: Training, state: TrainState) -> tuple[TrainState, Mapping[str, float]]:
    """Train from `state` to the end of the schedule, or of patience, and measure the result on all held-out rows.

    The last step's checkpoint is always saved, before that measurement.

    Returns:
        The last state, or that of the best checkpoint if this is what counts; and its figures named `eval/...`.

    Raises:
        InterruptedRunError: Something asked to stop; the state was saved first.
        RunError: The loss or the gradient is not finite, or a checkpoint could not be written.
    """
    run.module.train()
    clock = Clock()
    try:
        state = arrive(run, state)
        while state.step < run.schedule.num_steps and not _is_out(run, state):
            state = advance(run, state, clock)
            state = arrive(run, state)
        figures = observe(run, state, None) if state.step == run.schedule.num_steps else None
        # The rows of the evaluations before, so it counts among them; another number of rows has another loss.
        same_rows = figures is not None and run.schedule.eval_rows is None
        if figures is None or (same_rows and run.saver.is_best(state.step, figures)):
            run.saver.save(run.core.trained, run.optimizer, state)
        finish_saving(run)
        chosen = run.choose(state)
        if figures is None or chosen.step != state.step:
            figures = run.evaluate(None, lambda: agree(run))
    except StopAskedError as asked:
        if asked.reason == TIME_IS_UP and clock.num_steps == 0:
            raise _no_time(run) from None
        run.numbers.look()
        run.saver.save(run.core.trained, run.optimizer, state)
        finish_saving(run)
        raise _interrupted(asked.reason, state) from None
    return chosen, figures


def advance(run: Training, state: TrainState, clock: "Clock") -> TrainState:
    """Make one step and record it.

    Raises:
        StopAskedError: Instead of the step.
    """
    schedule, step = run.schedule, state.step
    clock.restart()
    micro_batches = run.micro_batches(step)
    mine = counts_of(micro_batches)
    counts = dict(zip(mine, agree(run, *mine.values(), soon=clock.longest_s), strict=True))
    if counts[TARGETS] == 0:
        raise RunError("a step without a single target: nothing to learn from", hint="look at the data")
    outcome = train_step(run, step, micro_batches, counts)
    if schedule.logs(step + 1) or schedule.saves(step + 1) or schedule.evaluates(step + 1):
        run.numbers.look()  # a sync, where the device works on its own
    # After the sync, if there was one: before it, a GPU has only been given the work.
    tokens = counts.get(POSITIONS, schedule.tokens_per_step)
    state = state.after(tokens=tokens, seconds=clock.lap(tokens), skipped=outcome.skipped)
    if outcome.skipped:
        run.numbers.count(state.skipped)
    if clock.num_steps == 1:
        run.saver.reserve(run.core.trained, run.optimizer)  # the optimizer has its state from now on
    if schedule.logs(state.step):
        _record_step(run, state, outcome, clock.tokens_per_s())
    return state


def arrive(run: Training, state: TrainState) -> TrainState:
    """What is due at a step that was reached or resumed at: an evaluation, a checkpoint.

    Returns:
        The state with that evaluation counted.

    Raises:
        StopAskedError: In the middle of the evaluation.
    """
    best = False
    if run.schedule.evaluates(state.step):
        run.numbers.look()  # so that no best is saved after a step that was not good
        figures = observe(run, state, run.schedule.eval_rows)
        best = run.saver.is_best(state.step, figures)
        if run.patience is not None:
            state = run.patience.after(state, figures)
    if best or (state.step > 0 and run.schedule.saves(state.step)):
        run.saver.save(run.core.trained, run.optimizer, state)
    return state


def _is_out(run: Training, state: TrainState) -> bool:
    return run.patience is not None and run.patience.is_out(state)


@dataclass(frozen=True)
class Outcome:
    """What a step found.

    Attributes:
        loss: This process's part of what the step lowers, on the device: the parts of all processes add up to it.
        first: Its part of the objective's first loss in nats per target: the same, where there is but one.
        grad_norm: The norm of the gradient before clipping, on the device.
        skipped: Whether the weights were left alone because these were not finite.
    """

    loss: torch.Tensor
    first: torch.Tensor
    grad_norm: torch.Tensor
    skipped: bool


def counts_of(micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
    """The terms of each loss sum in this process's share of a step, by the names that batches give them."""
    names = [name for name in micro_batches[0][1] if name.startswith("num_")]
    return {name: sum(int(batch[name]) for _, batch in micro_batches) for name in names}


def train_step(
    run: Training, step: int, micro_batches: Sequence[MicroBatch], counts: Mapping[str, int]
) -> Outcome:
    """One optimizer step: from its micro-batches to new weights.

    Args:
        run: The parts.
        step: Steps made so far.
        micro_batches: This process's share of the step.
        counts: Terms of each loss sum over all devices.

    Raises:
        RunError: The loss or the gradient is not finite, and the recipe says to stop then.
    """
    accelerator = run.accelerator
    # accelerate divides by the micro-batches, DDP and FSDP by the processes that read different rows: they take means,
    # the loss here is a sum.
    scale = len(micro_batches) * run.exchange.shares(accelerator.num_processes // run.readers)
    counts = as_inputs(counts, accelerator.device)
    shared = run.exchange.counts(counts_of(micro_batches), counts)
    # Every process has as many, and gradients meet at the last of them.
    accelerator.gradient_accumulation_steps, accelerator.step = len(micro_batches), 0
    losses, firsts = {}, []
    for index, batch in look_ahead(run, step, micro_batches):
        torch.manual_seed(mix_seed(run.seed, step, index))  # dropout: the same on any number of devices
        with accelerator.accumulate(run.module):
            found = run.module(batch)
            loss = found.mean(counts)
            accelerator.backward((loss if shared is counts else found.mean(shared)) * scale)
        losses[index] = loss.detach()
        firsts.append(found.totals[TARGETS].detach() / counts[TARGETS])
        run.tidy()
    hold_back(run.optimizer, step)
    grad_norm = whole(accelerator.clip_grad_norm_(run.core.trained.parameters(), run.schedule.grad_clip))
    grad_norm = run.exchange.norm(grad_norm)
    good = run.numbers.good(step, losses, grad_norm)
    if good:
        add_noise(run.core.trained, run.schedule.grad_noise, seed=run.seed, step=step)
        set_lr(run.optimizer, run.schedule.lr_at(step))
        run.optimizer.step()
    run.exchange.updated(step + 1, good=good)
    run.optimizer.zero_grad()
    end_step(accelerator.device)
    loss = torch.stack(list(losses.values())).sum()
    return Outcome(loss, torch.stack(firsts).sum(), grad_norm, not good)


def agree(run: Training, *mine: int, soon: float = 0.0) -> list[int]:
    """Add numbers up over all processes, and learn in the same breath whether one of them must stop.

    Args:
        run: The parts.
        mine: This process's numbers.
        soon: Seconds until the processes agree again.

    Raises:
        StopAskedError: A process was asked to stop: all of them raise this.
        RunError: A checkpoint could not be written: all of them raise.
    """
    reason = run.stop(soon + run.saver.seconds)
    counted = mine if run.speaks else (0,) * len(mine)
    facts = [*counted, run.saver.failed, *(reason == known for known in _REASONS)]
    sums = run.accelerator.reduce(torch.tensor(facts, dtype=torch.int64), "sum").tolist()
    added, (failed, *reasons) = sums[: len(mine)], sums[len(mine) :]
    if failed:
        _raise_failed(run)
    asked = next((known for known, count in zip(_REASONS, reasons, strict=True) if count), 0)
    if asked:
        raise StopAskedError(asked)
    return added


def finish_saving(run: Training) -> None:
    """Wait until everything is on the disk, on every process: none may leave while another still writes.

    The processes meet every few seconds, for a launcher may take a long silence, or one that has left, for a failure.

    Raises:
        RunError: A checkpoint could not be written: all of them raise.
    """
    while True:
        run.saver.pause(_MEET_S)
        facts = torch.tensor([run.saver.busy, run.saver.failed], dtype=torch.int64)
        busy, failed = run.accelerator.reduce(facts, "sum").tolist()
        if failed:
            _raise_failed(run)
        if not busy:
            return


def _raise_failed(run: Training) -> NoReturn:
    run.saver.check()
    raise LostWorkerError("another process could not save its checkpoint; its own words say why")


def observe(run: Training, state: TrainState, rows: int | None) -> Mapping[str, float]:
    """Evaluate on so many held-out rows (None: all) and draw samples; every process takes part."""
    figures = run.evaluate(rows, lambda: agree(run))
    samples = run.sample(state.step) if run.together or run.accelerator.is_main_process else ()
    if not run.accelerator.is_main_process:
        return figures
    for callback in run.callbacks:
        callback.on_record({"step": state.step, **figures}, num_steps=run.schedule.num_steps)
        for prompt, text in samples:
            callback.on_sample(state.step, prompt, text)
    return figures


class Clock:
    """Seconds spent in steps: what lies between `lap` and `restart` (evaluation, saving) does not count.

    Attributes:
        num_steps: Steps timed.
        longest_s: The longest of them, in seconds.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.longest_s = 0.0
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._tokens = 0

    def lap(self, tokens: int) -> float:
        """End a step of `tokens`; return its seconds."""
        seconds = time.perf_counter() - self._start
        self.num_steps += 1
        self.longest_s = max(self.longest_s, seconds)
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


def _record_step(run: Training, state: TrainState, outcome: Outcome, tokens_per_s: float) -> None:
    parts = torch.stack([outcome.loss, outcome.first]) * run.speaks
    loss, first = run.accelerator.reduce(parts, "sum").tolist()
    record = {
        "step": state.step,
        "tokens": state.tokens,
        "elapsed_s": round(state.elapsed_s, 3),
        "train/loss": first,
        **({"train/objective": loss} if loss != first else {}),
        "train/lr": run.schedule.lr_at(state.step - 1),
        "train/grad_norm": float(outcome.grad_norm),
        "tokens_per_s": round(tokens_per_s, 1),
        **({"train/skipped": state.skipped} if state.skipped else {}),
        **run.watch_speed(tokens_per_s),
    }
    for callback in run.callbacks:
        callback.on_record(record, num_steps=run.schedule.num_steps)


def _interrupted(reason: int, state: TrainState) -> InterruptedRunError:
    kind = CtrlCError if reason == signal.SIGINT else InterruptedRunError
    return kind(
        f"stopped by {describe_stop(reason)} after step {state.step}; everything is saved",
        hint="The same command goes on from there.",
    )


def _no_time(run: Training) -> RunError:
    """Not an interruption: whoever starts the run again whenever it was interrupted would do so for ever."""
    return RunError(
        f"--max-time is too short for a single step: {run.saver.seconds:.0f} s of it are kept for saving, and the rest "
        "was used up before the first step",
        hint="give it more time; nothing was trained, and what was saved before is untouched",
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
