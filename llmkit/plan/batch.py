"""The global batch, and how devices share it."""

from dataclasses import dataclass

from llmkit.errors import UsageError
from llmkit.recipe.units import Amount

ROUND_TO = 64
"""Large batches are a multiple of this many rows, so that any usual number of devices can share them."""


class PlanError(UsageError):
    """The recipe cannot be carried out like this; the message says what would fit."""


@dataclass(frozen=True)
class Share:
    """One step's rows: `micro_batch_size * gradient_accumulation_steps * world_size`."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int


def rows_of_batch(batch: Amount, context: int) -> tuple[int, str]:
    """Rows of one optimizer step, and a note when that is not the recipe's number of tokens exactly.

    Samples are rows. Tokens are rounded once, whatever the machine: from 64 rows to the nearest multiple of
    64, below to the nearest power of two (upwards in the middle).

    Raises:
        PlanError: The batch is less than one row.
    """
    if batch.unit == "samples":
        if batch.value < 1 or batch.value != int(batch.value):
            raise PlanError(
                f"batch {batch}: a batch is a whole number of rows, at least 1", hint="batch: 32 samples"
            )
        return int(batch.value), ""
    if batch.value < context:
        raise PlanError(
            f"batch {batch} is less than one row of {context} tokens",
            hint=f"train.batch={context} tokens is one row; or a smaller model.context",
        )
    exact = batch.value / context
    rows = _nearest_multiple(exact, ROUND_TO) if exact >= ROUND_TO else _nearest_power_of_two(exact)
    if rows == exact:
        return rows, ""
    return rows, (
        f"batch {batch} is {exact:g} rows of {context}: rounded to {rows} rows, {rows * context:,} tokens, "
        "on every machine, so that devices can share it"
    )


def _nearest_multiple(value: float, of: int) -> int:
    return of * int(value / of + 0.5)


def _nearest_power_of_two(value: float) -> int:
    low = 1 << (int(value).bit_length() - 1)
    return low if value - low < 2 * low - value else 2 * low


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most` (1 when nothing else is)."""
    return max(d for d in divisors(number) if d <= max(1, at_most))


def share_rows(rows: int, world_size: int, micro_batch: int) -> Share:
    """Deal a step's rows to processes in equal micro-batches.

    Args:
        rows: Rows of the step.
        world_size: Processes.
        micro_batch: Rows at a time on one process.

    Raises:
        PlanError: The rows cannot be shared equally; the message names batches and numbers of processes that
            fit.
    """
    if rows % world_size:
        raise _cannot_share(rows, world_size)
    per_process = rows // world_size
    if per_process % micro_batch:
        fits = ", ".join(str(d) for d in divisors(per_process))
        raise PlanError(
            f"machine.micro_batch {micro_batch} does not divide the {per_process} rows of a step that each "
            f"of {world_size} process(es) has",
            hint=f"machine.micro_batch that fits: {fits}",
        )
    return Share(micro_batch, per_process // micro_batch, world_size)


def _cannot_share(rows: int, world_size: int) -> PlanError:
    below, above = rows - rows % world_size, rows - rows % world_size + world_size
    batches = " or ".join(f"{n} samples" for n in (below, above) if n)
    processes = [d for d in divisors(rows) if d <= 2 * world_size]
    return PlanError(
        f"a batch of {rows} rows cannot be shared equally by {world_size} processes",
        hint=f"batches that fit: {batches}; processes that fit: {', '.join(map(str, processes))}",
    )
