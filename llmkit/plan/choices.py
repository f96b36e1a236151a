"""Decisions that every plan has to make: processes, precision, saving, intervals; each with its reason."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.batch import PlanError, largest_divisor
from llmkit.plan.length import resolve_every, resolve_warmup
from llmkit.plan.levers import check_levers
from llmkit.plan.memory import Memory, Recompute
from llmkit.plan.shape import ModelShape
from llmkit.plan.sharing import (
    POLICIES,
    SHARDS_BY_ITSELF,
    MemoryOf,
    Sharing,
    World,
    resolve_sharing,
    setting_of,
    what_would_fit,
)
from llmkit.recipe.machine import Parallel
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


def choose_world(draft: Draft, rows: int, fixed: int | None) -> World:
    """Processes: fixed from outside, else pinned by the recipe, else all devices that can share the batch.

    Raises:
        PlanError: There are not so many devices, they cannot share the rows, or they are not of one kind.
    """
    nodes = draft.hardware.nodes or draft.machine.nodes
    devices = draft.hardware.num_devices * nodes
    pinned = draft.machine.processes
    if fixed is not None:
        if pinned != fixed:
            draft.choose("processes", fixed, "set by the launcher or by --processes")
        size = fixed
    elif pinned != "auto":
        size = pinned
        check_devices(draft.hardware, draft.machine, size, "machine.processes")
    else:
        size = choose_auto_world(draft, rows, devices)
    _check_alike(draft.hardware, size)
    local = size // nodes if size % nodes == 0 else min(size, draft.hardware.num_devices)
    return World(size, max(1, local), nodes, draft.hardware.device)


def check_devices(hardware: Hardware, machine: Machine, processes: int, said_by: str) -> None:
    """See that there is a device for each process that a person asks for.

    Raises:
        PlanError: There are not so many.
    """
    nodes = hardware.nodes or machine.nodes
    devices = hardware.num_devices * nodes
    if hardware.device != "cpu" and processes > devices:
        raise PlanError(
            f"{said_by} is {processes}, but {'this machine has' if nodes == 1 else 'there are'} {devices} "
            f"{hardware.device} device(s)",
            hint=f"{said_by}={devices}",
        )


def choose_auto_world(draft: Draft, rows: int, devices: int) -> int:
    """All devices; those that read the same rows count once.

    Raises:
        PlanError: They cannot share a step's rows equally: nobody has said that some are to stay idle.
    """
    wanted = draft.machine.parallel
    readers = wanted.tensor * wanted.expert * wanted.context if isinstance(wanted, Parallel) else 1
    _check_alike(draft.hardware, devices)
    groups = max(1, devices // readers)
    world = readers * largest_divisor(rows, groups)
    if readers <= devices and devices % readers:
        raise PlanError(
            f"machine.parallel: tensor x expert x context is {readers}, and {_counted(draft.hardware, devices)} are no "
            "multiple of that",
            hint=f"numbers that divide {devices}; or machine.processes={readers * groups}, and "
            f"{devices - readers * groups} stay idle",
        )
    if world < devices:
        below, above = rows - rows % groups, rows - rows % groups + groups
        fits = " or ".join(f"{n} samples" for n in (below, above) if n)
        raise PlanError(
            f"a batch of {rows} rows cannot be shared equally by {_counted(draft.hardware, groups)}",
            hint=f"batches that fit: {fits}; or machine.processes={world}, and {devices - world} stay idle",
        )
    one = draft.hardware.device == "cpu" and devices == 1
    why = "one process uses every core" if one else f"one per {_counted(draft.hardware, 1)}"
    draft.choose("processes", world, why)
    return world


def _check_alike(hardware: Hardware, size: int) -> None:
    """Whether processes that work in step have devices of one kind.

    Raises:
        PlanError: They have not.
    """
    if not hardware.unlike or size == 1:
        return
    kind = hardware.unlike[0].partition(": ")[2]
    same = [each.partition(": ")[0] for each in hardware.unlike if each.endswith(f": {kind}")]
    raise PlanError(
        f"the GPUs here are not of one kind ({', '.join(hardware.unlike)}): all would wait for the slowest, and they "
        "need not compute the same",
        hint=f"CUDA_VISIBLE_DEVICES={','.join(same)} before the command, or machine.processes=1",
    )


def _counted(hardware: Hardware, number: int) -> str:
    """So many devices in words."""
    word = {"cpu": "machine", "cuda": "GPU", "tpu": "TPU chip"}.get(hardware.device, "device")
    return f"{number} {word}s" if number != 1 else word


def choose_sharing(
    draft: Draft, world: World, model: ModelShape, rows: int, memory_of: MemoryOf
) -> tuple[Sharing, int]:
    """Who shares what, and the bytes that each process may fill.

    Args:
        draft: What is known so far.
        world: The processes.
        model: The model's shape.
        rows: Rows of a step.
        memory_of: Memory of one process at the smallest micro-batch.
    """
    available = draft.hardware.memory_bytes // (world.local if draft.hardware.device == "cpu" else 1)
    most = int(MEMORY_SHARE * available)
    sharing = resolve_sharing(draft.machine, world, model, rows=rows, available=most, memory_of=memory_of)
    if draft.machine.parallel == "auto":
        draft.choose("parallel", setting_of(sharing.layout), sharing.why)
    if draft.machine.recompute == "auto":
        draft.choose("recompute", sharing.recompute, sharing.why_recompute)
    draft.notes += sharing.notes
    if not sharing.fits and draft.hardware.device in SHARDS_BY_ITSELF:
        found = what_would_fit(world, model, most, memory_of)
        draft.notes.append(f"what would fit: {found}" if found else "no number of these devices would fit it")
    return sharing, available


def note_shortage(draft: Draft, memory: Memory, available: int, world: World) -> None:
    """Say where memory may not suffice."""
    if memory.total <= MEMORY_SHARE * available:
        return
    shared = " a process" if world.size > 1 and draft.hardware.device == "cpu" else ""
    draft.notes.append(
        f"memory may not suffice: about {memory.total / 1e9:.1f} GB needed of {available / 1e9:.1f} GB{shared}"
    )


def choose_precision(draft: Draft) -> str:
    """The precision: pinned, else bf16 where the hardware has it.

    Raises:
        PlanError: Something is pinned that this hardware does not have; see `check_levers`.
    """
    check_levers(draft.machine, draft.hardware)
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
    return {"cpu": "processor", "tpu": "TPU"}.get(hardware.device, "GPU")


def assumed_attention(hardware: Hardware, attention: str) -> str:
    """What `auto` costs at most: on a processor the probe may choose the form that keeps the scores."""
    if attention != "auto":
        return attention
    return "compiled" if hardware.device == "cpu" else "sdpa"


def likely_seconds(
    step: tuple[float, float] | None, steps: int | None, limit_s: float | None
) -> tuple[float | None, float | None]:
    """Estimated shortest and longest duration of so many steps; a length that is a time is both."""
    if limit_s is not None:
        return limit_s, limit_s
    return (step[0] * (steps or 0), step[1] * (steps or 0)) if step else (None, None)


def choose_background_save(
    draft: Draft, memory: Memory, checkpoint_bytes: int, world: int, *, writers: int
) -> tuple[bool, Memory]:
    """Whether checkpoints are written from a copy while training goes on; the memory with that copy in it.

    Args:
        draft: What is decided so far.
        memory: Of one process.
        checkpoint_bytes: What one process copies.
        world: Processes of a machine.
        writers: Those of them that copy.
    """
    on_cpu = draft.hardware.device == "cpu"
    copied = memory.with_copy(checkpoint_bytes) if on_cpu else memory
    pinned = draft.machine.background_save
    if pinned != "auto":
        return pinned, copied if pinned else memory
    size = f"{checkpoint_bytes / 1e9:.2g} GB"
    if on_cpu:
        # Of the processes on a processor the first alone keeps a copy, but each may use its share only.
        fits = copied.total <= MEMORY_SHARE * draft.hardware.memory_bytes // world
        why = f"a copy of {size} fits into memory" if fits else f"there is no memory for a copy of {size}"
    else:
        fits, why = _fits_host(draft.hardware, checkpoint_bytes * writers + memory.host * world)
    draft.choose("background_save", fits, why)
    return fits, copied if fits else memory


def _fits_host(hardware: Hardware, needed: int) -> tuple[bool, str]:
    """Whether copies of what is saved fit into the memory around the devices, beside what waits there; and why."""
    size, host = f"{needed / 1e9:.2g} GB", hardware.host_memory_bytes
    if hardware.device == "mps":
        host = hardware.memory_bytes
    if host is None:
        return True, f"copies take {size} of each machine's own memory, which is not known here"
    fits = needed <= MEMORY_SHARE * host
    return (
        fits,
        f"{'copies' if fits else 'no room for copies'} of {size} in the machine's {host / 1e9:.4g} GB",
    )


def begin_draft(machine: Machine, hardware: Hardware, wanted: Section) -> Draft:
    """A draft that has chosen nothing but the device."""
    draft = Draft(machine, hardware, state_bytes_of(wanted), notes=list(hardware.notes))
    if machine.device == "auto":
        draft.choose("device", hardware.device, hardware.device_name)
    return draft


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
    if (
        distil is not None
        and (distil.hidden or distil.attention)
        and draft.machine.compile in (True, "graphs")
    ):
        raise PlanError(
            "machine.compile: a compiled model does not show its layers, and `distil` compares them",
            hint="machine.compile=auto, or leave `hidden` and `attention` of `distil` out",
        )


def state_bytes_of(wanted: Section) -> float:
    """Bytes that the optimizer remembers of a parameter."""
    optim = wanted.train.optim
    return state_bytes_per_parameter(optim.name, optim.momentum, ema=wanted.train.ema is not None)


def activations_by_policy(model: ModelShape, memory_of: Callable[[Recompute], Memory]) -> dict[str, int]:
    """Bytes of activations by what is computed again."""
    return {how: memory_of(how).activations for how in (POLICIES if model.recomputes else POLICIES[:1])}


def disk_of(
    wanted: Section, checkpoint: int, export: int, *, steps: int | None, keep_every: int | None
) -> dict[str, int]:
    """Bytes on disk: checkpoints at a time at most, and the model.

    Args:
        wanted: Says how many checkpoints stay: the newest, the best, and those for good.
        checkpoint: Bytes of one; another is being written.
        export: Bytes of the model.
        steps: Of the run; None where that is not known yet, and those that stay for good are left out.
        keep_every: Those of every so many steps stay for good.
    """
    for_good = steps // keep_every if steps and keep_every else 0
    count = wanted.checkpoint.keep + (wanted.checkpoint.keep_best is not None) + 1 + for_good
    return {"checkpoints": checkpoint * count, "model": export}
