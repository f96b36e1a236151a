"""The levers of a device, pulled once before the first step; each is told with its reason.

What the plan says is carried out here (compiling, 8-bit products, Liger's kernels), and what only the built model
tells is decided: whether its blocks are compiled one by one.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from llmkit.errors import UsageError
from llmkit.models.kernels import (
    LARGEST_GRAPHED,
    compile_module,
    describe_blocks,
    use_float8,
    use_liger,
)
from llmkit.objectives.base import LossModule
from llmkit.plan import Plan
from llmkit.recipe.machine import Machine

T = TypeVar("T")
COLLECT_EVERY = 500
"""Steps between two collections of garbage, which Python's own collector makes at moments of its own choice."""


def pull_levers(core: LossModule, plan: Plan, machine: Machine, note: Callable[[str], None]) -> Plan:
    """Make the model fast in the ways that plan and device allow; call it before the optimizer is built.

    Args:
        core: Model and objective, on the device or about to go there; its layers are changed in place.
        plan: The run's.
        machine: The recipe's section.
        note: Takes what was done that no setting of the plan says.

    Returns:
        The plan, with what was found out about compiling.

    Raises:
        MissingError: A package is not installed.
        UsageError: The architecture has nothing that a pinned lever could move.
    """
    on_gpu = plan.device == "cuda"
    if on_gpu and plan.precision != "fp32":
        # What autocast leaves in fp32 may take the matrix units too. `precision: fp32` is left exact.
        torch.set_float32_matmul_precision("high")
        note("matrix products that stay in fp32 use TF32")
    if machine.liger:
        use_liger(core.model)
        note(f"Liger's kernels for {core.model.config.model_type}; the loss is llmkit's own, in chunks")
    if plan.precision == "fp8":
        note(
            f"{use_float8(core.model):,} linear layers multiply in 8-bit floats while training, and in no evaluation"
        )
    return _compiled(core, plan, machine.compile == "graphs") if plan.compile else plan


def _compiled(core: LossModule, plan: Plan, graphs: bool) -> Plan:
    """Compile what is to be compiled, and the plan that says how."""
    if graphs and plan.layout.is_sharded:
        raise UsageError(
            "machine.compile is graphs: CUDA graphs cannot be recorded of a model that processes share, for they meet "
            "within it",
            hint="machine.compile=true, or machine.parallel=ddp",
        )
    if graphs and core.model.num_parameters() > LARGEST_GRAPHED:
        raise UsageError(
            f"machine.compile is graphs: a model of {core.model.num_parameters():,} weights keeps a GPU busy with each "
            f"kernel; CUDA graphs help below {LARGEST_GRAPHED:,}",
            hint="machine.compile=true",
        )
    blocks = compile_module(core, graphs=graphs)
    if graphs:
        how = "as a whole, its kernels recorded as CUDA graphs"
    elif blocks:
        how = f"block by block ({describe_blocks(blocks)}): equal blocks are compiled once"
    else:
        how = "as a whole"
    before = plan.choices.get("machine.compile")
    why = f"{before[1]}; {how}" if before else how
    return replace(plan, choices={**plan.choices, "machine.compile": (True, why)})


@contextmanager
def frozen_garbage(
    micro_batches: Callable[[int], Sequence[T]], *, every: int = COLLECT_EVERY
) -> Iterator[Callable[[int], Sequence[T]]]:
    """While this lasts, Python looks for garbage at chosen steps only, and not at what was there after the first.

    Model, optimizer and libraries are millions of objects that stay; going through them takes a tenth of a second,
    which a GPU that waits for its next kernel sees. What training itself leaves behind goes at once, by counting.

    Args:
        micro_batches: A step -> its micro-batches; called once a step, when the step before is done.
        every: Steps between two collections.

    Yields:
        The same function, which also does that.

    **Source**: nanochat, `scripts/base_train.py`: freezing and switching off the collector after the first step.
    """
    calls = 0

    def of_step(step: int) -> Sequence[T]:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first step is done: what lives now lives on
            gc.collect()
            gc.freeze()
            gc.disable()
        elif calls > 2 and (calls - 2) % every == 0:
            gc.collect()
        return micro_batches(step)

    enabled = gc.isenabled()
    try:
        yield of_step
    finally:
        if calls >= 2:
            gc.unfreeze()
        if enabled:
            gc.enable()
