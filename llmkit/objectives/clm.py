"""Causal language modelling: predict each token from those before it.

Shape suffixes: B rows, T positions, N = B*T positions in a line, H hidden size, V vocabulary.

**Source**: Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 3.1.
"""

import math
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
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_FILLS = {"input_ids": 0, "targets": NOT_LEARNED, "position_ids": 0}


def build(section: Pretrain, vocabulary: Vocabulary) -> "CausalLM":
    """The objective as the recipe wants it; it has no settings."""
    return CausalLM()


class CausalLM:
    """The mean over targets of -log p(token | tokens before it), as a sum and a count."""

    sums = ()

    def encode(self, row: Example) -> Example:
        """Shift a row of token ids by one.

        Args:
            row: `ids` [T+1], and `positions` [T+1] counted from the start of each position's document where
                documents are isolated: then no target crosses into the next document. Its `seed` is not needed:
                nothing is random here.
        """
        ids = row["ids"]
        example = {"input_ids": ids[:-1], "targets": ids[1:]}
        if "positions" in row:
            starts = row["positions"][1:] == 0
            example["targets"] = np.where(starts, NOT_LEARNED, ids[1:])
            example["position_ids"] = row["positions"][:-1]
        return example

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows to [B, T]: `input_ids`, `targets` and, isolated, `position_ids`.

        A row shorter than the longest is filled up on the right; nothing there is a target, and no target
        sees it.
        """
        batch = padded(examples, _FILLS)
        batch["num_targets"] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the targets' negative log-likelihood. Logits are made in chunks, for targets only."""
        # position_ids restart in each document: with no attention mask given, that is what isolates them.
        scores = causal_scores(model, batch["input_ids"], batch.get("position_ids"))
        return Loss({"num_targets": criterion(scores, batch["targets"].flatten())})

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per target, its perplexity, and bits per UTF-8 byte where `num_bytes` is known."""
        metrics = token_metrics(sums)
        if sums.get("num_bytes"):
            metrics["bits_per_byte"] = sums["total"] / math.log(2) / sums["num_bytes"]
        return metrics
