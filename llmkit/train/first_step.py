"""What is settled before the first step: the attention kernel, whether a step fits, and how many there are."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator

from llmkit.errors import RunError
from llmkit.models.attention import tap_attention, use_attention
from llmkit.objectives.base import LossModule
from llmkit.plan import Plan
from llmkit.plan.communication import on_meetings
from llmkit.recipe.schema import Section
from llmkit.train.build import Feed, pick_attention
from llmkit.train.devices import from_first
from llmkit.train.loop import counts_of
from llmkit.train.samples import SampleFeed
from llmkit.train.trial import is_out_of_memory

_MEASURED_STEPS = 3


def with_attention(
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
        name, why = from_first(accelerator, lambda: pick_attention(plan, core, isolate=isolate))
        plan = replace(plan, attention=name, choices={**plan.choices, "machine.attention": (name, why)})
    use_attention(core.model, plan.attention, isolate=isolate)
    return plan


def with_length(plan: Plan, seconds_per_step: float, accelerator: Accelerator) -> Plan:
    """Turn times in the recipe (`length: 1h30m`, `every: 10m`) into steps, once, so that a resume agrees."""
    if plan.num_steps is not None and not plan.deferred:
        return plan
    seconds = from_first(accelerator, lambda: seconds_per_step)
    num_steps = plan.num_steps or max(1, int((plan.length_seconds or 0) / seconds))
    return on_meetings(plan.with_steps(num_steps, seconds_per_step=seconds))


def try_largest_batch(
    accelerator: Accelerator, module: torch.nn.Module, feed: Feed | SampleFeed, plan: Plan
) -> float:
    """Forward and backward on the largest shape, so that out-of-memory and the compiler come first.

    Weights do not change. Returns the seconds of a step, measured only where the plan needs to know.
    """
    batch = feed.largest()
    seconds = 0.0
    for _ in range(1 + (_MEASURED_STEPS if plan.deferred or plan.num_steps is None else 0)):
        start = time.perf_counter()
        with naming_out_of_memory(plan):
            loss = module(batch).mean(counts_of([(0, batch)]))
            accelerator.backward(loss)
            float(loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
        module.zero_grad()
    return seconds * plan.gradient_accumulation_steps


@contextmanager
def naming_out_of_memory(plan: Plan) -> Iterator[None]:
    """While this lasts, a device that has no room is an error that says what was planned, and what would help."""
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
