"""Causal language modelling: predict each token from those before it.

Shape suffixes: B rows, T positions, N = B*T positions in a line, H hidden size, V vocabulary.

**Source**: Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 3.1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from llmkit.models.cross_entropy import linear_cross_entropy
from llmkit.objectives.base import NOT_LEARNED, Batch, Example, Loss

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_FILLS = {"input_ids": 0, "targets": NOT_LEARNED, "position_ids": 0}


class CausalLM:
    """The mean over targets of -log p(token | tokens before it), as a sum and a count."""

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
        width = max(len(example["input_ids"]) for example in examples)
        batch = {
            name: torch.from_numpy(np.stack([_widened(e[name], width, fill) for e in examples]))
            for name, fill in _FILLS.items()
            if name in examples[0]
        }
        batch["num_targets"] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch) -> Loss:
        """Sum of the targets' negative log-likelihood. Logits are made in chunks, for targets only."""
        # position_ids restart in each document: with no attention mask given, that is what isolates them.
        positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
        hidden_BTH = model.base_model(
            input_ids=batch["input_ids"], use_cache=False, **positions
        ).last_hidden_state
        head = model.get_output_embeddings()
        total = linear_cross_entropy(
            hidden_BTH.flatten(0, 1), head.weight, batch["targets"].flatten(), bias=head.bias
        )
        return Loss(total=total)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per target, its perplexity, and bits per UTF-8 byte where `num_bytes` is known."""
        loss = sums["total"] / sums["num_targets"]
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if sums.get("num_bytes"):
            metrics["bits_per_byte"] = sums["total"] / math.log(2) / sums["num_bytes"]
        return {**metrics, "num_targets": sums["num_targets"]}


def _widened(array_T: npt.NDArray[np.int64], width: int, fill: int) -> npt.NDArray[np.int64]:
    missing = width - len(array_T)
    return np.pad(array_T, (0, missing), constant_values=fill) if missing else array_T
