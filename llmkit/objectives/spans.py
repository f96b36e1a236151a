"""Spans of a row: how many and how long, drawn from the row's own chance, and the marks that stand for them."""

import numpy as np

from llmkit.data.rows import Ints
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.registry import SENTINELS


def sentinel_ids(vocabulary: Vocabulary) -> Ints:
    """The ids of the marks that stand for spans, in order: llmkit's own, else T5's `<extra_id_0>` and so on.

    Raises:
        UsageError: The tokenizer has neither.
    """
    known = [f"<extra_id_{number}>" for number in range(len(SENTINELS))]
    if not all(vocabulary.has(token) for token in known):
        known = list(SENTINELS)
    return np.array([vocabulary.id_of(token) for token in known], dtype=np.int64)


def random_sum(total: int, num_parts: int, chance: np.random.Generator) -> Ints:
    """Numbers of at least 1 that add up to `total`; each such list is equally likely.

    **Source**: Raffel et al. 2020, section 3.1.4, whose published code cuts at places drawn without replacement.
    """
    cuts = np.sort(chance.choice(total - 1, num_parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def cut_out(ids: Ints, lengths: Ints, chance: np.random.Generator) -> tuple[list[Ints], list[Ints]]:
    """Take spans out of a row, with a token or more between them; each choice of their places is equally likely.

    T5's published code always begins a row with what is kept and ends it with a span. Here the ends are like any other
    place, which matters for short rows: the only span of one would always be its end.

    Args:
        ids: The row.
        lengths: Of the spans, in order.
        chance: Draws their places.

    Returns:
        What is kept before each span and after the last, one more than the spans; and the spans.
    """
    kept = random_sum(len(ids) - int(lengths.sum()) + 2, len(lengths) + 1, chance)
    kept[[0, -1]] -= 1
    turns = np.insert(kept, np.arange(1, len(kept)), lengths)
    pieces = np.split(ids, np.cumsum(turns)[:-1])
    return pieces[0::2], pieces[1::2]


def with_marks(kept: list[Ints], marks: Ints) -> Ints:
    """The row with a mark for each span that was taken out."""
    parts = [part for pair in zip(kept, marks[:, None], strict=False) for part in pair]
    return np.concatenate([*parts, kept[-1]])
