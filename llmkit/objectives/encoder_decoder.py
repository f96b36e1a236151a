"""What objectives of encoder-decoders share: examples of two lengths, and the loss of what the decoder writes.

Shape suffixes: B rows, S positions of the encoder, T positions of the decoder, N = B*T positions in a line.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.models.heads import seq2seq_scores
from llmkit.objectives.base import NOT_LEARNED, Batch, Criterion, Example, Loss, padded

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel


def collate_two_sides(examples: Sequence[Example], *, pad: int, width: int = 0) -> dict[str, torch.Tensor]:
    """Stack `input_ids` to [B, S] and `targets` to [B, T], each filled up on the right to its longest.

    Args:
        examples: With `input_ids` and `targets`.
        pad: The id that fills up the encoder's input.
        width: S and T at least, and then there always is an `attention_mask`: shapes must not change where lengths are
            by chance. 0: there is a mask only where something was filled up.
    """
    marked = [{**example, "attention_mask": np.ones_like(example["input_ids"])} for example in examples]
    batch = padded(marked, {"input_ids": pad, "attention_mask": 0}, width)
    if not width and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    batch |= padded(examples, {"targets": NOT_LEARNED}, width)
    batch["num_targets"] = (batch["targets"] != NOT_LEARNED).sum()
    return batch


def decoder_loss(model: "PreTrainedModel", batch: Batch, criterion: Criterion) -> Loss:
    """Sum of the negative log-likelihood of what the decoder is to write."""
    targets_BT = batch["targets"]
    scores = seq2seq_scores(
        model, batch["input_ids"], targets_BT, attention_mask_BS=batch.get("attention_mask")
    )
    return Loss({"num_targets": criterion(scores, targets_BT.flatten())})
