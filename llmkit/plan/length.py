"""Lengths, intervals and warm-up turned into optimizer steps."""

import math

from llmkit.recipe.units import Amount

ROUNDING = 1e-9
"""Float noise that must not become a whole further step."""


def resolve_length(
    length: Amount, *, tokens_per_step: int, rows_per_step: int, num_rows_per_epoch: int
) -> int | None:
    """Steps of a run, at least as long as asked and at least 1; None for a time.

    An epoch is every row once; the rows of the last step that go beyond it begin the next pass.
    """
    if length.unit == "seconds":
        return None
    steps = {
        "tokens": length.value / tokens_per_step,
        "epochs": length.value * num_rows_per_epoch / rows_per_step,
        "steps": length.value,
    }[length.unit]
    return max(1, math.ceil(steps * (1 - ROUNDING)))


def resolve_every(
    every: Amount,
    *,
    num_steps: int | None,
    tokens_per_step: int,
    rows_per_step: int,
    num_rows_per_epoch: int,
    seconds_per_step: float | None = None,
) -> int | None:
    """Steps between two events, at least 1; 0 for `never`; None while the steps or the speed are unknown."""
    if every.unit == "never" or every.value == 0:
        return 0
    if every.unit == "percent":
        return None if num_steps is None else max(1, round(every.value / 100 * num_steps))
    if every.unit == "seconds":
        return None if seconds_per_step is None else max(1, round(every.value / seconds_per_step))
    steps = {
        "steps": every.value,
        "tokens": every.value / tokens_per_step,
        "epochs": every.value * num_rows_per_epoch / rows_per_step,
    }[every.unit]
    return max(1, round(steps))


def resolve_warmup(warmup: Amount, *, num_steps: int | None, tokens_per_step: int) -> int | None:
    """Steps of warm-up, 0 for none; None for a share of a number of steps that is not known yet."""
    if warmup.unit == "never":
        return 0
    if warmup.unit == "percent":
        return None if num_steps is None else round(warmup.value / 100 * num_steps)
    return round(warmup.value / (tokens_per_step if warmup.unit == "tokens" else 1))
