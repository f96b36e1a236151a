"""`machine.micro_batch: auto` on a GPU: the largest micro-batch that fits, found by trying before the first step.

An estimate errs by some percent, and a GPU that is not full is slow. So sizes are tried with the real thing: forward
and backward of a batch of the largest shape, with gradients there already, as from the second micro-batch on, and the
room that the optimizer will take held by a tensor. Weights, gradients and torch's generators are afterwards as before.
Each process tries by itself, for one that runs out of memory must not leave others waiting in the middle of a step;
what fits is what fits on all of them.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from llmkit.hardware import usable_memory
from llmkit.objectives.base import Batch, LossModule
from llmkit.plan import Plan
from llmkit.plan.batch import divisors
from llmkit.plan.memory import at_positions
from llmkit.recipe.machine import Machine

SLACK = 0.04
"""Share of the memory that stays free: fragments grow in the course of a run."""
_DDP_BYTES = 4
"""Of a weight, in the buckets that DDP sends gradients from."""


@dataclass(frozen=True)
class Try:
    """What came of a size.

    Attributes:
        fits: Whether it did on every process.
        peak_bytes: The most memory that this process used meanwhile; 0 where it is not known.
    """

    fits: bool
    peak_bytes: int = 0


def sizes_of(plan: Plan) -> list[int]:
    """The numbers of rows at a time that there are to choose from, ascending.

    Args:
        plan: Of rows of one length: what divides a process's rows. Of rows of many lengths: powers of two, and what is
            planned, in rows of full length, of which a process has as many at most.
    """
    mine, planned = max(1, plan.rows_per_step // plan.layout.data_size), rows_of(plan)
    if plan.micro_batch_tokens:
        sizes = sorted({planned, *(1 << power for power in range(mine.bit_length()))})
    else:
        sizes = divisors(mine)
    # A processor gains nothing from more rows than are planned.
    return [size for size in sizes if plan.device != "cpu" or size <= planned]


def largest_that_fits(
    sizes: Sequence[int], planned: int, attempt: Callable[[int], Try]
) -> tuple[int | None, dict[int, Try]]:
    """Search for the largest size that fits; one that is larger than another needs more.

    The planned size comes first, then the middle of what is left above or below it.

    Args:
        sizes: Ascending.
        planned: One of them.
        attempt: Tries a size.

    Returns:
        The size, None where not even the smallest fits; and what was tried.
    """
    low, high, tried = -1, len(sizes), dict[int, Try]()
    place = sizes.index(planned)
    while high - low > 1:
        tried[sizes[place]] = attempt(sizes[place])
        if tried[sizes[place]].fits:
            low = place
        else:
            high = place
        place = (low + high) // 2
    return (sizes[low] if low >= 0 else None), tried


def with_rows(plan: Plan, rows: int) -> Plan:
    """The plan with so many rows (of full length) at a time, and the memory that they take by its count."""
    plan = replace(
        plan,
        memory=at_positions(
            plan.memory,
            rows_of(plan) * plan.context,
            rows * plan.context,
            vocab_size=plan.vocab_size,
            precision=plan.precision,
            device=plan.device,
        ),
    )
    if plan.micro_batch_tokens:
        tokens = rows * plan.context
        mean = max(1, plan.tokens_per_step // plan.rows_per_step)
        return replace(
            plan,
            micro_batch_tokens=tokens,
            micro_batch_size=max(1, min(plan.rows_per_step, tokens // mean)),
            gradient_accumulation_steps=max(1, -(-plan.tokens_per_step // (tokens * plan.layout.data_size))),
        )
    accumulated = plan.rows_per_step // (rows * plan.layout.data_size)
    return replace(plan, micro_batch_size=rows, gradient_accumulation_steps=accumulated)


def try_sizes(
    plan: Plan,
    core: LossModule,
    accelerator: Accelerator,
    largest: Callable[[Plan], Batch],
    *,
    state_bytes: float,
    limit_bytes: int | None = None,
) -> Plan:
    """Find the micro-batch by trying; every process calls it, before the model is compiled or wrapped.

    A model that is shared by processes is not tried: they meet in every layer.

    Args:
        plan: Its micro-batch is an estimate.
        core: Model and objective, in training mode.
        accelerator: To agree with the other processes; where the model goes.
        largest: A plan -> a batch of the largest shape that it leads to.
        state_bytes: What the optimizer remembers of a weight.
        limit_bytes: Of the device's memory, what may be used; by default all of it but a little.

    Returns:
        The plan with the largest size that fits, and how it was found.
    """
    if plan.layout.is_sharded:
        why = (
            "the plan's estimate: processes that share a model meet in every layer, so none can try by itself"
        )
        return _told(plan, why)
    device = accelerator.device
    core.to(device)
    limit = int(_memory_of(device) * (1 - SLACK)) if limit_bytes is None else limit_bytes
    sizes = sizes_of(plan)
    planned = rows_of(plan)

    def attempt(rows: int) -> Try:
        mine = _attempt(
            core, device, lambda: largest(with_rows(plan, rows)), _held(core, plan, state_bytes), limit
        )
        fits = accelerator.reduce(torch.tensor([int(not mine.fits)]), "sum")
        return replace(mine, fits=int(fits) == 0)

    with _as_before(core, device):
        found, tried = largest_that_fits(sizes, planned, attempt)
    rows = found or sizes[0]
    return _told(with_rows(plan, rows), _describe(rows, found, tried, limit))


def rows_of(plan: Plan) -> int:
    """The rows (of full length) at a time of a plan."""
    return (
        max(1, plan.micro_batch_tokens // plan.context) if plan.micro_batch_tokens else plan.micro_batch_size
    )


def _told(plan: Plan, why: str) -> Plan:
    choice = (rows_of(plan), why)
    return replace(plan, choices={**plan.choices, "machine.micro_batch": choice})


def _describe(rows: int, found: int | None, tried: dict[int, Try], limit: int) -> str:
    failed = sorted(size for size, one in tried.items() if not one.fits)
    if found is None:
        return f"tried: not even {rows} row(s) fit into {limit / 1e9:.1f} GB before the model is compiled"
    peak = tried[rows].peak_bytes
    needs = f" (at most {peak / 1e9:.2f} of {limit / 1e9:.2f} GB)" if peak and limit else ""
    more = f", {failed[0]} do not" if failed else ", and there are no more" if rows == max(tried) else ""
    return f"tried: {rows} rows fit{needs}{more}"


def _held(core: LossModule, plan: Plan, state_bytes: float) -> int:
    """Bytes that are there from the first update on, besides weights and gradients."""
    learning = sum(p.numel() for p in core.trained.parameters() if p.requires_grad)
    return int(learning * (state_bytes + (_DDP_BYTES if plan.world_size > 1 else 0)))


def _attempt(
    core: LossModule, device: torch.device, make: Callable[[], Batch], held_bytes: int, limit: int
) -> Try:
    """Two micro-batches of a step, the second with the gradient of the first there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    held: torch.Tensor | None = None
    fits = True
    try:
        held = torch.empty(held_bytes, dtype=torch.uint8, device=device)
        batch = make()
        counts = {name: max(1, int(count)) for name, count in batch.items() if name.startswith("num_")}
        for _ in range(2):
            core(batch).mean(counts).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    del held
    core.zero_grad()
    gc.collect()  # the traceback of an error holds all that was computed
    peak = int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else 0
    return Try(fits and (not limit or peak <= limit), peak)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory is what was missing; the processor's allocator has no class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _memory_of(device: torch.device) -> int:
    """Bytes that this process can have of a GPU now, what it has already counted in; 0: not known."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + int(torch.cuda.memory_reserved(device))


@contextmanager
def _as_before(core: LossModule, device: torch.device) -> Iterator[None]:
    """Generators and buffers are put back, and the device's memory is given back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in core.buffers()]
    training, on_gpu = core.training, device.type == "cuda"
    core.train()
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield
    finally:
        core.train(training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def wants_trial(plan: Plan, machine: Machine, *, resumes: bool) -> bool:
    """Whether sizes are to be tried: on a GPU always, on a processor where the plan says that its size does not fit.

    Args:
        plan: The run's.
        machine: The recipe's section.
        resumes: There is a checkpoint: what was found when the run began is in its plan.
    """
    if resumes or machine.micro_batch != "auto":
        return False
    if plan.device == "cpu":
        return plan.memory.total > usable_memory() // max(1, plan.world_size // plan.nodes)
    return plan.device == "cuda"
