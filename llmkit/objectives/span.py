"""Span corruption: the encoder reads text in which marks stand for spans, the decoder writes what they held.

    text      Thank you for inviting me to your party last week .
    encoder   Thank you <|extra_0|> me to your party <|extra_1|> week . (end)
    decoder   <|extra_0|> for inviting <|extra_1|> last (end)

How many tokens are taken out, and in how many spans, follows from the row's length alone; where, is by chance. The end
of a document that a row holds is a token like others.

**Source**: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
sections 3.1.4 and 3.3.4.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.objectives.base import Batch, Criterion, Example, Loss, cross_entropy, token_metrics
from llmkit.objectives.encoder_decoder import collate_two_sides, decoder_loss
from llmkit.objectives.spans import cut_out, random_sum, sentinel_ids, with_marks
from llmkit.recipe.objectives import Span
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel


def build(section: Pretrain, vocabulary: Vocabulary) -> "SpanCorruption":
    """The objective as the recipe wants it."""
    return SpanCorruption(section.span, vocabulary)


class SpanCorruption:
    """The mean over the decoder's tokens, marks and end included, of -log p(token | those before it, corrupted text).

    Args:
        settings: How much is taken out.
        vocabulary: With marks, an end of text and padding.
    """

    sums = ()

    def __init__(self, settings: Span, vocabulary: Vocabulary) -> None:
        self._settings = settings
        self._marks = sentinel_ids(vocabulary)
        self._end = vocabulary.role("eos_token")
        self._pad = vocabulary.role("pad_token")

    def encode(self, row: Example) -> Example:
        """Take spans out of a row.

        Args:
            row: `ids`, and `seed`.

        Returns:
            `input_ids`, what the encoder reads, and `targets`, what the decoder writes.
        """
        ids = row["ids"]
        chance = np.random.default_rng(int(row["seed"]))
        num_taken, num_spans = self._settings.counts(len(ids))
        kept, taken = cut_out(ids, random_sum(num_taken, num_spans, chance), chance)
        marks = self._marks[:num_spans]
        spans = [part for pair in zip(marks[:, None], taken, strict=True) for part in pair]
        return {
            "input_ids": np.append(with_marks(kept, marks), self._end),
            "targets": np.append(np.concatenate(spans), self._end),
        }

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows; full ones are equally long, and only a shorter last one is filled up."""
        return collate_two_sides(examples, pad=self._pad)

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the negative log-likelihood of the decoder's tokens."""
        return decoder_loss(model, batch, criterion)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per target and its perplexity."""
        return token_metrics(sums)
