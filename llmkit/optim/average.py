"""Averages of the weights: kept beside them, saved with the optimizer, and put in their place to be judged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmkit.optim.each import EachParameter
from llmkit.optim.rules import schedule_free, schedule_free_average

EMA = "ema"
"""The name of a parameter's average in the optimizer's state, and of its decay in the group."""


def keep_average(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer keep an exponential moving average of every parameter, as part of its state.

    It begins as the weights after the first update; then each update moves it by `1 - decay` towards them.
    """
    optimizer.register_step_post_hook(_follow)


@torch.no_grad()
def _follow(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if EMA in state:
                state[EMA].lerp_(p, 1 - group[EMA])
            elif group.get(EMA) and p.grad is not None:
                state[EMA] = p.detach().clone()


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While this lasts, parameters that have an average hold it: for evaluation, samples and the export.

    Afterwards they are as before, to the last bit. Where nothing is averaged, or nothing was updated yet, nothing
    happens.
    """
    before: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            # One after the other: beside the weights as they were, no second copy of all of them is ever in memory.
            for p, average in _averages(optimizer):
                before.append((p, p.detach().clone()))
                p.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for p, value in before:
                p.copy_(value)


@torch.no_grad()
def _averages(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    own: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    between = isinstance(own, EachParameter) and own.update is schedule_free
    for group in own.param_groups:
        for p in group["params"]:
            state = own.state.get(p, {})
            if EMA in state:
                yield p, state[EMA]
            elif between and "z" in state:
                yield p, schedule_free_average(p, state, group)
