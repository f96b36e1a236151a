"""Denoising: the encoder reads text with masked spans and shuffled sentences, the decoder writes it as it was.

    text      the cat sat . it slept on the mat . (end)
    shuffled  it slept on the mat . the cat sat .
    encoder   it <|mask|> on the mat . the <|mask|> cat sat . (end)
    decoder   the cat sat . it slept on the mat . (end)

The lengths of spans are Poisson numbers, drawn until they reach the share that is masked (the last is cut to it), and
every arrangement of the spans among the tokens that are kept is equally likely. A span of no token puts a mask where
nothing is missing. Sentences are shuffled within their document; special tokens, so the ends of documents, stay. No
random tokens are put in, as the released models had them besides.

**Source**: Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training", section 2.2 (text infilling and
sentence permutation), and 5.1 for the shares.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.data.rows import Ints
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.objectives.base import Batch, Criterion, Example, Loss, cross_entropy, token_metrics
from llmkit.objectives.encoder_decoder import collate_two_sides, decoder_loss
from llmkit.objectives.sentences import ends_sentence
from llmkit.recipe.objectives import Denoise
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel


def build(section: Pretrain, vocabulary: Vocabulary) -> "Denoising":
    """The objective as the recipe wants it."""
    return Denoising(section.denoise, vocabulary, width=section.model.context)


class Denoising:
    """The mean over a row's tokens and its end of -log p(token | those before it, the damaged row).

    Args:
        settings: How much is masked, and whether sentences are shuffled.
        vocabulary: With a mask, an end of text and padding.
        width: Positions of a row, on both sides.
    """

    sums = ()

    def __init__(self, settings: Denoise, vocabulary: Vocabulary, *, width: int) -> None:
        self._settings = settings
        self._width = width
        self._is_special = vocabulary.is_special
        self._ends_sentence = ends_sentence(vocabulary)
        self._mask = vocabulary.role("mask_token")
        self._end = vocabulary.role("eos_token")
        self._pad = vocabulary.role("pad_token")

    def encode(self, row: Example) -> Example:
        """Damage a row.

        Args:
            row: `ids`, `positions` counted from the start of each token's document, and `seed`.

        Returns:
            `input_ids`, what the encoder reads, and `targets`, the row, both with an end.
        """
        ids = row["ids"]
        chance = np.random.default_rng(int(row["seed"]))
        damaged = ids[self._order(ids, row["positions"], chance)] if self._settings.shuffle_sentences else ids
        return {
            "input_ids": np.append(self._infilled(damaged, chance), self._end),
            "targets": np.append(ids, self._end),
        }

    def _order(self, ids: Ints, positions: Ints, chance: np.random.Generator) -> Ints:
        """The row's positions with the sentences of each document in a random order."""
        document = np.cumsum(positions == 0)
        is_end = self._ends_sentence[ids] | self._is_special[ids]
        sentence = np.cumsum(np.append(False, is_end[:-1]) | (positions == 0))
        place = chance.permutation(len(ids) + 1)[sentence]
        # By document; in it the end of the document comes last; before that sentence by sentence.
        return np.lexsort((np.arange(len(ids)), place, ids == self._end, document))

    def _infilled(self, ids: Ints, chance: np.random.Generator) -> Ints:
        """The row with one mask for each span."""
        free = np.flatnonzero(~self._is_special[ids])
        num_masked = round(len(free) * self._settings.ratio)
        lengths = self._lengths(num_masked, chance)
        room = self._width - 1 - (len(ids) - num_masked)
        if len(lengths) > room:  # masks for nothing, if ever so many are asked for
            lengths = np.delete(lengths, np.flatnonzero(lengths == 0)[: len(lengths) - room])
        num_kept, num_spans = len(free) - num_masked, len(lengths)
        # Kept tokens and spans in a line: which of its places are spans?
        before = np.sort(chance.choice(num_kept + num_spans, num_spans, replace=False)) - np.arange(num_spans)
        starts = before + np.cumsum(lengths) - lengths
        is_kept = np.ones(len(ids), dtype=np.bool_)
        is_kept[free[np.repeat(starts, lengths) + _counts_up(lengths)]] = False
        kept_before = np.append(0, np.cumsum(is_kept))
        return np.insert(ids[is_kept], kept_before[np.append(free, len(ids))[starts]], self._mask)

    def _lengths(self, num_masked: int, chance: np.random.Generator) -> Ints:
        """Lengths of spans that add up to `num_masked`."""
        lengths = np.zeros(0, dtype=np.int64)
        while lengths.sum() < num_masked:
            lengths = np.append(lengths, chance.poisson(self._settings.mean_length, num_masked))
        reached = np.cumsum(lengths)
        count = int(np.searchsorted(reached, num_masked)) + 1 if num_masked else 0
        lengths = lengths[:count]
        lengths[-1:] -= reached[count - 1 : count] - num_masked
        return lengths

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows, both sides filled up to the row's width."""
        return collate_two_sides(examples, pad=self._pad, width=self._width)

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the negative log-likelihood of the row's tokens."""
        return decoder_loss(model, batch, criterion)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per target and its perplexity."""
        return token_metrics(sums)


def _counts_up(lengths: Ints) -> Ints:
    """0, 1, ... for each length, one list after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
