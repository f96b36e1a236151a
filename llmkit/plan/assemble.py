"""What every plan says once its parts are decided, whatever is learned: time, cost, disk, when to save and measure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.choices import (
    Draft,
    activations_by_policy,
    choose_background_save,
    disk_of,
    intervals,
    likely_seconds,
)
from llmkit.plan.communication import own_bytes
from llmkit.plan.cost import Step, cost_of, seconds_of_step, whole_step
from llmkit.plan.length import resolve_length
from llmkit.plan.memory import Memory, Recompute
from llmkit.plan.plan import Plan
from llmkit.plan.shape import ModelShape
from llmkit.plan.sharing import Sharing, World
from llmkit.recipe.schema import Section


@dataclass(frozen=True)
class Decided:
    """The parts of a plan.

    Attributes:
        wanted: The recipe's section.
        hardware: What there is to compute with.
        draft: Choices and notes so far.
        world: How many processes, and where.
        sharing: Who shares the model.
        precision: Of the matrix products.
        model: What is trained.
        vocab_size: Entries of the tokenizer.
        num_trained: Of its weights, those that learn.
        rows: Of a step.
        row_tokens: Tokens of a row; on average, where rows have many lengths.
        num_rows: Of one pass over the data.
        accumulation: Micro-batches of a process and step.
        micro_tokens: Tokens of a micro-batch.
        flops_per_token: Of forward and backward pass.
        memory: Of one process.
        memory_of: The same under another policy of recomputing.
        shapes: Of the matrices that learn, where they are known.
    """

    wanted: Section
    hardware: Hardware
    draft: Draft
    world: World
    sharing: Sharing
    precision: str
    model: ModelShape
    vocab_size: int
    num_trained: int
    rows: int
    row_tokens: int
    num_rows: int
    accumulation: int
    micro_tokens: int
    flops_per_token: int
    memory: Memory
    memory_of: Callable[[Recompute], Memory]
    shapes: Sequence[Sequence[int]] | None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.row_tokens

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where a time is the length."""
        return resolve_length(
            self.wanted.train.length,
            tokens_per_step=self.tokens,
            rows_per_step=self.rows,
            num_rows_per_epoch=self.num_rows,
        )

    @property
    def epochs(self) -> float | None:
        """Passes over the data; None where a time is the length."""
        steps = self.steps
        return steps * self.rows / self.num_rows if steps else None


@dataclass(frozen=True)
class Duration:
    """How long a run will take.

    Attributes:
        parts: Shortest and longest seconds of each part of a step; empty where the device is unknown.
        limit_s: The time that the recipe gives it, where that is its length.
        low: Seconds at best; None where they are not known.
        high: Seconds at worst.
    """

    parts: Mapping[str, tuple[float, float]]
    limit_s: float | None
    low: float | None
    high: float | None

    @property
    def range(self) -> tuple[float, float] | None:
        """Seconds at best and at worst; None where they are not known."""
        return (self.low, self.high) if self.low is not None and self.high is not None else None


def duration_of(decided: Decided) -> Duration:
    """Time from the arithmetic, what is sent and what memory moves; see `cost`."""
    draft = decided.draft
    step = Step(
        model=decided.model,
        num_trained=decided.num_trained,
        flops=float(decided.flops_per_token * decided.tokens),
        recompute=decided.sharing.recompute,
        layout=decided.sharing.layout,
        accumulation=decided.accumulation,
        micro_tokens=decided.micro_tokens,
        precision=decided.precision,
        state_bytes=draft.state_bytes,
        communication=draft.machine.communication,
        shapes=decided.shapes,
    )
    parts = seconds_of_step(step, decided.hardware, decided.world.nodes)
    limit_s = float(decided.wanted.train.length.value) if decided.steps is None else None
    low, high = likely_seconds(whole_step(parts), decided.steps, limit_s)
    return Duration(parts, limit_s, low, high)


def assemble(decided: Decided, duration: Duration, **own: Any) -> Plan:
    """The plan.

    Args:
        decided: Its parts.
        duration: Of `duration_of`.
        own: Fields that only pre-training or only fine-tuning decides.
    """
    draft, layout, hardware, steps = decided.draft, decided.sharing.layout, decided.hardware, decided.steps
    common = int((4 + draft.state_bytes) * decided.num_trained)
    most, apiece = own_bytes(draft.machine.communication, decided.num_trained, draft.state_bytes, layout)
    saved, mine = common + apiece, common // layout.shard // layout.tensor + most
    background, memory = choose_background_save(
        draft,
        decided.memory,
        mine,
        decided.world.local,
        writers=decided.world.local if most or layout.is_sharded else 1,
    )
    timing = intervals(decided.wanted, steps, decided.rows, decided.row_tokens, decided.num_rows)
    return Plan(
        device=hardware.device,
        world_size=decided.world.size,
        precision=decided.precision,
        context=decided.wanted.model.context,
        rows_per_step=decided.rows,
        gradient_accumulation_steps=decided.accumulation,
        tokens_per_step=decided.tokens,
        num_steps=steps,
        length_seconds=duration.limit_s,
        warmup_steps=timing["warmup_steps"][0],
        checkpoint_every=timing["checkpoint_every"][0],
        keep_every=timing["keep_every"][0],
        eval_every=timing["eval_every"][0],
        deferred={name: amount for name, (resolved, amount) in timing.items() if resolved is None},
        background_save=background,
        num_rows_per_epoch=decided.num_rows,
        num_epochs=decided.epochs,
        vocab_size=decided.vocab_size,
        num_parameters=decided.model.num_parameters,
        flops_per_token=decided.flops_per_token,
        memory=memory,
        seconds_low=duration.low,
        seconds_high=duration.high,
        checkpoint_bytes=saved,
        choices=draft.choices,
        notes=tuple(draft.notes),
        nodes=decided.world.nodes,
        parallel=layout.to_dict(),
        recompute=decided.sharing.recompute,
        offload=draft.machine.offload,
        step_seconds=duration.parts,
        cost=cost_of(duration.range, decided.world.size, hardware),
        disk_bytes=disk_of(
            decided.wanted,
            saved,
            4 * decided.model.num_parameters,
            steps=steps,
            keep_every=timing["keep_every"][0],
        ),
        activations=activations_by_policy(decided.model, decided.memory_of),
        price=hardware.price,
        **own,
    )
