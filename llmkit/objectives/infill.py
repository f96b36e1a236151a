"""Blank infilling by a decoder: text in which marks stand for spans, then the spans, each behind its mark.

    text      x1 x2 x3 x4 x5 x6
    taken     x3, and x5 x6
    input     x1 x2 <|extra_0|> x4 <|extra_1|>   <|extra_1|> x5 x6       <|extra_0|> x3
    target                                       x5          x6 <|eop|>  x3          <|eop|>

As in GLM, the spans come in a random order, each token is predicted from the text with gaps, the spans before its own
and the tokens before it, and the mark that begins a span is given, not learned. What differs, so that any decoder can
learn it: a numbered mark says which gap a span fills, where GLM has one `[MASK]` and gives the tokens of a span the
position of their gap (its second positions count within the span); the text with gaps is read from left to right, where
GLM's attention there goes both ways; and the number of spans follows from the row's length, as in T5. A span has one
token, and those left over fall on the spans at random: a length is 1 more than a Poisson number, given their sum.

**Source**: Du et al. 2022, "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", section 2.1.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.models.heads import causal_scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    Batch,
    Criterion,
    Example,
    Loss,
    cross_entropy,
    padded,
    token_metrics,
)
from llmkit.objectives.spans import cut_out, sentinel_ids, with_marks
from llmkit.recipe.objectives import Infill
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

END_OF_SPAN = "<|eop|>"


def build(section: Pretrain, vocabulary: Vocabulary) -> "BlankInfilling":
    """The objective as the recipe wants it."""
    return BlankInfilling(section.infill, vocabulary)


class BlankInfilling:
    """The mean over the spans' tokens and ends of -log p(token | text with gaps, spans and tokens before it).

    Args:
        settings: How much is taken out.
        vocabulary: With marks and an end of a span.
    """

    sums = ()

    def __init__(self, settings: Infill, vocabulary: Vocabulary) -> None:
        self._settings = settings
        self._marks = sentinel_ids(vocabulary)
        self._end = vocabulary.id_of(END_OF_SPAN)

    def encode(self, row: Example) -> Example:
        """Take spans out of a row and put them behind it.

        Args:
            row: `ids`, and `seed`.
        """
        ids = row["ids"]
        chance = np.random.default_rng(int(row["seed"]))
        num_taken, num_spans = self._settings.counts(len(ids))
        lengths = 1 + chance.multinomial(num_taken - num_spans, np.full(num_spans, 1 / num_spans))
        kept, taken = cut_out(ids, lengths, chance)
        marks = self._marks[:num_spans]
        text = with_marks(kept, marks)
        order = chance.permutation(num_spans)
        inputs = [part for i in order for part in ([marks[i]], taken[i])]
        targets = [part for i in order for part in (taken[i], [self._end])]
        return {
            "input_ids": np.concatenate([text, *inputs]),
            "targets": np.concatenate([np.full(len(text), NOT_LEARNED), *targets]),
        }

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows to [B, T]; only a shorter last row is filled up, and nothing sees that."""
        batch = padded(examples, {"input_ids": 0, "targets": NOT_LEARNED})
        batch["num_targets"] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the negative log-likelihood of the spans' tokens and ends."""
        scores = causal_scores(model, batch["input_ids"])
        return Loss({"num_targets": criterion(scores, batch["targets"].flatten())})

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per target and its perplexity."""
        return token_metrics(sums)
