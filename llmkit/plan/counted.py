"""The plan of a model that is counted, not trained: one process, no steps by gradients, as many numbers as n-grams."""

from collections.abc import Mapping
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.batch import PlanError, rows_of_batch
from llmkit.plan.length import resolve_length
from llmkit.plan.make import rows_of_data
from llmkit.plan.memory import CPU_PROCESS_BYTES, Memory
from llmkit.plan.plan import DataFacts, Plan
from llmkit.plan.rows import layout_of
from llmkit.recipe.architectures import family_of_config
from llmkit.recipe.schema import Model, Pretrain, Recipe

ORDER = 5
"""Tokens of the longest n-grams, where the recipe does not say."""

LONGEST = 10
SECONDS_PER_TOKEN = (1.5e-7, 8e-7)
"""For each order (measured: 2.4e-7 with 7.5 M tokens of source code on one core of a server processor)."""

_PIECE_BYTES = 400_000_000
_SETTINGS = ("train.optim", "train.grad_clip", "checkpoint", "eval.every")


def is_counted(model: Model) -> bool:
    """Whether a recipe's model is made by counting."""
    return model.architecture == "ngram" or family_of_config(model.config or {}) == "ngram"


def refuse_counted(fields: Mapping[str, Any]) -> None:
    """Refuse to train a model that was counted.

    Args:
        fields: The configuration of a model to go on from.

    Raises:
        PlanError: It is an n-gram model's.
    """
    if family_of_config(fields) == "ngram":
        raise PlanError(
            "an n-gram model cannot be trained any further: it is counted",
            hint="model: {architecture: ngram}",
        )


def order_of(model: Model) -> int:
    """Tokens of the longest n-grams.

    Raises:
        PlanError: The `config` says something else, or no usable number.
    """
    fields = {key: value for key, value in (model.config or {}).items() if key != "model_type"}
    order = fields.pop("order", ORDER)
    if fields:
        raise PlanError(
            f"model.config: an n-gram model has no field {', '.join(map(repr, fields))}",
            hint=f"its one field is `order`, the tokens of its longest n-grams: config: {{order: {ORDER}}}",
        )
    if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order <= LONGEST:
        raise PlanError(f"model.config.order is {order!r}", hint=f"a whole number from 1 to {LONGEST}")
    return order


def plan_counted(recipe: Recipe, hardware: Hardware, data: DataFacts, *, vocab_size: int) -> Plan:
    """Turn what the recipe asks for into numbers for counting.

    Args:
        recipe: The recipe; its `pretrain` section names a counted model.
        hardware: What there is to compute with.
        data: What the training data holds.
        vocab_size: Entries of the tokenizer.

    Raises:
        PlanError: The objective does not fit, the order is no usable number, or the text is shorter than a row.
    """
    wanted = recipe.pretrain
    assert wanted is not None
    if wanted.objective != "clm":
        raise PlanError(
            f"an n-gram model predicts the next token of text as it is: objective {wanted.objective!r} does not fit",
            hint="objective: clm",
        )
    order, context = order_of(wanted.model), wanted.model.context
    num_rows = rows_of_data(data, layout_of(wanted), context)
    rows, _ = rows_of_batch(wanted.train.batch, context)
    steps = resolve_length(
        wanted.train.length, tokens_per_step=rows * context, rows_per_step=rows, num_rows_per_epoch=num_rows
    ) or -(-num_rows // rows)
    tokens = min(steps * rows, num_rows) * context
    sizes = [min(tokens, vocab_size**k) for k in range(1, order + 1)]
    num_parameters = vocab_size + sum(sizes[1:]) + sum(sizes[:-1])
    micro_batch = max(1, min(rows, 2048 // context))
    low, high = (each * order * tokens for each in SECONDS_PER_TOKEN)
    return Plan(
        device="cpu",
        world_size=1,
        precision="fp32",
        compile=False,
        attention="sdpa",
        context=context,
        rows_per_step=rows,
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=-(-rows // micro_batch),
        tokens_per_step=rows * context,
        num_steps=steps,
        length_seconds=None,
        warmup_steps=0,
        checkpoint_every=0,
        keep_every=0,
        eval_every=0,
        background_save=False,
        deferred={},
        num_rows_per_epoch=num_rows,
        num_epochs=steps * rows / num_rows,
        vocab_size=vocab_size,
        num_parameters=num_parameters,
        flops_per_token=0,
        memory=_memory(num_parameters, tokens, logits=4 * micro_batch * context * vocab_size),
        seconds_low=low,
        seconds_high=high,
        checkpoint_bytes=0,
        choices=_choices(recipe, micro_batch),
        notes=tuple(_notes(wanted, hardware, steps * rows, rows, num_rows, exact=data.exact)),
    )


def _memory(num_parameters: int, tokens: int, *, logits: int) -> Memory:
    """Numbers in fp32 with half as many keys of eight bytes; the node of each token; a piece while it is sorted."""
    weights = 8 * num_parameters
    counting = 4 * tokens + _PIECE_BYTES + 2 * weights
    total = weights + counting + logits + CPU_PROCESS_BYTES
    return Memory(weights, 0, 0, counting, logits, CPU_PROCESS_BYTES, total)


def _choices(recipe: Recipe, micro_batch: int) -> dict[str, tuple[Any, str]]:
    """Every `auto` decided."""
    decided: dict[str, tuple[Any, str]] = {
        "device": ("cpu", "counting is work for a processor"),
        "processes": (1, "one process counts"),
        "precision": ("fp32", "probabilities are kept in fp32"),
        "compile": (False, "there is no network to compile"),
        "attention": ("sdpa", "there is no attention"),
        "micro_batch": (micro_batch, "rows measured at a time"),
        "background_save": (False, "nothing is saved before the end"),
    }
    return {
        f"machine.{name}": choice
        for name, choice in decided.items()
        if getattr(recipe.machine, name) == "auto"
    }


def _notes(
    wanted: Pretrain, hardware: Hardware, rows: int, rows_per_step: int, num_rows: int, *, exact: bool
) -> list[str]:
    notes = [
        *hardware.notes,
        f"an n-gram model is counted, not trained: {', '.join(_SETTINGS)} mean nothing for it; a run that was "
        "stopped counts from the beginning",
        "its parameters are at most so many: one for each different n-gram and one for each context",
    ]
    if wanted.train.length.unit == "seconds":
        notes.append("the length is a time: all rows are counted, however long it takes")
    if rows - rows_per_step >= num_rows:
        notes.append("each row is counted once: reading it again would teach nothing")
    if not exact:
        notes.append("token counts are estimated from file sizes; the run counts exactly")
    return notes
