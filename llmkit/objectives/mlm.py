"""Masked language modelling: tell hidden tokens from those on both sides.

Shape suffixes: B rows, T positions, N = B*T positions in a line, V vocabulary.

**Source**: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019,
section 3.1, task 1.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.models.heads import masked_scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Loss,
    cross_entropy,
    padded,
    token_metrics,
)
from llmkit.objectives.masking import Masking
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel


def build(section: Pretrain, vocabulary: Vocabulary) -> "MaskedLM":
    """The objective as the recipe wants it.

    Raises:
        UsageError: The tokenizer lacks a special token that it needs.
        MissingError: Chinese words are wanted, and rjieba is not installed.
    """
    return MaskedLM(vocabulary, Masking.of(vocabulary, **section.mlm.model_dump()))


class MaskedLM:
    """The mean over hidden tokens of -log p(token | the row with gaps), as a sum and a count.

    A row is `[CLS] text [SEP]`. A full row has the same number of targets each time: the recipe's share of its ordinary
    tokens, to the nearest whole number, and at least one.
    """

    sums = ("correct",)

    def __init__(self, vocabulary: Vocabulary, masking: Masking) -> None:
        self._masking = masking
        self._before = np.array([vocabulary.role("cls_token")])
        self._after = np.array([vocabulary.role("sep_token")])
        self._fills = {"input_ids": vocabulary.role("pad_token"), "targets": NOT_LEARNED, "attention_mask": 0}

    def encode(self, row: Example) -> Example:
        """Hide tokens of a row.

        Args:
            row: `ids` [T-2] and `seed`.
        """
        ids_T = np.concatenate([self._before, row["ids"], self._after])
        read_T, targets_T = self._masking.hide(ids_T, np.random.default_rng(int(row["seed"])))
        return {"input_ids": read_T, "targets": targets_T}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows to [B, T]: `input_ids`, `targets`, and `attention_mask` where a row is shorter than others."""
        if len({len(example["targets"]) for example in examples}) > 1:
            examples = [
                {**example, "attention_mask": np.ones_like(example["targets"])} for example in examples
            ]
        batch = padded(examples, self._fills)
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the hidden tokens' negative log-likelihood. Logits are made for them only."""
        scores, _ = masked_scores(
            model,
            num_targets=batch[TARGETS],
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
        )
        targets_N = batch["targets"].flatten()
        sums = {} if model.training else {"correct": scores.num_correct(targets_N)}
        return Loss({TARGETS: criterion(scores, targets_N)}, sums)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per hidden token, its perplexity, and the share of them that is the model's first guess."""
        return token_metrics(sums)
