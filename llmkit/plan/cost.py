"""Time and money as ranges, term by term: what is computed, what is sent, what the optimizer touches.

Bytes of collectives are those of a ring. What is sent while the backward pass computes can be hidden behind it, wholly
at best and not at all at worst: that, and how well a device is used, is what makes the range.

**Source**: Patarasu and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations", 2009 (ring);
Rajbhandari et al., "ZeRO", 2020, section 7 (what sharding sends); Shoeybi et al., "Megatron-LM", 2019, section 3
(four all-reductions a layer).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmkit.hardware import Hardware
from llmkit.plan.communication import bytes_per_step
from llmkit.plan.estimate import training_rate
from llmkit.plan.memory import Recompute, block_matrices, held_parameters, split_matrices
from llmkit.plan.parallel import Layout
from llmkit.plan.shape import ModelShape
from llmkit.recipe.machine import Communication

USUAL_NETWORK = 12.5e9
"""Bytes a second between machines where nothing is known: 100 Gbit/s."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Step:
    """The work of one optimizer step.

    Attributes:
        model: The model's shape.
        num_trained: Weights that learn.
        flops: Of all rows of a step, nothing recomputed.
        recompute: What the backward pass computes again.
        layout: Who shares what.
        accumulation: Micro-batches of a process.
        micro_tokens: Tokens of one.
        precision: `fp32`, `bf16` or `fp8`.
        state_bytes: What the optimizer remembers of a parameter.
        communication: How gradients travel.
        shapes: Of all that learns, which say what PowerSGD sends; None: not known, and it is taken to send all.
    """

    model: ModelShape
    num_trained: int
    flops: float
    recompute: Recompute
    layout: Layout
    accumulation: int
    micro_tokens: int
    precision: str
    state_bytes: float
    communication: Communication
    shapes: Sequence[Sequence[int]] | None = None


def seconds_of_step(step: Step, hardware: Hardware, nodes: int) -> Mapping[str, Range]:
    """Seconds of each part of a step, shortest and longest; empty where the device is unknown.

    `compute` is the model's arithmetic; `gradients`, `gathers` and `layers` are what processes send for replicated,
    sharded and split weights; `optimizer` is its memory, read and written.
    """
    size = step.layout.world_size
    rate = training_rate(hardware, step.model, world_size=size, precision=step.precision, nodes=nodes)
    if rate is None:
        return {}
    flops = step.flops * work_again(step.model, step.recompute)
    found: dict[str, Range] = {"compute": (flops / rate[1], flops / rate[0])}
    found |= {
        name: (seconds, seconds) for name, seconds in _sending(step, hardware, nodes).items() if seconds
    }
    if hardware.memory_bandwidth:
        held = held_parameters(step.model, step.layout) * step.num_trained / step.model.num_parameters
        moved = held * (12 + 2 * step.state_bytes)  # weights and its memory there and back, gradients once
        found["optimizer"] = (moved / hardware.memory_bandwidth,) * 2
    return found


def whole_step(parts: Mapping[str, Range]) -> Range | None:
    """A step: at best all that is sent is hidden behind the arithmetic, at worst nothing is."""
    if not parts:
        return None
    sent = sum(parts[name][1] for name in ("gradients", "gathers", "layers") if name in parts)
    own = parts.get("optimizer", (0.0, 0.0))
    return max(parts["compute"][0], sent) + own[0], parts["compute"][1] + sent + own[1]


def work_again(model: ModelShape, recompute: Recompute) -> float:
    """How many times the arithmetic of a step is done.

    `full` computes the blocks' forward pass twice, which is a third of their work; what `selective` computes again is
    hardly arithmetic.
    """
    if recompute != "full" or not model.num_matmul_parameters:
        return 1.0
    return 1 + block_matrices(model) / model.num_matmul_parameters / 3


def bytes_sent(step: Step) -> Mapping[str, float]:
    """Bytes that one process sends in a step, by what for.

    Of each micro-batch, blocks are gathered for the forward pass and again for the backward in the working precision,
    what is not in blocks once in fp32; gradients are shared out in fp32.
    """
    layout, model = step.layout, step.model
    learns = step.num_trained / model.num_parameters
    width = 4 if step.precision == "fp32" else 2
    blocks, rest = split_matrices(model, layout), model.num_parameters - block_matrices(model)
    gathered = 2 * width * blocks + 4 * rest + 4 * learns * (blocks + rest)
    activations = step.micro_tokens * model.hidden_size * width
    return {
        "gradients": bytes_per_step(step.communication, _sent_shapes(step), layout.replicate),
        "gathers": step.accumulation * _ring(layout.shard) * gathered,
        "layers": 4 * model.num_layers * step.accumulation * 2 * _ring(layout.tensor) * activations,
    }


def _sent_shapes(step: Step) -> Sequence[Sequence[int]]:
    """Shapes of the gradients that copies of the model send each other."""
    if step.shapes is not None and not step.layout.is_sharded:
        return step.shapes
    held = held_parameters(step.model, step.layout)
    return [(round(held * step.num_trained / step.model.num_parameters),)]


def _ring(processes: int) -> float:
    """Share of the data that each of so many sends to pass all of it round."""
    return (processes - 1) / processes


def _sending(step: Step, hardware: Hardware, nodes: int) -> Mapping[str, float]:
    """Seconds of each kind of sending, over the slowest link on its way."""
    if hardware.link is None and nodes == 1:
        return {}
    layout, sent = step.layout, bytes_sent(step)
    local = max(1, layout.world_size // nodes)
    network = hardware.network or USUAL_NETWORK
    link = hardware.link or math.inf  # processes of one machine without devices pass memory on
    inner = layout.shard * layout.tensor
    # One ring over all devices passes a machine's door once; rings between machines share it.
    over = min(link, network)
    between = min(link, network / min(local, inner))
    speeds = {
        "gradients": link if nodes == 1 else between,
        "gathers": link if inner <= local else over,
        "layers": link if layout.tensor <= local else over,
    }
    return {name: sent[name] / speeds[name] for name in sent}


def cost_of(seconds: Range | None, devices: int, hardware: Hardware) -> Range | None:
    """Dollars of a run, low and high; None where time or price are unknown."""
    if seconds is None or hardware.price is None:
        return None
    hours = [devices * each / 3600 for each in seconds]
    return hours[0] * hardware.price[0], hours[1] * hardware.price[1]
