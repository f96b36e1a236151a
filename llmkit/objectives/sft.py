"""Supervised fine-tuning on conversations: predict what the assistant says, up to the token that ends its turn.

Shape suffixes: B rows, T positions of a row, L lines, N positions of a line, or of all of them.

**Source**: Ouyang et al., "Training language models to follow instructions with human feedback", 2022, section 3.5;
packing: Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.data.chat import Encoded, conversations_of, padding_id, unshifted
from llmkit.data.packing import micro_batches
from llmkit.errors import DataError
from llmkit.models.heads import causal_scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Ints,
    Loss,
    Material,
    cross_entropy,
    padded,
    token_metrics,
)
from llmkit.objectives.detail import Detail
from llmkit.objectives.texts import CUT, PASSED_OVER
from llmkit.recipe.schema import Finetune

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

LINE = 4096
"""Tokens of a line that rows are packed into: where rows in a line are kept apart by a mask, it is as large as the
square of this. A processor has less at a time anyway."""

_ROUNDEST = 64
"""Lines are rounded up to a multiple of this, short ones to less of it: in half precision kernels are made, and kept,
for every length there is. At most a 32nd of a line is filled up so."""


def build(section: Finetune, material: Material) -> "Sft":
    """The task as the recipe wants it; conversations are written by the tokenizer's own template, or joined.

    Raises:
        UsageError: The template ends no turn, or does not allow what is to be learned.
    """
    conversations = conversations_of(
        material.tokenizer,
        material.tokenizer.chat_template,
        learn=section.sft.learn,
        max_length=material.max_length,
    )
    return Sft(conversations, padding_id(material.tokenizer), pack=section.sft.pack)


class Sft:
    """The mean over learned tokens of -log p(token | all before it in its conversation)."""

    sums = ("correct",)

    def __init__(self, conversations: Any, pad_id: int, *, pack: bool) -> None:
        self._conversations = conversations
        self._fills = {"input_ids": pad_id, "targets": NOT_LEARNED}
        self._pack = pack
        self.stops: frozenset[int] = conversations.stops

    def encode(self, row: Mapping[str, Any]) -> Example:
        """`input_ids` [T], and `targets` [T], the token after each where the assistant says it.

        Args:
            row: `messages`, and `tools` that the assistant may call.
        """
        return next_tokens(self._conversations.encode(row["messages"], row.get("tools")))

    def texts(self, example: Example) -> dict[str, tuple[Ints, Ints]]:
        """The conversation; see `Shows`."""
        return {"conversation": unshifted(example["input_ids"], example["targets"])}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Lines [L, N] with `position_ids` that restart in each conversation; or [B, T], filled up on the right.

        What fills up is told by its place alone: no target is there, and no target sees it. Examples that are lines
        already, by `line`, stay as they are.
        """
        if self._pack and "position_ids" in examples[0]:
            batch = _stacked(examples)
        elif self._pack:
            batch = in_lines(examples, self._fills["input_ids"])
        else:
            batch = padded(examples, self._fills)
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def line(self, examples: Sequence[Example], width: int) -> Example:
        """Conversations behind each other, filled up to `width` tokens; see `Lines`."""
        return _line(examples, width, self._fills["input_ids"])

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the learned tokens' negative log-likelihood. Logits are made in chunks, for targets only."""
        # position_ids restart in each conversation: with no attention mask given, that is what isolates them.
        scores = causal_scores(model, batch["input_ids"], batch.get("position_ids"))
        targets_N = batch["targets"].flatten()
        total = criterion(scores, targets_N)
        return Loss({TARGETS: total}, {} if model.training else {"correct": scores.num_correct(targets_N)})

    def owners(self, examples: Sequence[Example]) -> Ints:
        """The number of the conversation that each position of a batch is of [N]; -1: of none."""
        if self._pack:
            return in_lines(_numbered(examples), -1)["input_ids"].numpy().ravel()
        return padded(_numbered(examples), {"input_ids": -1})["input_ids"].numpy().ravel()

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """The conversations; what the model finds of each is its loss."""
        lines = [
            {"input": row["messages"][:-1], "target": row["messages"][-1].get("content")} for row in rows
        ]
        return Detail([row["place"] for row in rows], range(len(rows)), lambda _: {}, lines)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats a learned token, its perplexity, and the share of such tokens that were the likeliest."""
        return token_metrics(sums)


def next_tokens(encoded: Encoded) -> dict[str, Ints]:
    """A conversation as what is read and what is to be predicted from it, with counts.

    `cut` are the tokens that did not fit, `passed_over` the answers that are not learned because their first characters
    melt into what is before them.

    Raises:
        DataError: It is a single token, which nothing comes before.
    """
    ids, after = encoded.ids, encoded.ids[1:]
    if not len(after):
        raise DataError("the conversation is a single token: there is nothing to learn it from")
    targets = np.where(encoded.learned[1:], after, NOT_LEARNED)
    counts = {CUT: np.asarray(encoded.cut), PASSED_OVER: np.asarray(encoded.passed_over)}
    return {"input_ids": ids[:-1], "targets": targets, **counts}


def _numbered(examples: Sequence[Example]) -> list[dict[str, Ints]]:
    """Examples of the same lengths whose tokens are their own number."""
    names = ("input_ids", "targets")
    return [
        {name: np.full_like(example["input_ids"], number) for name in names}
        for number, example in enumerate(examples)
    ]


def in_lines(examples: Sequence[Example], pad_id: int, longest: int = LINE) -> dict[str, torch.Tensor]:
    """Examples behind each other: `input_ids`, `targets` and `position_ids`, each [L, N].

    Args:
        examples: Each is whole in one line.
        pad_id: What fills up the lines, as a conversation of which nothing is learned.
        longest: Tokens of a line at most, unless an example has more.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    bins = micro_batches(lengths, budget=longest, world_size=1, packed=True)
    width = max(sum(lengths[number] for number in bin) for bin in bins)
    unit = min(_ROUNDEST, 2 ** max(0, width.bit_length() - 6))
    width = unit * math.ceil(width / unit)
    return _stacked([_line([examples[number] for number in sorted(bin)], width, pad_id) for bin in bins])


def _stacked(lines: Sequence[Example]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([line[name] for line in lines])) for name in lines[0]}


def _line(examples: Sequence[Example], width: int, pad_id: int) -> dict[str, Ints]:
    missing = width - sum(len(example["input_ids"]) for example in examples)
    filling = {"input_ids": np.full(missing, pad_id), "targets": np.full(missing, NOT_LEARNED)}
    parts = [*examples, filling]
    line = {name: np.concatenate([part[name] for part in parts]) for name in filling}
    line["position_ids"] = np.concatenate([np.arange(len(part["input_ids"])) for part in parts])
    return line
