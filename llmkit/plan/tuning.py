"""The plan of fine-tuning on labelled rows, whose lengths are known when it is made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.assemble import Decided, assemble, duration_of
from llmkit.plan.batch import PlanError
from llmkit.plan.choices import (
    MEMORY_SHARE,
    Draft,
    begin_draft,
    check_compile,
    choose_precision,
    choose_sharing,
    choose_world,
    note_shortage,
)
from llmkit.plan.communication import outer_bytes
from llmkit.plan.estimate import flops_per_token
from llmkit.plan.make import teacher_notes
from llmkit.plan.memory import CPU_PROCESS_BYTES, Memory, Recompute, held_parameters, training_memory
from llmkit.plan.parallel import Layout
from llmkit.plan.plan import Plan
from llmkit.plan.shape import ModelShape
from llmkit.plan.sharing import Sharing
from llmkit.plan.taught import outputs_of, plan_cache
from llmkit.plan.tpu import check_tpu
from llmkit.recipe.schema import Finetune, Recipe
from llmkit.registry import TASKS

CPU_TOKENS = 2048
"""Tokens that a processor handles at a time: enough for fast matrix products, not too much for its caches."""

GPU_TOKENS = 32768
"""The same for a GPU at most, which is full by then."""


def plan_tuning(
    recipe: Recipe,
    hardware: Hardware,
    rows: Mapping[str, Any],
    *,
    vocab_size: int,
    model: ModelShape,
    packed: bool,
    num_trained: int,
    world_size: int | None = None,
    teacher: ModelShape | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Turn what the recipe asks for into numbers for this machine.

    Args:
        recipe: The recipe; it must have a `finetune` section.
        hardware: What there is to compute with.
        rows: What preparation found: `train` and `held_out`, each as of `data.samples.Measured.facts`, and more.
        vocab_size: Entries of the tokenizer.
        model: The model's shape.
        packed: Whether rows stand in one line.
        num_trained: Weights that learn.
        world_size: Processes where something else has fixed them.
        teacher: The model that `distil` learns from, where its shape is known.
        shapes: Of all that learns, where they are known.

    Raises:
        PlanError: The batch cannot be shared, or the model cannot hold the rows.
    """
    wanted = recipe.finetune
    assert wanted is not None
    train = rows["train"]
    _check_model(model, vocab_size, wanted.model.context)
    check_tpu(recipe.machine, hardware, wanted, model)
    draft = begin_draft(recipe.machine, hardware, wanted)
    _choose_kernels(draft, wanted)
    per_step = rows_of_step(wanted, int(train["num_rows"]), draft)
    world = choose_world(draft, per_step, world_size)
    precision = choose_precision(draft)
    mean = max(1, math.ceil(train["num_tokens"] / train["num_rows"]))
    parts = _parts_of(wanted, model, teacher, mean, precision, num_trained)
    sharing, available = choose_sharing(
        draft,
        world,
        model,
        per_step,
        lambda layout, recompute: parts.memory(draft, layout, recompute, wanted.model.context),
    )
    tokens, memory = _choose_micro_batch(draft, parts, wanted.model.context, sharing, available)
    note_shortage(draft, memory, available, world)
    decided = Decided(
        wanted=wanted,
        hardware=hardware,
        draft=draft,
        world=world,
        sharing=sharing,
        precision=precision,
        model=model,
        vocab_size=vocab_size,
        num_trained=num_trained,
        rows=per_step,
        row_tokens=mean,
        num_rows=int(train["num_rows"]),
        accumulation=max(1, math.ceil(per_step * mean / tokens / sharing.layout.data_size)),
        micro_tokens=tokens,
        flops_per_token=_flops_per_token(wanted, model, mean, num_trained),
        memory=memory,
        memory_of=lambda how: parts.memory(draft, sharing.layout, how, tokens),
        shapes=shapes,
    )
    return _whole(decided, rows, packed, teacher)


def _whole(decided: Decided, rows: Mapping[str, Any], packed: bool, teacher: ModelShape | None) -> Plan:
    """The plan of fine-tuning out of its parts."""
    draft, wanted, train = decided.draft, decided.wanted, rows["train"]
    assert isinstance(wanted, Finetune)
    taught = plan_cache(
        wanted,
        outputs=outputs_of(wanted, decided.vocab_size, len(rows.get("labels", ()))),
        num_rows=train["num_rows"],
        lines_per_row=train["num_targets"] / train["num_rows"],
        rows_per_step=decided.rows,
        num_steps=decided.steps,
    )
    draft.notes += teacher_notes(wanted, taught, teacher)
    machine, tokens = draft.machine, decided.micro_tokens
    made = assemble(
        decided,
        duration_of(decided),
        compile=machine.compile not in (False, "auto"),
        attention="sdpa" if machine.attention == "auto" else machine.attention,
        micro_batch_size=max(1, min(decided.rows, tokens // decided.row_tokens)),
        micro_batch_tokens=tokens,
        packed=packed,
        num_trained=decided.num_trained,
        rows=rows,
        teacher_cache=taught,
    )
    _check_stopping(wanted, int(rows["held_out"]["num_rows"]), made.eval_every, decided.steps)
    return made


def _choose_kernels(draft: Draft, wanted: Finetune) -> None:
    """Attention and compiling, which for rows of many lengths are always the same; and what is not there to measure.

    Raises:
        PlanError: The recipe pins compiling, and layers are compared with a teacher's.
    """
    if wanted.task == "seq2seq" and wanted.seq2seq.write and find_spec("sacrebleu") is None:
        draft.notes.append(
            "BLEU and chrF are not measured: they need sacrebleu (pip install 'llmkit[metrics]')"
        )
    if wanted.distil is not None:
        check_compile(draft, wanted)
    if draft.machine.attention == "auto":
        draft.choose("attention", "sdpa", "rows have many lengths")
    if draft.machine.compile == "auto":
        draft.choose("compile", False, "rows have many lengths, and each would be compiled anew")


def _flops_per_token(wanted: Finetune, model: ModelShape, mean: int, num_trained: int) -> int:
    """As of `flops_per_token`; weights that do not learn, as beside an adapter, have no gradients: 2 FLOPs less each.

    That the backward pass ends above the lowest layer that learns is not taken off.
    """
    whole = flops_per_token(model, mean, mean if model.num_encoder_layers else 0)
    still = max(0, model.num_parameters - num_trained) / model.num_parameters
    flops = whole - round(2 * model.num_matmul_parameters * still)
    if wanted.task == "dpo" and wanted.dpo.needs_reference:
        # A forward pass more; of KTO also one of each model over answers to other prompts.
        flops += whole * (3 if wanted.dpo.loss == "kto" else 1) // 3
    return flops


@dataclass(frozen=True)
class _Parts:
    """The networks of a run.

    Attributes:
        model: What is trained, with as many outputs as its head has.
        frozen: Models that do not learn: a reference, a teacher.
        mean: Tokens of a row, on average.
        precision: Of the matrix products.
        num_trained: Weights that learn.
        zeros: Whether zeros are marked.
    """

    model: ModelShape
    frozen: Sequence[ModelShape]
    mean: int
    precision: str
    num_trained: int
    zeros: bool

    def memory(self, draft: Draft, layout: Layout, recompute: Recompute, tokens: int) -> Memory:
        """Of one process, with so many tokens at a time."""
        device = draft.hardware.device
        memory = training_memory(
            self.model,
            context=self.mean,
            decoder=self.mean if self.model.num_encoder_layers else 0,
            micro_batch=max(1, tokens // self.mean),
            precision=self.precision,
            attention="sdpa",
            process=CPU_PROCESS_BYTES if device == "cpu" else 0,
            state_bytes=draft.state_bytes,
            num_trained=self.num_trained,
            layout=layout,
            recompute=recompute,
            offload=draft.machine.offload,
            zeros=self.zeros,
            many_lengths=True,
            device=device,
        )
        return memory.plus(
            teacher=sum(4 * held_parameters(each, layout) for each in self.frozen),
            buffers=outer_bytes(draft.machine.communication, self.num_trained, layout),
        )


def _parts_of(
    wanted: Finetune,
    model: ModelShape,
    teacher: ModelShape | None,
    mean: int,
    precision: str,
    num_trained: int,
) -> _Parts:
    """What is held: the model, with a head for the task, and those that do not learn."""
    frozen = [model] if _keeps_reference(wanted) else []
    if teacher is not None and wanted.distil is not None and wanted.distil.cache is None:
        frozen.append(teacher)
    # A head for a task gives a few numbers, not one for each entry of the vocabulary.
    writes = TASKS[wanted.task].model in ("causal", "seq2seq")
    outputs = model if writes else replace(model, vocab_size=1)
    return _Parts(outputs, frozen, mean, precision, num_trained, wanted.train.keep_zeros)


def _keeps_reference(wanted: Finetune) -> bool:
    """Whether a second model, as it was at first, is held: where an adapter learns, that is the first without it."""
    own = wanted.adapter is None or wanted.adapter.start is not None
    return wanted.task == "dpo" and wanted.dpo.needs_reference and own


def rows_of_step(wanted: Finetune, num_rows: int, draft: Draft) -> int:
    """Rows of one optimizer step.

    Raises:
        PlanError: The batch is given in tokens, or is no whole number.
    """
    batch = wanted.train.batch
    if batch.unit != "samples" or batch.value < 1 or batch.value != int(batch.value):
        raise PlanError(
            f"finetune.train.batch is {batch}: rows have many lengths, so a step is a whole number of them",
            hint="finetune.train.batch=32 samples",
        )
    if batch.value > num_rows:
        draft.notes.append(
            f"one step holds {batch.value:g} rows, but the data only {num_rows:,}: rows repeat"
        )
    return int(batch.value)


def _check_stopping(wanted: Finetune, held_out: int, eval_every: int | None, steps: int | None) -> None:
    """See that a run that is to stop early is measured while it trains.

    Raises:
        PlanError: It is not.
    """
    if wanted.stop_early is None:
        return
    if not held_out:
        own = wanted.validation is not None
        raise PlanError(
            "finetune.stop_early needs rows to measure on, and "
            + ("`validation` has none" if own else f"`held_out: {wanted.held_out:g}` keeps none"),
            hint="name other rows: finetune.validation.files=FILES" if own else "finetune.held_out=0.1",
        )
    never = wanted.eval.every.unit == "never"
    if never or (eval_every is not None and steps is not None and eval_every >= steps):
        why = "`never`" if never else f"{wanted.eval.every}, and the run is {steps:,} steps long"
        raise PlanError(
            f"finetune.stop_early needs evaluations while training, and `eval.every` is {why}",
            hint="finetune.eval.every=10%",
        )


def _check_model(model: ModelShape, vocab_size: int, context: int) -> None:
    if model.max_length is not None and context > model.max_length:
        raise PlanError(
            f"model.context is {context} tokens, but this model reads at most {model.max_length}",
            hint=f"finetune.model.context={model.max_length}",
        )
    if vocab_size > model.vocab_size:
        raise PlanError(
            f"the tokenizer has {vocab_size:,} entries, but the model's embedding only {model.vocab_size:,}",
            hint="use the model's own tokenizer: leave `tokenizer` out",
        )


def _choose_micro_batch(
    draft: Draft, parts: _Parts, context: int, sharing: Sharing, available: int
) -> tuple[int, Memory]:
    """Tokens of a micro-batch, those of some rows of full length, and its memory."""

    def memory_of(tokens: int) -> Memory:
        return parts.memory(draft, sharing.layout, sharing.recompute, tokens)

    pinned = draft.machine.micro_batch
    if pinned != "auto":
        return pinned * context, memory_of(pinned * context)
    most = CPU_TOKENS if draft.hardware.device == "cpu" else GPU_TOKENS
    full_rows = max(1, most // context)
    while full_rows > 1 and memory_of(full_rows * context).total > MEMORY_SHARE * available:
        full_rows //= 2
    tokens = full_rows * context
    draft.choose(
        "micro_batch", full_rows, f"{tokens:,} tokens at a time, and more rows of them where they are short"
    )
    return tokens, memory_of(tokens)
