"""Simple models to compare a model with, counted on the text that it was trained on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llmkit.data.shards import TokenStream
from llmkit.evaluate.model import core_of, measure_streams, summarise
from llmkit.models.configs import NGramConfig
from llmkit.models.kneser_ney import Piece, count_ngrams, estimate
from llmkit.models.ngram import NGramForCausalLM
from llmkit.recipe.schema import Pretrain

ORDER = 3
MOST_TOKENS = 20_000_000
"""Training tokens that are counted at most: what fits on a laptop."""
_PIECE_TOKENS = 1 << 22


def ngram_loss(
    train: Sequence[TokenStream],
    measured: Sequence[TokenStream],
    section: Pretrain,
    tokenizer: Any,
    *,
    order: int = ORDER,
    between: Callable[[int], None] = lambda number: None,
) -> float:
    """The loss, in nats a token, of an interpolated Kneser-Ney model, in the windows of the model it stands beside.

    Args:
        train: The text that it is counted on; its first `MOST_TOKENS` tokens.
        measured: The text that it is measured on.
        section: What the other model learned; `clm`.
        tokenizer: The tokenizer of both texts.
        order: Tokens in the longest n-gram.
        between: Called with the number of each order that is done.
    """
    total = min(MOST_TOKENS, sum(stream.num_tokens for stream in train))
    vocab_size = len(tokenizer)
    levels = count_ngrams(
        lambda: _pieces(train, total), total, order=order, vocab_size=vocab_size, between=between
    )
    model = NGramForCausalLM.of(estimate(levels, vocab_size), NGramConfig(vocab_size=vocab_size)).eval()
    core = core_of(model, section, tokenizer, device="cpu")
    found = measure_streams(core, measured, section, device="cpu", batch_size=1)
    return summarise(core, section, measured, found.sums)["loss"]


def _pieces(streams: Sequence[TokenStream], total: int) -> Iterator[Piece]:
    for stream in streams:
        size = min(stream.num_tokens, total)
        for start in range(0, size, _PIECE_TOKENS):
            ids_N = stream.read(start, min(start + _PIECE_TOKENS, size))
            starts_N = np.zeros(len(ids_N), dtype=np.bool_)
            starts_N[0] = start == 0
            yield Piece(ids_N, starts_N)
        total -= size
