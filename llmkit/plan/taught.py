"""What a teacher's cache holds (`distil.cache`), and what it takes on disk.

Where what a model reads of a row is always the same, the cache is by row: a run of many epochs asks the teacher once of
each row. Where chance decides it (which tokens are masked, how a text is changed), or where the run does not come round
to all rows, it is by training position: each time that a row comes is kept by itself.
"""

import math
from collections.abc import Mapping
from typing import Any

from llmkit.plan.batch import PlanError
from llmkit.plan.rows import layout_of
from llmkit.recipe.schema import Finetune, Pretrain, Section

LINES_A_PART = 1 << 16
"""Positions that a file of the cache has at most: what a kill costs."""
_WIDE = 1 << 16


def plan_cache(
    wanted: Section,
    *,
    outputs: int,
    num_rows: int,
    lines_per_row: float,
    rows_per_step: int,
    num_steps: int | None,
) -> dict[str, Any]:
    """The cache in numbers; empty where the recipe has none.

    Args:
        wanted: The recipe's section.
        outputs: What the model says a probability of at a position: tokens or labels.
        num_rows: Rows of one pass over the training data.
        lines_per_row: Positions of a row that are learned, on average.
        rows_per_step: Rows of a step.
        num_steps: The run's length; None where it is a time.

    Returns:
        `by` (`row` or `position`), `num_keys` (rows, or training positions), `rows_a_part`, `top_k`, `outputs`,
        `bytes`.

    Raises:
        PlanError: Chance decides what is read, and how often is not known beforehand.
    """
    if wanted.distil is None or wanted.distil.cache is None:
        return {}
    drawn = draws(wanted)
    if drawn and num_steps is None:
        raise PlanError(
            f"distil.cache: what `{wanted.objective}` reads of a row is another each time, and how often rows come is "
            f"not known of a length of {wanted.train.length}",
            hint="give `train.length` in steps, epochs or tokens, or leave `cache` out",
        )
    times = math.inf if num_steps is None else num_steps * rows_per_step
    by_row = not drawn and times >= num_rows
    kept = min(wanted.distil.cache.top_k, outputs)
    num_keys = num_rows if by_row else int(times)
    one = kept * (4 + id_bytes(outputs)) + 4
    return {
        "by": "row" if by_row else "position",
        "num_keys": num_keys,
        "rows_a_part": max(1, LINES_A_PART // wanted.model.context),
        "top_k": kept,
        "outputs": outputs,
        "bytes": int(num_keys * (8 + lines_per_row * one)),
    }


def id_bytes(outputs: int) -> int:
    """Bytes of the number of one of so many outputs."""
    return 2 if outputs <= _WIDE else 4


def draws(wanted: Section) -> bool:
    """Whether chance decides what is read of a row."""
    return bool(wanted.augment) if isinstance(wanted, Finetune) else wanted.objective != "clm"


def lines_of_text(wanted: Pretrain) -> int:
    """Positions of a full row of text that are learned, at most."""
    layout, context = layout_of(wanted), wanted.model.context
    if wanted.objective in ("mlm", "mlm+nsp"):
        return max(1, round(wanted.mlm.ratio * layout.stride))
    if wanted.objective == "infill":
        return sum(wanted.infill.counts(layout.stride))
    return layout.decoder or context


def outputs_of(wanted: Section, vocab_size: int, num_labels: int) -> int:
    """What the model says a probability of at a position: tokens, or labels; of several that may apply, yes or no."""
    if not isinstance(wanted, Finetune) or wanted.task not in ("cls", "tag"):
        return vocab_size
    return 2 if wanted.task == "cls" and wanted.cls.multiple else num_labels


def cache_note(cache: Mapping[str, Any]) -> str:
    """What a person should know of a teacher that is asked once."""
    return (
        "the teacher is asked once, before training, which does without its weights; while it is asked its memory and "
        "time come on top of these figures"
        if cache
        else "the teacher's memory and time are not in these figures"
    )
