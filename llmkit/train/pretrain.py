"""One process's part in a pre-training run: build the parts, try the largest batch, train, finish."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmkit.durable import write_file, write_json
from llmkit.errors import RunError
from llmkit.evaluate.generate import generate
from llmkit.evaluate.split import sum_over
from llmkit.launch.signals import StopSignal
from llmkit.models.attention import use_attention
from llmkit.models.peak import measure_peak_flops
from llmkit.objectives.base import LossModule
from llmkit.optim import make_optimizer
from llmkit.plan import Plan
from llmkit.recipe import load_recipe, resolved_yaml
from llmkit.report.console import Reporter
from llmkit.report.run_log import RunLog
from llmkit.train.build import (
    Data,
    Feed,
    build_core,
    make_order,
    make_schedule,
    open_data,
    pick_attention,
)
from llmkit.train.callbacks import Callback, ConsoleCallback, LogCallback
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.devices import leave, peak_memory_bytes, start_accelerator
from llmkit.train.finish import finish
from llmkit.train.job import Job
from llmkit.train.loop import Training, train
from llmkit.train.prove import prove_head, prove_isolation
from llmkit.train.state import TrainState, mix_seed

T = TypeVar("T")
_SAMPLING = 1 << 40  # keeps the seeds of samples apart from those of micro-batches
_MEASURED_STEPS = 3


def pretrain(job: Job, reporter: Reporter) -> None:
    """Do this process's part of the job; the first process leaves model and report in the run folder.

    Raises:
        LlmkitError: As the parts raise; the newest checkpoint is then what the same command resumes from.
    """
    section, plan = job.section(), job.checked_plan()
    accelerator = start_accelerator(plan)
    data = open_data(job)
    core = build_core(job, plan, data.tokenizer)
    plan = _with_attention(plan, core, accelerator, isolate=section.isolate_documents)
    if plan.compile:
        core.compile(dynamic=False)
    module, optimizer = accelerator.prepare(core, make_optimizer(core.model, section.train.optim))
    feed = Feed(data, core.objective, plan, section, accelerator)

    checkpoints = Checkpoints(Path(job.folder) / "checkpoints", section.checkpoint.keep, job.identity)
    saved = _from_first(accelerator, lambda: checkpoints.newest(reporter.warn))
    state = checkpoints.load(saved, core.model, optimizer) if saved else TrainState()
    reporter.phase("prove", "one step of the largest shape" + (", compiling" if plan.compile else ""))
    prove_head(core.model)
    if section.isolate_documents:
        prove_isolation(core.model)
    plan = _with_length(plan, _try_largest_batch(accelerator, module, feed, plan), accelerator)
    schedule = make_schedule(section, plan)

    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        steps = stack.enter_context(feed.steps(make_order(job, data), state.step, schedule.num_steps))
        run = Training(
            accelerator=accelerator,
            module=module,
            core=core,
            optimizer=optimizer,
            micro_batches=feed.in_order(steps),
            schedule=schedule,
            seed=job.seed,
            checkpoints=checkpoints,
            evaluate=lambda rows: evaluate(core, feed, data, accelerator, rows),
            sample=lambda step: _sample(core, data, job, step),
            stop_signal=lambda: stop.requested,
            watch_speed=_speed_watcher(plan, accelerator.device),
            callbacks=_callbacks(job, plan, state, accelerator, reporter, stack),
        )
        start = f"from {saved.name}, " if saved else ""
        reporter.phase("pretrain", f"{start}{schedule.num_steps:,} steps of {plan.tokens_per_step:,} tokens")
        state, figures = train(run, state)
    if accelerator.is_main_process:
        reporter.phase("export", f"{job.folder}/model")
        finish(job, plan, core.model, data.tokenizer, state, figures)
    leave()


def evaluate(
    core: LossModule, feed: Feed, data: Data, accelerator: Accelerator, rows: int | None
) -> dict[str, float]:
    """Figures on `rows` held-out rows (None: all), named `eval/...`; every process calls it."""
    sums = sum_over(core, feed.held_out(rows), lambda sums: accelerator.reduce(sums, "sum"))
    if not sums["num_targets"]:
        return {}  # `held_out: 0`
    sums["num_bytes"] = sums["num_targets"] * data.bytes_per_token
    return {f"eval/{name}": value for name, value in core.objective.summarise(sums).items()}


def _with_attention(plan: Plan, core: LossModule, accelerator: Accelerator, *, isolate: bool) -> Plan:
    """Set the model's attention kernel; where the plan leaves it open, the first process probes for all."""
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
    return plan.with_steps(num_steps, seconds_per_step=seconds)


def _try_largest_batch(accelerator: Accelerator, module: torch.nn.Module, feed: Feed, plan: Plan) -> float:
    """Forward and backward on the largest shape, so that out-of-memory and the compiler come first.

    Weights do not change. Returns the seconds of a step, measured only where the plan needs to know.
    """
    batch = feed.largest()
    seconds = 0.0
    for _ in range(1 + (_MEASURED_STEPS if plan.deferred or plan.num_steps is None else 0)):
        start = time.perf_counter()
        with _naming_out_of_memory(plan):
            loss = module(batch).total
            accelerator.backward(loss / batch["num_targets"])
            float(loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
        module.zero_grad()
    return seconds * plan.gradient_accumulation_steps


@contextmanager
def _naming_out_of_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError is one; the processor's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
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
    # The last step's measurement comes after its checkpoint: a run that was stopped in between repeats it.
    log = RunLog(folder, state.step, measure_again=state.step == plan.num_steps)
    resolved = folder / "resolved.yaml"
    write_file(resolved, resolved_yaml(load_recipe(resolved), plan.choices))
    return LogCallback(stack.enter_context(log)), ConsoleCallback(reporter)


def _sample(core: LossModule, data: Data, job: Job, step: int) -> list[tuple[str, str]]:
    section = job.section()
    written = generate(
        core.model,
        data.tokenizer,
        section.prompts,
        section.sampling,
        seed=mix_seed(job.seed, _SAMPLING, step),
    )
    return [(one.prompt, one.text) for one in written]


def _speed_watcher(plan: Plan, device: torch.device) -> Callable[[float], Mapping[str, float]]:
    """Tokens per second -> model FLOPs utilisation of the measured peak, and memory."""
    peak = measure_peak_flops(device, torch.bfloat16 if plan.precision == "bf16" else torch.float32)

    def watch(tokens_per_s: float) -> Mapping[str, float]:
        mfu = tokens_per_s * plan.flops_per_token / (peak * plan.world_size)
        return {"mfu": round(mfu, 4), "memory_bytes": peak_memory_bytes(device)}

    return watch


def _from_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Let the first process decide, and all others take its decision."""
    decision = [decide() if accelerator.is_main_process else None]
    broadcast_object_list(decision)
    result: T = decision[0]  # type: ignore[assignment]
    return result
