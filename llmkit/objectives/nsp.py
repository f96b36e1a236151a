"""Masked language modelling with next-sentence prediction: does the second text go on from the first?

A row `[CLS] A [SEP] B [SEP]` holds a stretch of the stream, cut where a sentence begins inside a document: B goes on
from A. Or B is replaced by as many tokens of another document, from the beginning of a sentence on. Whether a cut is
possible, and where it falls, does not depend on which of the two is made: length and place of B say nothing.

What differs from Devlin 2019: no text is left out and no row is short. Where documents are shorter than a row, A begins
and B ends with text of their neighbours, behind the mark of a document's end; what belongs together, or does not, meets
at the cut. A row in which no sentence begins, or for which there is no other document, has no pair; it is one text, and
its hidden tokens are learned like any others.

Shape suffixes: B rows, T positions, N = B*T positions in a line.

**Source**: Devlin et al., "BERT", 2019, section 3.1, task 2, and appendix A.2.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.models.heads import masked_scores, pair_logits
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
from llmkit.objectives.sentences import ends_sentence
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

Ints = npt.NDArray[np.int64]
PAIRS = "num_pairs"
GOES_ON, OTHER = 0, 1
"""What a pair is labelled, as transformers does it."""


def build(section: Pretrain, vocabulary: Vocabulary) -> "PairedMaskedLM":
    """The objective as the recipe wants it.

    Raises:
        UsageError: The tokenizer lacks a special token that it needs.
        MissingError: Chinese words are wanted, and rjieba is not installed.
    """
    masking = Masking.of(vocabulary, **section.mlm.model_dump())
    return PairedMaskedLM(vocabulary, masking, section.nsp.other_ratio, section.model.context)


class PairedMaskedLM:
    """Two means: over hidden tokens as in `MaskedLM`, and over pairs of -log p(goes on or not)."""

    sums = (PAIRS, "correct", "pair_total", "pair_correct")

    def __init__(self, vocabulary: Vocabulary, masking: Masking, other_ratio: float, width: int) -> None:
        self._masking = masking
        self._ends_sentence = ends_sentence(vocabulary)
        self._is_special = vocabulary.is_special
        self._other_ratio = other_ratio
        self._width = width
        self._cls = np.array([vocabulary.role("cls_token")])
        self._sep = np.array([vocabulary.role("sep_token")])
        self._fills = {
            "input_ids": vocabulary.role("pad_token"),
            "targets": NOT_LEARNED,
            "token_type_ids": 0,
            "attention_mask": 0,
        }

    def encode(self, row: Example) -> Example:
        """Make a pair of a row, and hide tokens of it.

        Args:
            row: `ids` [T-3], `other` of a row of another document (empty where there is none), and `seed`.
        """
        draw = np.random.default_rng(int(row["seed"]))
        first, second, label = self._pair(row, draw)
        parts = [self._cls, first, self._sep] + ([second, self._sep] if len(second) else [])
        ids_T = np.concatenate(parts)
        read_T, targets_T = self._masking.hide(ids_T, draw)
        return {
            "input_ids": read_T,
            "targets": targets_T,
            "token_type_ids": (np.arange(len(ids_T)) >= len(first) + 2).astype(np.int64),
            "attention_mask": np.ones_like(ids_T),
            "pair_targets": np.asarray(label),
        }

    def _pair(self, row: Example, draw: np.random.Generator) -> tuple[Ints, Ints, int]:
        ids, other = row["ids"], row["other"]
        cuts = self._cuts(ids)
        starts = self._cuts(other)
        # Room for as much text behind a beginning of the other row as there is behind the cut.
        cuts = cuts[cuts >= starts.min(initial=len(ids)) + len(ids) - len(other)] if len(starts) else cuts[:0]
        if not len(cuts):
            return ids, ids[:0], NOT_LEARNED
        cut = int(draw.choice(cuts))
        if draw.random() >= self._other_ratio:
            return ids[:cut], ids[cut:], GOES_ON
        length = len(ids) - cut
        start = int(draw.choice(starts[starts + length <= len(other)]))
        return ids[:cut], other[start : start + length], OTHER

    def _cuts(self, ids: Ints) -> Ints:
        """Where a sentence begins inside a document: neither the mark of a document's end nor what follows it."""
        ends = self._ends_sentence[ids]
        return np.flatnonzero(ends[:-1] & ~ends[1:] & ~self._is_special[ids[1:]]) + 1

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows to [B, T] for T the context: `input_ids`, `targets`, `token_type_ids`, `attention_mask`.

        And [B] `pair_targets`: 0 where the second text goes on from the first, 1 where it does not.
        """
        batch = padded(examples, self._fills, self._width)
        batch["pair_targets"] = torch.tensor([int(example["pair_targets"]) for example in examples])
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        batch[PAIRS] = (batch["pair_targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sums of the hidden tokens' and the pairs' negative log-likelihood."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        scores, output = masked_scores(
            model, num_targets=batch[TARGETS], **{name: batch[name] for name in names}
        )
        targets_N, pairs_B = batch["targets"].flatten(), batch["pair_targets"]
        logits_B2 = pair_logits(model, output).float()
        pair_total = functional.cross_entropy(logits_B2, pairs_B, ignore_index=NOT_LEARNED, reduction="sum")
        totals = {TARGETS: criterion(scores, targets_N), PAIRS: pair_total}
        if model.training:
            return Loss(totals)
        sums = {
            "correct": scores.num_correct(targets_N),
            "pair_total": pair_total,
            "pair_correct": (logits_B2.argmax(1) == pairs_B).sum(),
        }
        return Loss(totals, sums)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """As `MaskedLM`; and the pairs' loss in nats, and the share of them that is judged rightly."""
        metrics = token_metrics(sums)
        if sums[PAIRS]:
            metrics["pair_loss"] = sums["pair_total"] / sums[PAIRS]
            metrics["pair_accuracy"] = sums["pair_correct"] / sums[PAIRS]
        return metrics
