"""Who shares what: from a recipe's `machine.parallel` and the number of processes to a `Layout`, each with its reason.

A pure function: the run and `llmkit plan` call it alike. What is pinned is verified, what is `auto` is the first of a
fixed list of layouts with which the model fits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmkit.plan.batch import PlanError, divisors
from llmkit.plan.memory import Memory, Recompute
from llmkit.plan.parallel import Layout
from llmkit.plan.shape import ModelShape
from llmkit.recipe.machine import Machine, Parallel
from llmkit.recipe.schema import Section

POLICIES: tuple[Recompute, ...] = ("none", "selective", "full")
"""From the one that costs no work to the one that keeps the least."""

SHARDS_BY_ITSELF = ("cuda", "tpu")
"""Devices where `auto` shares a model; on CPU that is only done where it is asked for."""
SPLITS_BY_ITSELF = ("cuda",)
"""Devices where it splits layers too; on a TPU nobody has seen that, and `plan/tpu.py` refuses it."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        size: All of them.
        local: Those of one machine.
        nodes: Machines.
        device: Where they compute.
    """

    size: int
    local: int
    nodes: int
    device: str


@dataclass(frozen=True)
class Sharing:
    """What was decided.

    Attributes:
        layout: Who shares what.
        recompute: What the backward pass computes again.
        memory: Of one process, with the smallest micro-batch.
        fits: Whether that is within what there is.
        why: The reason for the layout; empty where it is pinned.
        why_recompute: Likewise.
        notes: Remarks a person should see.
    """

    layout: Layout
    recompute: Recompute
    memory: Memory
    fits: bool
    why: str
    why_recompute: str
    notes: tuple[str, ...] = ()


MemoryOf = Callable[[Layout, Recompute], Memory]


def resolve_sharing(
    machine: Machine, world: World, model: ModelShape, *, rows: int, available: int, memory_of: MemoryOf
) -> Sharing:
    """Decide how processes share model and rows.

    Args:
        machine: The recipe's section; `parallel`, `recompute` and `offload` are read.
        world: The processes.
        model: The model's shape.
        rows: Rows of a step.
        available: Bytes that a process may fill.
        memory_of: Memory of one process at the smallest micro-batch, by layout and recomputation.

    Returns:
        The first layout with which the model fits, without recomputing, then with; where none does, the one that takes
        the least memory, with `fits` false.

    Raises:
        PlanError: What is pinned cannot be; the message says what could.
    """
    every = layouts(machine, world, model)
    candidates = [pair for pair in every if rows % pair[0].data_size == 0]
    # Layers are split to save memory; that fewer then read rows of their own is no reason to split them.
    if not candidates or (machine.parallel == "auto" and every[0] not in candidates):
        raise _unshared(rows, [layout for layout, _ in every])
    for layout, _ in candidates:
        check_layout(layout, world, model)
    pinned = machine.recompute
    policies: Sequence[Recompute] = (
        (pinned,) if pinned != "auto" else POLICIES if model.recomputes else POLICIES[:1]
    )
    tried = [(layout, why, policy) for policy in policies for layout, why in candidates]
    fitting = next((each for each in tried if memory_of(each[0], each[2]).total <= available), None)
    layout, why, policy = fitting or min(tried, key=lambda each: memory_of(each[0], each[2]).total)
    if machine.offload and world.device == "cpu":
        raise PlanError(
            "machine.offload: on a processor weights are in the host's memory anyway",
            hint="machine.offload=false",
        )
    if machine.offload and layout.shard == 1:
        raise PlanError(
            "machine.offload keeps shards on the host, and nothing is sharded here",
            hint="machine.parallel=fsdp with two processes or more, or machine.offload=false",
        )
    return Sharing(
        layout=layout,
        recompute=policy,
        memory=memory_of(layout, policy),
        fits=fitting is not None,
        why=_reason(why, len(candidates), fits=fitting is not None),
        why_recompute=_why_policy(policy, fits=fitting is not None) if pinned == "auto" else "",
        notes=tuple(_notes(machine, layout, world)),
    )


def layouts(machine: Machine, world: World, model: ModelShape) -> list[tuple[Layout, str]]:
    """The layouts to try in their order, each with its reason; one with no reason where it is pinned.

    Raises:
        PlanError: What is pinned does not come to the number of processes, or is not built.
    """
    wanted = machine.parallel
    if isinstance(wanted, Parallel):
        return _pinned(wanted, world)
    if wanted == "ddp":
        return [(Layout(replicate=world.size), "")]
    if wanted == "fsdp":
        return [(Layout(shard=world.size), "")]
    if wanted == "hsdp":
        return [(_hybrid(world), "")]
    return list(_by_itself(world, model))


def _hybrid(world: World) -> Layout:
    """Those of a machine share, machines hold copies."""
    nodes = world.nodes if world.size % world.nodes == 0 else 1
    return Layout(replicate=nodes, shard=world.size // nodes)


def _by_itself(world: World, model: ModelShape) -> Iterator[tuple[Layout, str]]:
    """From the least sharing to the most."""
    why = "the whole model fits on each device" if world.size > 1 else "there is one process"
    yield Layout(replicate=world.size), why
    if world.device not in SHARDS_BY_ITSELF or world.size == 1:
        return
    if world.nodes > 1 and world.size % world.nodes == 0:
        yield (
            _hybrid(world),
            "the model does not fit on one device: those of a machine share it, machines hold copies",
        )
    yield Layout(shard=world.size), "the model fits only where all devices share it"
    if world.device not in SPLITS_BY_ITSELF:
        return
    for tensor in splits(model, min(world.local, world.size)):
        if tensor > 1 and world.size % tensor == 0 and world.local % tensor == 0:
            why = f"the model fits only where layers are split over {tensor} devices of a machine too"
            yield Layout(shard=world.size // tensor, tensor=tensor), why


def splits(model: ModelShape, at_most: int) -> list[int]:
    """Into how many parts the layers of a model can be split: divisors of its heads and of the MLP's width."""
    if not model.num_heads or model.num_encoder_layers:
        return [1]
    widths = (model.num_kv_heads, model.intermediate_size)
    return [n for n in divisors(model.num_heads) if n <= at_most and all(width % n == 0 for width in widths)]


def _pinned(wanted: Parallel, world: World) -> list[tuple[Layout, str]]:
    """Numbers written out; those that are `auto` are what the others leave."""
    if wanted.pipeline > 1:
        raise PlanError(
            "machine.parallel.pipeline: layers are not dealt out to processes: a model would have to be cut by hand "
            "for each architecture, and its loss reads the embeddings that the first part would hold",
            hint=f"machine.parallel={{shard: {world.size}}} shares every layer instead",
        )
    given = {"tensor": wanted.tensor, "expert": wanted.expert, "context": wanted.context}
    product = wanted.tensor * wanted.expert * wanted.context
    if world.size % product:
        raise _not_the_world(wanted, world)
    left = world.size // product
    replicate, shard = wanted.replicate, wanted.shard
    if replicate == "auto" and shard == "auto":
        if world.device not in SHARDS_BY_ITSELF:
            return [(Layout(replicate=left, **given), "")]
        hybrid = _hybrid(World(left, max(1, world.local // product), world.nodes, world.device))
        made = [
            Layout(replicate=left, **given),
            Layout(hybrid.replicate, hybrid.shard, **given),
            Layout(shard=left, **given),
        ]
        return [(layout, "") for layout in dict.fromkeys(made)]
    if replicate == "auto":
        replicate = left // shard  # type: ignore[operator]
    elif shard == "auto":
        shard = left // replicate
    layout = Layout(replicate=replicate, shard=shard, **given)  # type: ignore[arg-type]
    if layout.world_size != world.size:
        raise _not_the_world(wanted, world)
    return [(layout, "")]


def _not_the_world(wanted: Parallel, world: World) -> PlanError:
    numbers = {name: value for name, value in wanted if value not in (1, "auto")}
    said = ", ".join(f"{name}: {value}" for name, value in numbers.items())
    product = math.prod(numbers.values())
    return PlanError(
        f"machine.parallel: {{{said}}} does not come to {world.size} processes",
        hint="the product of all numbers is the number of processes; leave `replicate` or `shard` out, and it is what "
        f"the others leave; or --processes {product}",
    )


def check_layout(layout: Layout, world: World, model: ModelShape) -> None:
    """Whether model and devices can be shared so.

    Raises:
        PlanError: They cannot; the message says what could.
    """
    if layout.tensor > 1 and layout.tensor not in splits(model, layout.tensor):
        known = ", ".join(map(str, splits(model, world.size)))
        raise PlanError(
            f"machine.parallel.tensor: {layout.tensor} processes cannot share this model's {model.num_heads} heads, "
            f"{model.num_kv_heads} key heads and an MLP of {model.intermediate_size}",
            hint=f"numbers that fit: {known}"
            if model.num_heads
            else "machine.parallel=fsdp shares any model",
        )
    if layout.context > 1:
        raise PlanError(
            "machine.parallel.context: a row is computed by one process; torch shares rows by an attention that it has "
            "on NVIDIA GPUs only, and not for packed documents or the kernels of machine.attention",
            hint="machine.recompute=full, machine.micro_batch=1 or machine.parallel.tensor make room for longer rows",
        )
    if layout.expert > 1 and (not model.num_experts or model.num_experts % layout.expert):
        why = f"this model has {model.num_experts}" if model.num_experts else "this model has none"
        raise PlanError(
            f"machine.parallel.expert: {layout.expert} processes cannot share the experts of a layer: {why}",
            hint="machine.parallel.expert=1",
        )


WHOLE_MATRICES = {
    "muon": "its update is made of whole matrices",
    "adafactor": "its memory is of whole rows and columns",
    "adamw8bit": "its moments are kept in blocks of 256 numbers, which shards would cut",
}
"""Optimizers that are not made for shards, and why."""


def check_shared(layout: Layout, section: Section) -> None:
    """See that what is trained can be, where no process holds the whole model.

    Raises:
        PlanError: It cannot; says why and what would work.
    """
    if not layout.is_sharded:
        return
    spec, hint = section.train, "machine.parallel=ddp"
    why = WHOLE_MATRICES.get(spec.optim.name)
    if why is not None:
        raise PlanError(
            f"train.optim.name is {spec.optim.name}, and no process holds the whole model: {why}",
            hint=f"{hint}, or another optimizer such as adamw",
        )
    if spec.keep_zeros:
        raise PlanError(
            "train.keep_zeros: which weights stay zero is marked in whole matrices, and no process holds the whole "
            "model",
            hint=hint,
        )
    if spec.quantized is not None and layout.tensor > 1:
        raise PlanError(
            "train.quantized rounds whole rows of a matrix, and machine.parallel.tensor splits them",
            hint=hint,
        )


def _unshared(rows: int, tried: Sequence[Layout]) -> PlanError:
    """No layout has a number of readers that divides the rows."""
    size = tried[0].data_size
    below, above = rows - rows % size, rows - rows % size + size
    batches = " or ".join(f"{number} samples" for number in (below, above) if number)
    fits = [number for number in divisors(rows) if number <= 4 * size]
    return PlanError(
        f"a batch of {rows} rows cannot be shared equally by {size} processes",
        hint=f"batches that fit: {batches}; processes that fit: {', '.join(map(str, fits))}",
    )


def setting_of(layout: Layout) -> str | dict[str, int]:
    """A layout as a recipe has it: `ddp`, `fsdp`, or its numbers."""
    if not layout.is_sharded:
        return "ddp"
    if layout.shard == layout.world_size:
        return "fsdp"
    return {name: number for name, number in layout.to_dict().items() if number > 1}


def words_of(layout: Layout) -> str:
    """The same as text."""
    setting = setting_of(layout)
    if isinstance(setting, str):
        return setting
    return "{" + ", ".join(f"{name}: {number}" for name, number in setting.items()) + "}"


def what_would_fit(world: World, model: ModelShape, available: int, memory_of: MemoryOf) -> str:
    """The fewest devices of the same kind that could hold the model, in words; empty where no number could."""
    local = max(8, world.local)
    for size in (2**power for power in range(1, 13)):
        larger = World(size, min(size, local), max(1, size // local), world.device)
        for policy in POLICIES if model.recomputes else POLICIES[:1]:
            for layout, _ in _by_itself(larger, model):
                if memory_of(layout, policy).total <= available:
                    again = "" if policy == "none" else f", recompute: {policy}"
                    return f"{size} such devices, parallel: {words_of(layout)}{again}"
    return ""


def _reason(why: str, choices: int, *, fits: bool) -> str:
    """Why a layout was chosen."""
    return why if fits or choices == 1 else "nothing fits; this takes the least memory"


def _why_policy(policy: Recompute, *, fits: bool) -> str:
    if policy == "none":
        return "activations fit" if fits else "there is no block to compute again"
    kept = "their inputs" if policy == "full" else "matrix products and attention"
    return f"activations do not fit: of blocks only {kept} are kept"


def _notes(machine: Machine, layout: Layout, world: World) -> Iterator[str]:
    if machine.parallel == "hsdp" and layout.replicate == 1:
        yield "machine.parallel is hsdp, but there is one machine: all its processes share the model"
    if layout.tensor > 1:
        yield (
            "layers are split by heads: dropout of attention weights, if there is any, draws other masks than one "
            "process would"
        )
    if layout.tensor > world.local:
        yield (
            f"layers are split over {layout.tensor} processes, more than the {world.local} of a machine: every layer "
            "waits for the network"
        )
