"""One process's part in a training run: build the parts, try the largest batch, train, finish."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from llmkit.data.order import RowOrder
from llmkit.durable import write_file, write_json
from llmkit.launch.crew import RESTART
from llmkit.launch.signals import StopSignal
from llmkit.models.recompute import recompute_activations
from llmkit.objectives.base import LossModule
from llmkit.optim import averaged
from llmkit.plan import Plan
from llmkit.plan.choices import state_bytes_of
from llmkit.plan.communication import apart_bytes, overflow_hint
from llmkit.recipe import load_recipe, resolved_yaml
from llmkit.recipe.schema import Section
from llmkit.registry import goal_of
from llmkit.report.console import Reporter
from llmkit.report.run_log import RunLog, read_metrics
from llmkit.report.spikes import SpikeWatch
from llmkit.train.accelerators import settle
from llmkit.train.alike import check_processes
from llmkit.train.build import (
    Data,
    Feed,
    build_optimizer,
    make_order,
    make_schedule,
    open_data,
)
from llmkit.train.callbacks import Callback, ConsoleCallback, KillAt, LogCallback
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.communication import Communicator
from llmkit.train.devices import any_says, from_first, leave, naming_lost_workers, start_accelerator
from llmkit.train.early import Patience, best_metric
from llmkit.train.finish import finish
from llmkit.train.first_step import try_largest_batch, with_attention, with_length
from llmkit.train.heap import Heap, held_between
from llmkit.train.job import Job
from llmkit.train.kernels import frozen_garbage, pull_levers
from llmkit.train.loop import Schedule, Training, train
from llmkit.train.numbers import Numbers
from llmkit.train.own import OwnWriter
from llmkit.train.parallel import distribute, readable
from llmkit.train.parts import build_core_of, feed_of, gathered, isolates, taught_before
from llmkit.train.prove import ROWS_LOOKED_AT, check_task, first_rows, self_check
from llmkit.train.samples import SampleData, SampleFeed, open_samples
from llmkit.train.saving import Keep, Saver
from llmkit.train.sharded import ShardedWriter, is_sharded, load_checkpoint
from llmkit.train.state import TrainState
from llmkit.train.trial import try_sizes, wants_trial
from llmkit.train.watching import evaluate, sample, some_rows, speed_watcher


def pretrain(job: Job, reporter: Reporter) -> None:
    """Do this process's part of the job; the first process leaves model and report in the run folder.

    Raises:
        LlmkitError: As the parts raise; the newest checkpoint is then what the same command resumes from.
    """
    with ExitStack() as stack:
        # From here on: what comes while the parts are built is obeyed before the first step.
        stop = stack.enter_context(StopSignal(job.deadline))
        with naming_lost_workers():  # and then, as the stack unwinds, what is being saved is finished
            _pretrain(job, reporter, stop, stack)
            leave()


def _pretrain(job: Job, reporter: Reporter, stop: StopSignal, stack: ExitStack) -> None:
    section, plan = job.section(), job.checked_plan()
    accelerator = start_accelerator(plan)
    other_devices = check_processes(job, accelerator.device)
    if other_devices:
        reporter.warn(other_devices)
    data = open_samples(job) if job.rows else open_data(job)
    core = build_core_of(job, plan, data, reporter)
    taught = taught_before(job, plan, core, data, accelerator, reporter, stop)
    checkpoints = Checkpoints(Path(job.folder) / "checkpoints", job.identity)
    saved = from_first(accelerator, lambda: checkpoints.newest(reporter.warn))
    plan = with_attention(plan, core, accelerator, section, isolate=isolates(section, plan))
    recompute_activations(core, plan.recompute)
    machine = job.checked_recipe().machine
    if any_says(accelerator, wants_trial(plan, machine, resumes=saved is not None)):
        reporter.phase("prove", "the largest micro-batch that fits")
        plan = try_sizes(
            plan,
            core,
            accelerator,
            lambda asked: feed_of(data, core, asked, section, accelerator, taught).largest(),
            state_bytes=state_bytes_of(section),
        )
    plan = pull_levers(core, plan, machine, reporter.note)
    communicator = Communicator(plan, accelerator, job.seed)
    if plan.layout.is_sharded:
        distribute(core, plan, accelerator.device)
        module, optimizer = core, accelerator.prepare(build_optimizer(core, section, plan, reporter.note))
    else:
        settle(core, accelerator.device)
        module, optimizer = communicator.prepare(core, build_optimizer(core, section, plan, reporter.note))
    feed, order = feed_of(data, core, plan, section, accelerator, taught), make_order(job, data)
    state = load_checkpoint(checkpoints, saved, core.trained, optimizer) if saved else TrainState()
    reporter.phase("prove", "one step of the largest shape" + (", compiling" if plan.compile else ""))
    plan = with_length(plan, try_largest_batch(accelerator, module, feed, plan), accelerator)
    if job.self_check:
        readable(core)(_check_itself)(job, plan, module, core, data, order, feed, accelerator, reporter)
    schedule, patience = make_schedule(section, plan), Patience.of(section)
    callbacks = _callbacks(job, plan, state, accelerator, reporter, stack)
    checkpoints = replace(checkpoints, plan=plan.to_dict())
    exchange, own_writer = communicator.begin(
        core, optimizer, saved, state, schedule.num_steps, reporter.note
    )
    make_writer = ShardedWriter if is_sharded(core.model) else own_writer
    shards = make_writer(checkpoints) if make_writer is not None else None
    resumed = state.step if saved else None
    saver = _saver(
        section, plan, schedule, checkpoints, shards, accelerator, callbacks, resumed, reporter.warn
    )
    workers = machine.loader_workers
    steps = stack.enter_context(feed.steps(order, state.step, schedule.num_steps, workers=workers))
    micro_batches = stack.enter_context(frozen_garbage(feed.in_order(steps)))
    in_average = averaged(optimizer)  # if one is kept, it is what is measured, read and exported
    reading = readable(core)
    run = Training(
        accelerator=accelerator,
        module=module,
        core=core,
        optimizer=optimizer,
        micro_batches=micro_batches,
        schedule=schedule,
        seed=job.seed,
        numbers=Numbers(
            accelerator,
            policy=section.train.bad_numbers,
            max_skipped=section.train.max_skipped,
            describe=feed.describe,
            warn=reporter.warn,
            hint=overflow_hint(plan),
        ),
        saver=stack.enter_context(saver),
        evaluate=in_average(
            reading(lambda rows, between: evaluate(core, feed, data, accelerator, rows, between, section))
        ),
        sample=in_average(reading(lambda step: sample(core, data, job, step))),
        stop=stop.asked,
        watch_speed=speed_watcher(plan, accelerator.device),
        callbacks=callbacks,
        patience=patience,
        choose=lambda last: _choose(
            last, patience, saver, checkpoints, core, optimizer, accelerator, reporter
        ),
        readers=plan.layout.readers,
        together=plan.layout.is_sharded,
        exchange=exchange,
        tidy=Heap(held_between(plan)).tidy if plan.device == "cpu" else lambda: None,
    )
    start = f"from {saved.name}, " if saved else ""
    each = f"{plan.rows_per_step:,} rows" if job.rows else f"{plan.tokens_per_step:,} tokens"
    reporter.phase(job.verb, f"{start}{schedule.num_steps:,} steps of {each}")
    state, figures = train(run, state)
    if shards is not None:
        shards.close()
    if accelerator.is_main_process:
        reporter.phase("export", f"{job.folder}/model")
    whole = in_average(gathered)(core, job, plan, data, accelerator) if plan.layout.is_sharded else core
    if accelerator.is_main_process:
        in_average(finish)(job, plan, whole, data.tokenizer, state, figures, lambda: some_rows(feed))


def _check_itself(
    job: Job,
    plan: Plan,
    module: torch.nn.Module,
    core: LossModule,
    data: Data | SampleData,
    order: RowOrder,
    feed: Feed | SampleFeed,
    accelerator: Accelerator,
    reporter: Reporter,
) -> None:
    """Prove model, data and saving to themselves, and say what was found."""
    # A sharded model is not whole on any one process, so it is not tried on disk here.
    folder = Path(job.folder) if accelerator.is_main_process and not plan.layout.is_sharded else None
    goal = goal_of(job.section().objective)
    if isinstance(data, SampleData):
        assert isinstance(feed, SampleFeed)
        micro = [examples for _, examples in feed.batches(order).of_step(0)]
        mine = sum(int(core.objective.collate(examples)["num_targets"]) for examples in micro)
        # The longest rows come first, and of these all that is learned may have been cut off.
        counted = torch.tensor(mine * feed.speaks, device=accelerator.device)
        learned = int(accelerator.reduce(counted, "sum"))
        lines = check_task(core, micro[0], learned=learned, isolate=plan.packed, folder=folder)
    else:
        lines = self_check(
            module,
            core,
            first_rows(data.train, order, min(ROWS_LOOKED_AT, 2 * plan.rows_per_step), other=goal.other),
            data.tokenizer,
            goal=goal,
            isolate=isolates(job.section(), plan),
            compiled_rows=plan.micro_batch_size if plan.compile and not plan.layout.is_sharded else None,
            folder=folder,
        )
    for line in lines:
        reporter.note(f"checked: {line}")


def _saver(
    section: Section,
    plan: Plan,
    schedule: Schedule,
    checkpoints: Checkpoints,
    shards: ShardedWriter | OwnWriter | None,
    accelerator: Accelerator,
    callbacks: Sequence[Callback],
    resumed: int | None,
    warn: Callable[[str], None],
) -> Saver:
    """Writes whole checkpoints on the first process, or each process's share of sharded ones."""
    return Saver(
        checkpoints,
        Keep(section.checkpoint.keep, schedule.keep_every, best_metric(section)),
        background=plan.background_save,
        writer=shards,
        writes=shards is not None or accelerator.is_main_process,
        tidies=accelerator.is_main_process,
        resumed=resumed,
        expected_bytes=plan.checkpoint_bytes + apart_bytes(plan),
        before_publishing=lambda step: _on_save(callbacks, step),
        warn=warn,
    )


def _choose(
    last: TrainState,
    patience: Patience | None,
    saver: Saver,
    checkpoints: Checkpoints,
    core: LossModule,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    reporter: Reporter,
) -> TrainState:
    """With `stop_early`, the best checkpoint, loaded; else the last state, which the model has."""
    best = from_first(accelerator, lambda: saver.best_step) if patience is not None else None
    if patience is not None and patience.is_out(last):
        reporter.note(
            f"stopped at step {last.step}: {last.waited} evaluations without a better {patience.metric}"
        )
    if best is None or best == last.step:
        return last
    reporter.note(f"step {best} was the best; its model is what is exported")
    return load_checkpoint(checkpoints, checkpoints.path(best), core.trained, optimizer)


def _on_save(callbacks: Sequence[Callback], step: int) -> None:
    for callback in callbacks:
        callback.on_save(step)


def _callbacks(
    job: Job,
    plan: Plan,
    state: TrainState,
    accelerator: Accelerator,
    reporter: Reporter,
    stack: ExitStack,
) -> Sequence[Callback]:
    """Log and console, on the first process; the plan, now complete, goes to the run folder first."""
    if not accelerator.is_main_process:
        return ()
    folder = Path(job.folder)
    write_json(folder / "plan.json", plan.to_dict())
    log = RunLog(folder, state.step)
    resolved = folder / "resolved.yaml"
    write_file(resolved, resolved_yaml(load_recipe(resolved), plan.choices))
    spikes = SpikeWatch(reporter.warn, before=read_metrics(folder))  # what the log kept of an earlier session
    console = ConsoleCallback(reporter, job.verb, _told(job))
    watching: list[Callback] = [LogCallback(stack.enter_context(log)), console, spikes]
    if job.kill_at is not None and os.environ.get(RESTART, "0") == "0":  # once is enough
        watching.append(KillAt(job.kill_at))
    return watching


def _told(job: Job) -> tuple[str, ...]:
    """The metrics that the console shows of an evaluation, beside the loss."""
    known = goal_of(job.section().objective).metrics
    return known[1:4] if job.rows else known[1:2]
