"""Fill in the middle: some documents are cut in three at random characters, and the middle is moved to the end.

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle (end)
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle (end)

Every token is a target, as in a causal language model; documents that are not chosen stay as they are. It is done to
the parts of documents that a row holds ("context level"). Prefix, middle and suffix are cut into tokens each by itself,
since that is how they come when the model is used, and a middle always has its end, also where the row's border cuts
the document off. What is added takes the place of text at the row's end: there a document loses the end of its suffix,
then the beginning of its prefix, never its middle, a mark or its end; where even that leaves no room it stays as it is.
Bytes of a character that the row's border cuts through stay at the far ends of prefix and suffix, as the tokens they
are.

**Source**: Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", section 3 (the
second form is the one that shares a beginning with the first, the appendix's second variant).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from llmkit.data.rows import Ints
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import UsageError
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
from llmkit.recipe.objectives import Fim
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_FILLS = {"input_ids": 0, "targets": NOT_LEARNED, "position_ids": 0}
_LONGEST_CHARACTER = 4
_PROBE = "x  y\n z"


def build(section: Pretrain, vocabulary: Vocabulary) -> "FillInTheMiddle":
    """The objective as the recipe wants it.

    Raises:
        UsageError: The tokenizer's entries do not spell the text, so that it cannot be cut at a character.
    """
    return FillInTheMiddle(
        section.fim, vocabulary, isolate=section.isolate_documents, context=section.model.context
    )


@dataclass(frozen=True)
class _Parts:
    """A document cut in three, as tokens."""

    prefix: Ints
    middle: Ints
    suffix: Ints

    def shortened(self, excess: int) -> "_Parts | None":
        """The same with so many tokens less at the far ends; None where only a middle would be left to take from."""
        if excess > len(self.prefix) + len(self.suffix):
            return None
        from_suffix = min(max(excess, 0), len(self.suffix))
        from_prefix = max(excess, 0) - from_suffix
        return _Parts(self.prefix[from_prefix:], self.middle, self.suffix[: len(self.suffix) - from_suffix])


class FillInTheMiddle:
    """The mean over targets of -log p(token | tokens before it), on rearranged documents.

    Args:
        settings: How many documents, and in which form.
        vocabulary: Spells text to the byte, and has the three marks.
        isolate: Whether documents that share a row are kept apart.
        context: Positions of a row.
    """

    sums = ()

    def __init__(self, settings: Fim, vocabulary: Vocabulary, *, isolate: bool, context: int) -> None:
        self._settings = settings
        self._vocabulary = vocabulary
        self._isolate = isolate
        self._context = context
        names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
        self._prefix, self._suffix, self._middle = ([vocabulary.id_of(name)] for name in names)
        self._end = vocabulary.role("eos_token")
        _check_spelling(vocabulary)

    def encode(self, row: Example) -> Example:
        """Rearrange documents of a row, and shift it by one.

        Args:
            row: `ids` [T+1], `positions` [T+1] counted from the start of each token's document, and `seed`.
        """
        ids = row["ids"]
        chance = np.random.default_rng(int(row["seed"]))
        pieces: list[Ints] = []
        room = len(ids)
        for piece in np.split(ids, np.flatnonzero(row["positions"][1:] == 0) + 1):
            if room > 0:
                pieces.append(self._rearranged(piece, room, chance)[:room])
                room -= len(pieces[-1])
        return self._example(pieces)

    def _example(self, pieces: Sequence[Ints]) -> Example:
        line = np.concatenate(pieces)
        example = {"input_ids": line[:-1], "targets": line[1:]}
        if self._isolate:
            positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
            example["targets"] = np.where(positions[1:] == 0, NOT_LEARNED, line[1:])
            example["position_ids"] = positions[:-1]
        return example

    def _rearranged(self, piece: Ints, room: int, chance: np.random.Generator) -> Ints:
        """A document, or the part of one that the row holds, by chance rearranged to fit `room` tokens."""
        chosen, suffix_first = chance.random(2) < (self._settings.ratio, self._settings.suffix_first_ratio)
        cuts = chance.random(2)
        text = piece[:-1] if piece[-1] == self._end else piece
        if not chosen or not len(text) or self._vocabulary.is_special[text].any():
            return piece
        parts = self._cut(text, cuts)
        parts = parts and parts.shortened(
            4 + len(parts.prefix) + len(parts.middle) + len(parts.suffix) - room
        )
        if parts is None:
            return piece
        if suffix_first:
            order = [self._prefix, self._suffix, parts.suffix, self._middle, parts.prefix, parts.middle]
        else:
            order = [self._prefix, parts.prefix, self._suffix, parts.suffix, self._middle, parts.middle]
        return np.concatenate([*order, [self._end]]).astype(np.int64)

    def _cut(self, ids: Ints, cuts: npt.NDArray[np.float64]) -> _Parts | None:
        """Prefix, middle and suffix between two characters each; None where the text is not valid UTF-8."""
        found = self._whole_characters(ids)
        if found is None:
            return None
        before, text, after = found
        first, second = sorted((cuts * (len(text) + 1)).astype(int).tolist())
        prefix, middle, suffix = (
            np.array(self._vocabulary.encode(part), dtype=np.int64)
            for part in (text[:first], text[first:second], text[second:])
        )
        return _Parts(np.append(before, prefix), middle, np.append(suffix, after))

    def _whole_characters(self, ids: Ints) -> tuple[Ints, str, Ints] | None:
        """The text of the tokens, without those at either end that hold a part of a character."""
        spelled = [self._vocabulary.spellings[number] for number in ids.tolist()]
        first = 0
        while first < len(spelled) and b"\x80" <= spelled[first][:1] < b"\xc0":
            first += 1
        for last in range(len(spelled), max(first, len(spelled) - _LONGEST_CHARACTER), -1):
            try:
                return ids[:first], b"".join(spelled[first:last]).decode(), ids[last:]
            except UnicodeDecodeError:
                continue
        return None

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack rows to [B, T], filled up on the right to the row's width where parts of documents came out shorter."""
        batch = padded(examples, _FILLS, width=self._context)
        batch["num_targets"] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the targets' negative log-likelihood."""
        scores = causal_scores(model, batch["input_ids"], batch.get("position_ids"))
        return Loss({"num_targets": criterion(scores, batch["targets"].flatten())})

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per target and its perplexity; marks are targets too, so there is no figure by the byte."""
        return token_metrics(sums)


def _check_spelling(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(_PROBE)
    spelled = b"".join(vocabulary.spellings[number] for number in ids)
    if spelled != _PROBE.encode() and not vocabulary.is_special[ids].any():
        raise UsageError(
            f"tokenizer {vocabulary.name!r} does not keep text as it is ({_PROBE!r} becomes {spelled.decode()!r}), "
            "so `fim` cannot cut its text at characters",
            hint="a tokenizer that the recipe learns (`tokenize`), or another byte-level one",
        )
