"""`make_plan`: every `auto` of a recipe decided for this hardware, each with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.assemble import Decided, Duration, assemble, duration_of
from llmkit.plan.batch import PlanError, Share, divisors, largest_divisor, rows_of_batch, share_rows
from llmkit.plan.choices import (
    MEMORY_SHARE,
    Draft,
    assumed_attention,
    begin_draft,
    check_compile,
    choose_precision,
    choose_sharing,
    choose_world,
    note_shortage,
)
from llmkit.plan.communication import matrices_of, outer_bytes
from llmkit.plan.describe import seconds_text
from llmkit.plan.estimate import COMPILE_COST_S, compile_saves, flops_per_token
from llmkit.plan.memory import CPU_PROCESS_BYTES, Memory, Recompute, held_parameters, training_memory
from llmkit.plan.parallel import Layout
from llmkit.plan.plan import DataFacts, Plan
from llmkit.plan.rows import layout_of
from llmkit.plan.shape import ModelShape
from llmkit.plan.sharing import Sharing, World
from llmkit.plan.taught import cache_note, lines_of_text, plan_cache
from llmkit.plan.tpu import check_tpu
from llmkit.recipe.objectives import RowLayout
from llmkit.recipe.schema import Pretrain, Recipe, Section
from llmkit.registry import goal_of

CPU_MICRO_BATCH_TOKENS = 2048
"""Tokens a processor handles at a time: enough for fast matrix products, not too much for its caches."""

FEW_STEPS = 50
"""Optimizer steps below which a run is most likely a mistake."""

MANY_EPOCHS = 4
"""Passes over the data from which repetition starts to cost (Source: Muennighoff et al. 2023)."""


def make_plan(
    recipe: Recipe,
    hardware: Hardware,
    data: DataFacts,
    *,
    vocab_size: int,
    model: ModelShape,
    world_size: int | None = None,
    teacher: ModelShape | None = None,
    generator: ModelShape | None = None,
) -> Plan:
    """Turn what the recipe asks for into numbers for this machine.

    Args:
        recipe: The recipe; it must have a `pretrain` section.
        hardware: What there is to compute with.
        data: What the training data holds.
        vocab_size: Entries of the tokenizer.
        model: The model's shape.
        world_size: Processes where something else has fixed them (`--processes`, torchrun, Slurm); it wins
            over the recipe.
        teacher: The model that `distil` learns from, where its shape is known.
        generator: What ELECTRA trains beside the model, with the weights that are its own.

    Raises:
        PlanError: The batch cannot be shared, a pinned micro-batch does not divide it, the text is shorter
            than a row, or the model cannot hold the vocabulary or the context. The message says what would
            fit.
    """
    if recipe.pretrain is None:
        raise PlanError("the recipe has no `pretrain` section, so there is nothing to plan")
    wanted, context = recipe.pretrain, recipe.pretrain.model.context
    layout = layout_of(wanted)
    _check_model(model, vocab_size, context, layout.decoder)
    num_rows = rows_of_data(data, layout, context)
    check_tpu(recipe.machine, hardware, wanted, model)
    draft = begin_draft(recipe.machine, hardware, wanted)
    rows, note = rows_of_batch(wanted.train.batch, context)
    draft.notes += [note] if note else []
    world = choose_world(draft, rows, world_size)
    precision = choose_precision(draft)
    parts = _Parts(
        wanted, model, generator, None if _asked_once(wanted) else teacher, layout.decoder, precision
    )
    sharing, share, memory = _choose_shares(draft, parts, rows, world)
    flops = flops_per_token(model, context, layout.decoder)
    flops += flops_per_token(generator, context) if generator is not None else 0
    decided = Decided(
        wanted=wanted,
        hardware=hardware,
        draft=draft,
        world=world,
        sharing=sharing,
        precision=precision,
        model=model,
        vocab_size=vocab_size,
        num_trained=model.num_parameters,
        rows=rows,
        row_tokens=context,
        num_rows=num_rows,
        accumulation=share.gradient_accumulation_steps,
        micro_tokens=share.micro_batch_size * context,
        flops_per_token=flops,
        memory=memory,
        memory_of=lambda how: parts.memory(draft, sharing.layout, how, share.micro_batch_size),
        shapes=matrices_of(model),
    )
    return _whole(decided, data, share.micro_batch_size, teacher)


def _whole(decided: Decided, data: DataFacts, micro_batch: int, teacher: ModelShape | None) -> Plan:
    """The plan of pre-training out of its parts."""
    draft, wanted, duration = decided.draft, decided.wanted, duration_of(decided)
    assert isinstance(wanted, Pretrain)
    compiled = _choose_compile(draft, decided.model, decided.precision, duration.low, duration.high)
    compiled = compiled and not _reads_layers(draft, wanted)
    taught = plan_cache(
        wanted,
        outputs=decided.vocab_size,
        num_rows=decided.num_rows,
        lines_per_row=lines_of_text(wanted),
        rows_per_step=decided.rows,
        num_steps=decided.steps,
    )
    draft.notes += _remarks(data, decided, duration)
    draft.notes += _prompts_without_gaps(wanted)
    draft.notes += teacher_notes(wanted, taught, teacher)
    return assemble(
        decided,
        duration,
        compile=compiled,
        attention=draft.machine.attention,
        micro_batch_size=micro_batch,
        teacher_cache=taught,
        data={**_facts(data), "targets_per_row": lines_of_text(wanted)},
    )


def teacher_notes(wanted: Section, cache: Mapping[str, Any], teacher: ModelShape | None) -> list[str]:
    """What is to be known of a teacher whose memory or time is not in the figures."""
    if wanted.distil is None or (teacher is not None and not cache):
        return []
    return [cache_note(cache)]


def _facts(data: DataFacts) -> dict[str, Any]:
    return {
        "tokens": data.num_tokens,
        "documents": data.num_documents,
        "bytes": data.num_bytes,
        "held_out_tokens": data.num_held_out_tokens,
        "exact": data.exact,
    }


def _asked_once(wanted: Section) -> bool:
    """Whether the teacher is asked before training, which then does without it."""
    return wanted.distil is not None and wanted.distil.cache is not None


@dataclass(frozen=True)
class _Parts:
    """The networks of a run.

    Attributes:
        wanted: The recipe's section.
        model: What is trained.
        generator: What ELECTRA trains beside it.
        teacher: What it learns from.
        decoder: Positions that a decoder reads.
        precision: Of the matrix products.
    """

    wanted: Pretrain
    model: ModelShape
    generator: ModelShape | None
    teacher: ModelShape | None
    decoder: int
    precision: str

    def memory(self, draft: Draft, layout: Layout, recompute: Recompute, micro_batch: int) -> Memory:
        """Of one process."""
        device = draft.hardware.device
        given: dict[str, Any] = {
            "context": self.wanted.model.context,
            "micro_batch": micro_batch,
            "precision": self.precision,
            "attention": assumed_attention(draft.hardware, draft.machine.attention),
            "state_bytes": draft.state_bytes,
            "layout": layout,
            "recompute": recompute,
            "offload": draft.machine.offload,
            "zeros": self.wanted.train.keep_zeros,
            "device": device,
        }
        process = CPU_PROCESS_BYTES if device == "cpu" else 0
        memory = training_memory(self.model, decoder=self.decoder, process=process, **given)
        if self.generator is not None:
            memory = memory + training_memory(self.generator, **given)
        learning = self.model.num_parameters + (self.generator.num_parameters if self.generator else 0)
        memory = memory.plus(buffers=outer_bytes(draft.machine.communication, learning, layout))
        return memory.plus(teacher=4 * held_parameters(self.teacher, layout)) if self.teacher else memory


def _check_model(model: ModelShape, vocab_size: int, context: int, decoder: int) -> None:
    if model.max_length is not None and context > model.max_length:
        raise PlanError(
            f"model.context is {context} tokens, but this model reads at most {model.max_length}",
            hint=f"pretrain.model.context={model.max_length}",
        )
    if model.max_length is not None and decoder > model.max_length:
        raise PlanError(
            f"the decoder writes up to {decoder} tokens a row, but this model at most {model.max_length}",
            hint="take less out of the text (pretrain.span.ratio), or t5, which has no such limit",
        )
    if vocab_size > model.vocab_size:
        raise PlanError(
            f"the tokenizer has {vocab_size:,} entries, but the model's embedding only {model.vocab_size:,}",
            hint=f"set vocab_size: {vocab_size} in model.config, or use the model's own tokenizer",
        )


def rows_of_data(data: DataFacts, layout: RowLayout, context: int) -> int:
    """Full rows of one pass; each source is cut by itself."""
    sizes = [source.num_tokens for source in data.per_source] or [data.num_tokens]
    rows = sum(max(0, size - layout.overlap) // layout.stride for size in sizes)
    if rows or not data.exact:
        return max(1, rows)  # a guess from file sizes refuses nothing: text may be compressed, or far away
    raise PlanError(
        f"the training text has {max(sizes):,} tokens, fewer than the {layout.stride + layout.overlap:,} that a row of "
        f"context {context:,} needs",
        hint="a smaller pretrain.model.context, or more text",
    )


def _choose_shares(draft: Draft, parts: _Parts, rows: int, world: World) -> tuple[Sharing, Share, Memory]:
    """Who shares the model, the micro-batch, and its memory."""
    sharing, available = choose_sharing(
        draft, world, parts.model, rows, lambda layout, recompute: parts.memory(draft, layout, recompute, 1)
    )
    readers = sharing.layout.data_size
    pinned = draft.machine.micro_batch
    if pinned != "auto":
        share = share_rows(rows, readers, pinned)
    else:
        share = _choose_micro_batch(draft, parts, sharing, rows, available)
    memory = parts.memory(draft, sharing.layout, sharing.recompute, share.micro_batch_size)
    note_shortage(draft, memory, available, world)
    return sharing, share, memory


def _choose_micro_batch(draft: Draft, parts: _Parts, sharing: Sharing, rows: int, available: int) -> Share:
    """As many rows at a time as fit, or as are fast."""
    per_reader = rows // sharing.layout.data_size
    fits = [
        size
        for size in divisors(per_reader)
        if parts.memory(draft, sharing.layout, sharing.recompute, size).total <= MEMORY_SHARE * available
    ]
    at_most, why = _micro_batch_limit(draft.hardware, max(fits, default=1), parts.wanted.model.context)
    share = share_rows(rows, sharing.layout.data_size, largest_divisor(per_reader, at_most))
    if share.micro_batch_size == per_reader:
        why = "all rows of a process at once"
    else:
        why = f"{why}, as far as it divides {per_reader} rows"
    draft.choose("micro_batch", share.micro_batch_size, why)
    return share


def _micro_batch_limit(hardware: Hardware, fits: int, context: int) -> tuple[int, str]:
    """At most so many rows at a time, and why. On GPUs a power of two, which kernels like best."""
    if hardware.device != "cpu":
        return 1 << (fits.bit_length() - 1), f"the most that fits {MEMORY_SHARE:.0%} of the memory"
    good = max(1, CPU_MICRO_BATCH_TOKENS // context)
    if fits < good:
        return fits, f"the most that fits {MEMORY_SHARE:.0%} of the memory"
    return good, f"about {CPU_MICRO_BATCH_TOKENS:,} tokens at a time are fast on a processor"


def _choose_compile(
    draft: Draft, model: ModelShape, precision: str, low: float | None, high: float | None
) -> bool:
    """Whether to compile: where it works, and the run is long enough to win back what compiling costs."""
    pinned = draft.machine.compile
    if pinned != "auto":
        return bool(pinned)
    device = draft.hardware.device
    if device not in COMPILE_COST_S:
        compiled, why = False, f"torch.compile is not used on {device}"
    elif not model.compiles:
        compiled, why = False, "torch's recurrent cells are kernels of their own"
    elif not draft.hardware.compiler:
        compiled, why = False, "torch.compile needs a C++ compiler, and none is on PATH"
    elif low is None or high is None:
        compiled, why = False, "unknown device: the run's length cannot be estimated"
    else:
        saved, cost = compile_saves(device, precision, (low * high) ** 0.5), COMPILE_COST_S[device]
        compiled = saved > cost
        why = (
            f"compiling costs about {seconds_text(cost)} and would save about {seconds_text(saved)} of this run, an "
            "estimate"
        )
    draft.choose("compile", compiled, why)
    return compiled


def _reads_layers(draft: Draft, wanted: Pretrain) -> bool:
    """Whether a teacher's layers are compared with the model's, which a compiled model does not show.

    Raises:
        PlanError: They are, and the recipe pins compiling.
    """
    distil = wanted.distil
    if distil is None or not (distil.hidden or distil.attention):
        return False
    check_compile(draft, wanted)
    draft.choose("compile", False, "a teacher's layers are compared with the model's")
    return True


def _prompts_without_gaps(wanted: Pretrain) -> list[str]:
    """A model that fills gaps has nothing to say of a text that has none."""
    if goal_of(wanted.objective).model not in ("masked", "pairs"):
        return []
    return [
        f"the prompt {prompt!r} has no [MASK], so nothing is shown for it"
        for prompt in wanted.prompts
        if "[MASK]" not in prompt and "<|mask|>" not in prompt
    ]


def _remarks(data: DataFacts, decided: Decided, duration: Duration) -> list[str]:
    """What a person should know before spending the time."""
    remarks = []
    epochs, rows, num_rows = decided.epochs, decided.rows, decided.num_rows
    if not data.exact:
        remarks.append("token counts are estimated from file sizes; the run counts exactly")
    if epochs is not None and epochs > MANY_EPOCHS:
        remarks.append(
            f"every row is read {epochs:.1f} times; beyond about {MANY_EPOCHS} there is little to gain"
        )
    if decided.steps is not None and decided.steps < FEW_STEPS:
        remarks.append(
            f"under {FEW_STEPS} steps teach a model next to nothing: a smaller train.batch or a longer train.length "
            "gives more"
        )
    if rows > num_rows:
        remarks.append(f"one step holds {rows} rows, but the data only {num_rows}: rows repeat within a step")
    if not duration.parts:
        remarks.append("this device's speed is not known, so the duration is not estimated")
    return remarks
