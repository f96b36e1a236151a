"""What processes send each other in a step: refused, counted and told before it is sent. No torch.

Counted is what one process sends of weights or gradients. Beside it every step sends some numbers, whatever is chosen:
how many targets it holds, whether a process must stop, the loss; about 200 bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.plan.batch import PlanError
from llmkit.plan.parallel import Layout
from llmkit.plan.plan import Plan
from llmkit.plan.shape import ModelShape
from llmkit.plan.sharing import check_shared
from llmkit.recipe.machine import Communication
from llmkit.recipe.schema import Finetune, Section

WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2, "powersgd": 4}
"""Bytes of a number that travels."""

AT_LEAST = 2
"""PowerSGD sends a matrix as factors where these hold so many times fewer numbers."""

_INTERVALS = {
    "eval_every": "evaluations",
    "checkpoint_every": "checkpoints",
    "keep_every": "kept checkpoints",
}


def factor_rank(shape: Sequence[int], rank: int) -> int:
    """The rank that PowerSGD sends a gradient with; 0: it is sent whole.

    Args:
        shape: Of the gradient; all dimensions but the first count as columns.
        rank: The recipe's `machine.communication.rank`.
    """
    if len(shape) < 2:
        return 0
    rows, columns = shape[0], math.prod(shape[1:])
    return rank if AT_LEAST * rank * (rows + columns) < rows * columns else 0


def powersgd_values(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Numbers that PowerSGD sends of gradients of these shapes: both factors of a matrix, all of the others."""
    sent = 0
    for shape in shapes:
        low = factor_rank(shape, rank)
        sent += low * (shape[0] + math.prod(shape[1:])) if low else math.prod(shape)
    return sent


def bytes_per_step(communication: Communication, shapes: Iterable[Sequence[int]], world_size: int) -> float:
    """Bytes that each process sends of gradients or weights in a step, on average over the steps of a run.

    An all-reduce of n bytes in a ring sends `2 (W - 1) / W n` from each of W processes; accumulated micro-batches send
    nothing but with the last one. With `local_steps` all weights are sent once in `every` steps.

    Args:
        communication: The recipe's.
        shapes: Of all that learns.
        world_size: Processes that hold the model once each.
    """
    shapes = [tuple(shape) for shape in shapes]
    values = sum(math.prod(shape) for shape in shapes)
    every = 1
    if communication.local_steps is not None:
        every = communication.local_steps.every
    elif communication.gradients == "powersgd":
        values = powersgd_values(shapes, communication.rank)
    return 2 * (world_size - 1) / world_size * values * WIDTH[communication.gradients] / every


def outer_bytes(communication: Communication, num_trained: int, layout: Layout) -> int:
    """Bytes of memory that `communication` takes on each device, beside what plain gradients take.

    With `local_steps` these are the weights that all began from and the outer momentum, but no buckets of gradients.
    """
    if communication.local_steps is not None:
        buckets = 4 * num_trained if layout.data_size > 1 else 0
        return 4 * num_trained * (2 if communication.local_steps.momentum else 1) - buckets
    return 4 * num_trained if communication.gradients == "powersgd" and layout.data_size > 1 else 0


def own_bytes(
    communication: Communication, num_trained: int, state_bytes: float, layout: Layout
) -> tuple[int, int]:
    """Bytes that processes have each for themselves in a checkpoint, beside what all have in common.

    With `local_steps` these are the other processes' optimizers and the outer momentum; with `powersgd` what each has
    not sent yet. What a stop between two meetings saves beside that says `apart_bytes`.

    Args:
        communication: The recipe's.
        num_trained: Weights that learn.
        state_bytes: What the optimizer remembers of each.
        layout: Who shares what; with several such processes each holds the whole model.

    Returns:
        Those of the process that has most, and those of all processes.
    """
    local, weights, size = communication.local_steps, 4 * num_trained, layout.data_size
    if local is not None:
        momentum = weights if local.momentum else 0
        return momentum, int(state_bytes * num_trained) * (size - 1) + momentum
    if communication.gradients == "powersgd" and size > 1:
        return weights, weights * size
    return 0, 0


def apart_bytes(plan: Plan) -> int:
    """Bytes that a checkpoint has more where a run is stopped between two meetings: the weights of each process."""
    local = plan.communication.get("local_steps")
    apart = local is not None and local["every"] > 1
    return 4 * (plan.num_trained or plan.num_parameters) * plan.layout.data_size if apart else 0


def check_communication(communication: Communication, layout: Layout, section: Section) -> None:
    """See that what was asked for can be done, with these processes and for what is trained.

    Raises:
        PlanError: It cannot; says why and what would work.
    """
    local, gradients = communication.local_steps, communication.gradients
    if local is not None and gradients != "fp32":
        raise PlanError(
            f"machine.communication.gradients is {gradients}, but with `local_steps` no gradients travel",
            hint="leave one of the two out; `local_steps` alone sends less",
        )
    if layout.is_sharded and local is not None:
        raise PlanError(
            "machine.communication.local_steps: each process changes weights of its own, and with a sharded model "
            "none has all of them",
            hint="machine.parallel=ddp, or leave `local_steps` out",
        )
    if layout.is_sharded and gradients != "fp32":
        raise PlanError(
            f"machine.communication.gradients: {gradients} is for models that every process holds whole; shards of "
            "gradients are added up where the weights are sharded, in fp32",
            hint="machine.parallel=ddp, or leave `gradients` out",
        )
    if local is not None and (section.train.ema is not None or section.train.optim.name == "schedule_free"):
        what = "train.ema" if section.train.ema is not None else "optim.name: schedule_free"
        raise PlanError(
            f"{what} keeps an average of the weights, and with machine.communication.local_steps every process would "
            "have another one",
            hint="leave one of the two out; the outer step is an average over processes already",
        )
    comparing = _comparing(section)
    if local is not None and comparing:
        raise PlanError(
            f"{comparing} compares the rows of all processes at every step, and with "
            "machine.communication.local_steps each process would see them by other weights",
            hint="leave `local_steps` out; machine.communication.gradients=fp16 sends less too",
        )


def _comparing(section: Section) -> str:
    """The setting by which a row's loss depends on the other rows of a step (`looks_ahead`); empty: there is none."""
    if not isinstance(section, Finetune):
        return ""
    if section.task == "dpo" and section.dpo.loss == "kto":
        return "finetune.dpo.loss: kto"
    return "finetune.task: embed" if section.task == "embed" else ""


def with_communication(
    plan: Plan,
    communication: Communication,
    section: Section,
    *,
    shapes: Sequence[Sequence[int]] | None,
    beside: int = 0,
) -> Plan:
    """The plan with what processes send, checked, counted and told; evaluations and checkpoints fall on meetings.

    Args:
        plan: Complete but for this.
        communication: The recipe's.
        section: What is trained.
        shapes: Of all that learns, for the count: as of `matrices_of`; None where they are not known.
        beside: Weights that learn beside the model.

    Raises:
        PlanError: See `check_communication` and `sharing.check_shared`.
    """
    check_shared(plan.layout, section)
    check_communication(communication, plan.layout, section)
    if communication == Communication():
        return plan
    notes = list(plan.notes)
    settled: dict[str, Any] = communication.model_dump(mode="json")
    if communication.gradients != "powersgd":  # only how much it is matters
        shapes = [((plan.num_parameters if plan.num_trained is None else plan.num_trained) + beside,)]
    elif beside:
        shapes = None
    if plan.world_size == 1 and communication.local_steps is None:
        notes.append(
            f"machine.communication.gradients: {communication.gradients} does nothing with one process"
        )
    elif shapes is not None and plan.world_size > 1:
        settled["bytes_per_step"] = round(bytes_per_step(communication, shapes, plan.world_size))
        usual = bytes_per_step(Communication(), shapes, plan.world_size)
        notes.append(
            f"each process sends about {settled['bytes_per_step'] / 1e6:.3g} MB a step "
            f"(machine.communication; plain gradients are {usual / 1e6:.3g} MB)"
        )
    plan = replace(plan, communication=settled, notes=tuple(notes))
    return on_meetings(plan) if plan.communication.get("local_steps") else plan


def on_meetings(plan: Plan) -> Plan:
    """The plan with its intervals made multiples of the steps between two meetings, which a note says.

    Between meetings there is no one model to evaluate or to save.
    """
    local = plan.communication.get("local_steps")
    if not local:
        return plan
    every, notes, changed = local["every"], list(plan.notes), {}
    for key, name in _INTERVALS.items():
        steps = getattr(plan, key)
        if steps and steps % every:
            changed[key] = steps + every - steps % every
            notes.append(f"{name} fall on meetings: every {changed[key]:,} steps instead of {steps:,}")
    return replace(plan, **changed, notes=tuple(notes))


def overflow_hint(plan: Plan) -> str:
    """What a gradient that is not finite may also come from; empty where processes send all that fp32 holds."""
    if plan.world_size == 1 or plan.communication.get("gradients") != "fp16":
        return ""
    return (
        "Gradients travel as fp16, which ends at 65,504: `machine.communication.gradients=bf16` reaches as far "
        "as fp32, and the run goes on with it."
    )


def told_change(begun: Plan, plan: Plan) -> str:
    """What to say of a run that goes on with other communication than it began with; empty where it is the same."""
    before = begun.communication.get("gradients", "fp32")
    now = plan.communication.get("gradients", "fp32")
    if plan.communication.get("local_steps") and begun.world_size != plan.world_size:
        return (
            f"machine.communication.local_steps: {plan.world_size} processes meet, where this run began with "
            f"{begun.world_size}: another number of processes makes another result"
        )
    if before == now:
        return ""
    return (
        f"machine.communication.gradients: {now}, where this run began with {before}: it goes on, and the result is a "
        "little different from here on"
    )


def identity_of(communication: Communication) -> Mapping[str, Any]:
    """What of these settings makes another run: to meet, and how. Gradients may travel otherwise from any step on."""
    local = communication.local_steps
    return {} if local is None else {"machine.communication.local_steps": local.model_dump(mode="json")}


def matrices_of(shape: ModelShape) -> list[tuple[int, ...]] | None:
    """The shapes of all that learns in a transformer; None where they do not follow from its numbers.

    What is left beside tables and matrices (norms, biases) is one long vector: it travels whole whatever is chosen.
    Queries, keys and values are taken for three matrices, which is a little more than where a model has them in one.
    """
    if (
        shape.num_heads == 0
        or shape.num_encoder_layers
        or shape.embedding_size not in (None, shape.hidden_size)
    ):
        return None
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (hidden, inner)]
    block += [(inner, hidden)] * (2 if shape.gated_mlp else 1)
    layers = block * shape.num_layers
    head = [(shape.vocab_size, hidden)]
    linear = sum(map(math.prod, layers))
    if linear + math.prod(head[0]) != shape.num_matmul_parameters:
        return None
    tables = head if shape.tied else head * 2
    rest = shape.num_parameters - linear - sum(map(math.prod, tables))
    return [*layers, *tables, (rest,)] if rest >= 0 else None
