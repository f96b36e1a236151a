"""One process's part in a training run: build the parts, try the largest batch, train, finish."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from llmkit.data.order import RowOrder
from llmkit.data.taught import TaughtStore
from llmkit.durable import write_file, write_json
from llmkit.errors import RunError
from llmkit.evaluate.complete import complete
from llmkit.evaluate.judge import judge
from llmkit.evaluate.predict import predict
from llmkit.evaluate.split import sum_over
from llmkit.launch.crew import RESTART
from llmkit.launch.signals import StopSignal
from llmkit.models.attention import tap_attention, use_attention
from llmkit.models.build import left_out
from llmkit.models.host import on_host_or_here
from llmkit.models.peak import measure_peak_flops
from llmkit.models.recompute import recompute_activations
from llmkit.models.rounded import roundings
from llmkit.objectives.base import Batch, Judges, LossModule
from llmkit.objectives.taught import Taught
from llmkit.optim import averaged
from llmkit.plan import Plan
from llmkit.plan.choices import state_bytes_of
from llmkit.plan.communication import on_meetings, overflow_hint
from llmkit.recipe import load_recipe, resolved_yaml
from llmkit.recipe.schema import Finetune, Pretrain, Section
from llmkit.registry import goal_of
from llmkit.report.console import Reporter
from llmkit.report.run_log import RunLog, read_metrics
from llmkit.report.spikes import SpikeWatch
from llmkit.train.accelerators import peak_memory_bytes, settle
from llmkit.train.alike import check_processes
from llmkit.train.build import (
    Data,
    Feed,
    build_core,
    build_optimizer,
    build_task_core,
    find_teacher,
    make_order,
    make_schedule,
    open_data,
    pick_attention,
    teacher_store,
)
from llmkit.train.callbacks import Callback, ConsoleCallback, KillAt, LogCallback
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.communication import Communicator
from llmkit.train.devices import leave, naming_lost_workers, start_accelerator
from llmkit.train.early import Patience, best_metric
from llmkit.train.finish import finish
from llmkit.train.heap import Heap
from llmkit.train.job import Job
from llmkit.train.kernels import frozen_garbage, pull_levers
from llmkit.train.loop import Schedule, Training, counts_of, train
from llmkit.train.numbers import Numbers
from llmkit.train.own import OwnWriter
from llmkit.train.parallel import adding_up, distribute, gather, readable
from llmkit.train.prove import ROWS_LOOKED_AT, check_task, first_rows, self_check
from llmkit.train.samples import SampleData, SampleFeed, open_samples
from llmkit.train.saving import Keep, Saver
from llmkit.train.sharded import ShardedWriter, is_sharded, load_checkpoint
from llmkit.train.state import TrainState, mix_seed
from llmkit.train.teaching import Asking, teach
from llmkit.train.trial import is_out_of_memory, try_sizes, wants_trial
from llmkit.train.vectors import begin_as_recipe_says

T = TypeVar("T")
_SAMPLING = 1 << 40  # keeps the seeds of samples apart from those of micro-batches
_MEASURED_STEPS = 3
_ROWS_COMPARED = 8


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
    core = _build_core(job, plan, data, reporter)
    taught = _teach(job, plan, core, data, accelerator, reporter, stop)
    checkpoints = Checkpoints(Path(job.folder) / "checkpoints", job.identity)
    saved = _from_first(accelerator, lambda: checkpoints.newest(reporter.warn))
    plan = _with_attention(plan, core, accelerator, section, isolate=_isolates(section, plan))
    recompute_activations(core, plan.recompute)
    machine = job.checked_recipe().machine
    if wants_trial(plan, machine, resumes=saved is not None):
        reporter.phase("prove", "the largest micro-batch that fits")
        plan = try_sizes(
            plan,
            core,
            accelerator,
            lambda asked: _feed(data, core, asked, section, accelerator, taught).largest(),
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
    feed, order = _feed(data, core, plan, section, accelerator, taught), make_order(job, data)
    state = load_checkpoint(checkpoints, saved, core.trained, optimizer) if saved else TrainState()
    reporter.phase("prove", "one step of the largest shape" + (", compiling" if plan.compile else ""))
    plan = _with_length(plan, _try_largest_batch(accelerator, module, feed, plan), accelerator)
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
        sample=in_average(reading(lambda step: _sample(core, data, job, step))),
        stop=stop.asked,
        watch_speed=_speed_watcher(plan, accelerator.device),
        callbacks=callbacks,
        patience=patience,
        choose=lambda last: _choose(
            last, patience, saver, checkpoints, core, optimizer, accelerator, reporter
        ),
        readers=plan.layout.readers,
        together=plan.layout.is_sharded,
        exchange=exchange,
        tidy=Heap(plan.memory.total).tidy if plan.device == "cpu" else lambda: None,
    )
    start = f"from {saved.name}, " if saved else ""
    each = f"{plan.rows_per_step:,} rows" if job.rows else f"{plan.tokens_per_step:,} tokens"
    reporter.phase(job.verb, f"{start}{schedule.num_steps:,} steps of {each}")
    state, figures = train(run, state)
    if shards is not None:
        shards.close()
    if accelerator.is_main_process:
        reporter.phase("export", f"{job.folder}/model")
    whole = in_average(_gathered)(core, job, plan, data, accelerator) if plan.layout.is_sharded else core
    if accelerator.is_main_process:
        in_average(finish)(job, plan, whole, data.tokenizer, state, figures, lambda: _some_rows(feed))


def _build_core(job: Job, plan: Plan, data: Data | SampleData, reporter: Reporter) -> LossModule:
    """Model and objective; what is new or left out of a model that was loaded is told."""
    section = job.section()
    if isinstance(data, SampleData):
        core, new = build_task_core(job, plan, data)
        if new:
            reporter.note(f"{section.model.name}: a new head for {section.objective}: {', '.join(new)}")
        _tell_rounding(core, reporter)
        return core
    core = build_core(job, plan, data.tokenizer)
    spare = left_out(core.model)
    if spare:
        reporter.note(
            f"{section.model.name}: heads that {section.objective} does without are left out: {', '.join(spare)}"
        )
    for line in begin_as_recipe_says(core.model, section.model.embeddings, data.tokenizer, job.shards):
        reporter.note(line)
    _tell_rounding(core, reporter)
    return core


def _gathered(
    core: LossModule, job: Job, plan: Plan, data: Data | SampleData, accelerator: Accelerator
) -> LossModule:
    """On the first process a sharded model, whole and on the host; every process takes part in gathering it."""
    whole: LossModule | None = None
    if accelerator.is_main_process:
        whole = (
            build_task_core(job, plan, data)[0]
            if isinstance(data, SampleData)
            else build_core(job, plan, data.tokenizer)
        )
    gather(core, whole)
    return whole or core


def _tell_rounding(core: LossModule, reporter: Reporter) -> None:
    """Say that what is measured while training is not what is exported."""
    found = [one.grid for one in roundings(core.model).values() if one.grid is not None]
    if found:
        reporter.note(
            f"{len(found):,} linear layers compute with weights rounded to {found[0].bits} bits, in evaluations "
            "too; the exported weights are not rounded"
        )


def _feed(
    data: Data | SampleData,
    core: LossModule,
    plan: Plan,
    section: Section,
    accelerator: Accelerator,
    taught: TaughtStore | None = None,
) -> Feed | SampleFeed:
    if isinstance(data, SampleData):
        assert isinstance(section, Finetune)
        return SampleFeed(data, core.objective, plan, section, accelerator, taught)
    assert isinstance(section, Pretrain)
    return Feed(data, core.objective, plan, section, accelerator, taught)


def _teach(
    job: Job,
    plan: Plan,
    core: LossModule,
    data: Data | SampleData,
    accelerator: Accelerator,
    reporter: Reporter,
    stop: StopSignal,
) -> TaughtStore | None:
    """What the teacher says of all rows of the run, on disk; None where it is asked at every step, or there is none."""
    store = teacher_store(job, plan)
    if store is None:
        return None
    assert isinstance(core.objective, Taught)
    section, material = job.section(), data.material if isinstance(data, SampleData) else None

    def load() -> PreTrainedModel:
        teacher = find_teacher(job, data.tokenizer, material)
        use_attention(teacher, "sdpa", isolate=_isolates(section, plan))
        return teacher

    batches = _feed(data, core, plan, section, accelerator).batches(make_order(job, data))
    asking = Asking(store, core.objective, batches, plan.precision != "fp32", stop.asked)
    teach(asking, load, accelerator, reporter, num_bytes=plan.teacher_cache["bytes"])
    return store


def _some_rows(feed: Feed | SampleFeed) -> Batch:
    """A few rows of this process, held out or else the longest to learn from, to compare models on."""
    batch = next(feed.held_out(_ROWS_COMPARED), None)
    return feed.largest() if batch is None else batch


def _isolates(section: Section, plan: Plan) -> bool:
    """Whether what stands in one line is kept apart: documents where the recipe says so, packed rows always."""
    return section.isolate_documents if isinstance(section, Pretrain) else plan.packed


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
            isolate=_isolates(job.section(), plan),
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
        expected_bytes=plan.checkpoint_bytes,
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
    best = _from_first(accelerator, lambda: saver.best_step) if patience is not None else None
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


def evaluate(
    core: LossModule,
    feed: Feed | SampleFeed,
    data: Data | SampleData,
    accelerator: Accelerator,
    rows: int | None,
    between: Callable[[], object],
    section: Section,
) -> dict[str, float]:
    """Figures on `rows` held-out rows (None: all), named `eval/...`; every process calls it."""
    found: dict[int, Any] = {}
    reduce = adding_up(lambda sums: accelerator.reduce(sums, "sum"), feed.speaks)
    spare = feed.largest() if isinstance(core, FSDPModule) else None
    sums = sum_over(core, feed.held_out(rows), reduce, between, found, spare)
    if not sums["num_targets"]:
        return {}  # `held_out: 0`
    if isinstance(data, Data) and "bits_per_byte" in goal_of(section.objective).metrics:
        sums["num_bytes"] = sums["num_targets"] * data.bytes_per_token
    figures = core.objective.summarise(sums)
    if isinstance(data, SampleData) and isinstance(core.objective, Judges):
        figures |= judge(core.objective, data.held_out, _from_all(accelerator, found))
    return {f"eval/{name}": value for name, value in figures.items()}


def _from_all(accelerator: Accelerator, found: dict[int, Any]) -> dict[int, Any]:
    """What was found of rows by any process."""
    if accelerator.num_processes == 1:
        return found
    return dict(gather_object(list(found.items())))


def _with_attention(
    plan: Plan, core: LossModule, accelerator: Accelerator, section: Section, *, isolate: bool
) -> Plan:
    """Set the model's attention kernel; where the plan leaves it open, the first process probes for all."""
    if section.distil is not None and section.distil.attention:
        for model in (core.model, core.frozen["teacher"]):
            tap_attention(model, isolate=isolate)
        # A kernel in plain operations that leaves its weights; in the recipe's words it is `eager`.
        choice = ("eager", "a teacher's attention is compared with the model's")
        return replace(plan, attention=choice[0], choices={**plan.choices, "machine.attention": choice})
    for model in core.frozen.values():
        use_attention(model, "sdpa", isolate=isolate)
    if plan.attention == "auto":
        name, why = _from_first(accelerator, lambda: pick_attention(plan, core, isolate=isolate))
        plan = replace(plan, attention=name, choices={**plan.choices, "machine.attention": (name, why)})
    use_attention(core.model, plan.attention, isolate=isolate)
    return plan


def _with_length(plan: Plan, seconds_per_step: float, accelerator: Accelerator) -> Plan:
    """Turn times in the recipe (`length: 1h30m`, `every: 10m`) into steps, once, so that a resume agrees."""
    if plan.num_steps is not None and not plan.deferred:
        return plan
    seconds = _from_first(accelerator, lambda: seconds_per_step)
    num_steps = plan.num_steps or max(1, int((plan.length_seconds or 0) / seconds))
    return on_meetings(plan.with_steps(num_steps, seconds_per_step=seconds))


def _try_largest_batch(
    accelerator: Accelerator, module: torch.nn.Module, feed: Feed | SampleFeed, plan: Plan
) -> float:
    """Forward and backward on the largest shape, so that out-of-memory and the compiler come first.

    Weights do not change. Returns the seconds of a step, measured only where the plan needs to know.
    """
    batch = feed.largest()
    seconds = 0.0
    for _ in range(1 + (_MEASURED_STEPS if plan.deferred or plan.num_steps is None else 0)):
        start = time.perf_counter()
        with _naming_out_of_memory(plan):
            loss = module(batch).mean(counts_of([(0, batch)]))
            accelerator.backward(loss)
            float(loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
        module.zero_grad()
    return seconds * plan.gradient_accumulation_steps


@contextmanager
def _naming_out_of_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        rows = plan.micro_batch_size
        fewer = f"machine.micro_batch={max(1, rows // 2)}, or " if rows > 1 else ""
        raise RunError(
            f"out of memory on {plan.device} with {rows} rows of {plan.context} tokens at a time "
            f"(planned: {plan.memory.total / 1e9:.1f} GB)",
            hint=f"{fewer}a shorter `context` or a smaller model; nothing was trained yet",
        ) from error


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


def _sample(core: LossModule, data: Data | SampleData, job: Job, step: int) -> list[tuple[str, str]]:
    section = job.section()
    seed = mix_seed(job.seed, _SAMPLING, step)
    kind = goal_of(section.objective).model
    answers = (
        isinstance(section, Finetune)
        and section.task == "seq2seq"
        and not core.model.config.is_encoder_decoder
    )
    if isinstance(data, SampleData) and (answers or kind not in ("causal", "seq2seq")):
        rows = [{"text": prompt, "tokens": prompt.split()} for prompt in section.prompts]
        said = predict(core, rows)
        return [
            (prompt, str(one["text"]) if answers else json.dumps(one, ensure_ascii=False))
            for prompt, one in zip(section.prompts, said, strict=False)
        ]
    chat = goal_of(section.objective).chats and bool(data.tokenizer.chat_template)
    model = on_host_or_here(core.model)  # a text grows token by token
    return complete(model, kind, data.tokenizer, section.prompts, section.sampling, seed=seed, chat=chat)


def _speed_watcher(plan: Plan, device: torch.device) -> Callable[[float], Mapping[str, float]]:
    """Tokens per second -> model FLOPs utilisation of the measured peak, and memory."""
    peak = measure_peak_flops(device, torch.float32 if plan.precision == "fp32" else torch.bfloat16)

    def watch(tokens_per_s: float) -> Mapping[str, float]:
        mfu = tokens_per_s * plan.flops_per_token / (peak * plan.world_size)
        memory = peak_memory_bytes(device)
        return {"mfu": round(mfu, 4), **({} if memory is None else {"memory_bytes": memory})}

    return watch


def _from_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Let the first process decide, and all others take its decision."""
    decision = [decide() if accelerator.is_main_process else None]
    broadcast_object_list(decision)
    result: T = decision[0]  # type: ignore[assignment]
    return result
