"""Decisions that every plan has to make: processes, precision, saving, intervals; each with its reason."""

from dataclasses import dataclass, field
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.batch import PlanError, largest_divisor, share_rows
from llmkit.plan.estimate import Memory
from llmkit.plan.length import resolve_every, resolve_warmup
from llmkit.recipe.optimizers import state_bytes_per_parameter
from llmkit.recipe.schema import Machine, Section
from llmkit.recipe.units import Amount

MEMORY_SHARE = 0.85
"""Share of a device's memory that the estimate may fill; the rest is for workspaces and for its errors."""


@dataclass
class Draft:
    """What is known so far; `choose` records a decision with its reason."""

    machine: Machine
    hardware: Hardware
    state_bytes: float
    choices: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def choose(self, setting: str, value: Any, why: str) -> None:
        """Record what was chosen for a setting of `machine`, and why."""
        self.choices[f"machine.{setting}"] = (value, why)


def choose_world(draft: Draft, rows: int, fixed: int | None) -> int:
    """Processes: fixed from outside, else pinned by the recipe, else all devices that can share the batch."""
    pinned = draft.machine.processes
    if fixed is not None:
        if pinned != fixed:
            draft.choose("processes", fixed, "set by the launcher or by --processes")
        world = fixed
    elif pinned != "auto":
        world = pinned
    else:
        return choose_auto_world(draft, rows)
    if draft.hardware.device != "cpu" and world > draft.hardware.num_devices and fixed is None:
        raise PlanError(
            f"machine.processes is {world}, but this machine has {draft.hardware.num_devices} "
            f"{draft.hardware.device} device(s)",
            hint=f"machine.processes={draft.hardware.num_devices}",
        )
    share_rows(rows, world, 1)
    return world


def choose_auto_world(draft: Draft, rows: int) -> int:
    """All devices that can share a step's rows equally."""
    devices = draft.hardware.num_devices
    world = largest_divisor(rows, devices)
    if draft.hardware.device == "cpu":
        why = "one process uses every core"
    elif world == devices:
        why = f"one per {draft.hardware.device} device"
    else:
        below, above = rows - rows % devices, rows - rows % devices + devices
        fits = " or ".join(f"{n} samples" for n in (below, above) if n)
        why = f"{rows} rows a step cannot be shared equally by {devices} devices"
        draft.notes.append(
            f"{devices - world} of {devices} devices stay idle: {why}; a batch of {fits} would use all"
        )
    draft.choose("processes", world, why)
    return world


def choose_precision(draft: Draft) -> str:
    """The precision: pinned, else bf16 where the hardware has it."""
    pinned, bf16 = draft.machine.precision, draft.hardware.bf16
    if pinned == "auto":
        has = "has bf16 in hardware" if bf16 else "has no bf16 in hardware"
        draft.choose("precision", "bf16" if bf16 else "fp32", f"this {noun(draft.hardware)} {has}")
        return "bf16" if bf16 else "fp32"
    if pinned == "bf16" and not bf16:
        draft.notes.append(
            f"bf16 is pinned, but this {noun(draft.hardware)} only emulates it: fp32 is usually faster"
        )
    return pinned


def noun(hardware: Hardware) -> str:
    """What a message calls the device."""
    return "processor" if hardware.device == "cpu" else "GPU"


def assumed_attention(hardware: Hardware, attention: str) -> str:
    """What `auto` costs at most: on a processor the probe may choose the form that keeps the scores."""
    if attention != "auto":
        return attention
    return "compiled" if hardware.device == "cpu" else "sdpa"


def likely_seconds(
    rate: tuple[float, float] | None, flops: float, limit_s: float | None
) -> tuple[float | None, float | None]:
    """Estimated shortest and longest duration; a length that is a time is both."""
    if limit_s is not None:
        return limit_s, limit_s
    return (flops / rate[1], flops / rate[0]) if rate else (None, None)


def choose_background_save(
    draft: Draft, memory: Memory, checkpoint_bytes: int, world: int
) -> tuple[bool, Memory]:
    """Whether checkpoints are written from a copy while training goes on; the memory with that copy in it."""
    on_cpu = draft.hardware.device == "cpu"
    copied = memory.with_copy(checkpoint_bytes) if on_cpu else memory
    pinned = draft.machine.background_save
    if pinned != "auto":
        return pinned, copied if pinned else memory
    # Of the processes on a processor the first alone keeps a copy, but each may use its share only.
    fits = copied.total <= MEMORY_SHARE * draft.hardware.memory_bytes // (world if on_cpu else 1)
    size = f"{checkpoint_bytes / 1e9:.2g} GB"
    why = f"a copy of {size} fits into memory" if fits else f"there is no memory for a copy of {size}"
    draft.choose("background_save", fits, why)
    return fits, copied if fits else memory


def intervals(
    wanted: Section, steps: int | None, rows: int, context: int, num_rows: int
) -> dict[str, tuple[int | None, Amount]]:
    """Warm-up and intervals in steps (None where that must wait), each with what the recipe says."""
    warmup = wanted.train.optim.warmup
    tokens = rows * context
    every = {
        key: (
            resolve_every(
                amount,
                num_steps=steps,
                tokens_per_step=tokens,
                rows_per_step=rows,
                num_rows_per_epoch=num_rows,
            ),
            amount,
        )
        for key, amount in (
            ("checkpoint_every", wanted.checkpoint.every),
            ("keep_every", wanted.checkpoint.keep_every),
            ("eval_every", wanted.eval.every),
        )
    }
    warm = resolve_warmup(warmup, num_steps=steps, tokens_per_step=tokens)
    return {"warmup_steps": (warm, warmup), **every}


def check_compile(draft: Draft, wanted: Section) -> None:
    """See that layers which are compared with a teacher's can be looked at.

    Raises:
        PlanError: The recipe pins compiling, and a compiled model does not show its layers.
    """
    distil = wanted.distil
    if distil is not None and (distil.hidden or distil.attention) and draft.machine.compile is True:
        raise PlanError(
            "machine.compile: a compiled model does not show its layers, and `distil` compares them",
            hint="machine.compile=auto, or leave `hidden` and `attention` of `distil` out",
        )


def state_bytes_of(wanted: Section) -> float:
    """Bytes that the optimizer remembers of a parameter."""
    optim = wanted.train.optim
    return state_bytes_per_parameter(optim.name, optim.momentum, ema=wanted.train.ema is not None)
