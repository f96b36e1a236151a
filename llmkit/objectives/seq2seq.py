"""A text written for a text: translation, summaries, corrections. Here by an encoder-decoder.

In an evaluation the model writes each row's target itself, by its likeliest tokens or by beams; nothing is drawn.

Shape suffixes: B rows, S positions of the encoder, T positions of the decoder.

**Source**: Sutskever et al., "Sequence to Sequence Learning with Neural Networks", 2014, sections 2 and 3.2; the prefix
is that of Raffel et al., "Exploring the Limits of Transfer Learning" (T5), 2020, section 2.4.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.data.tables import short
from llmkit.errors import DataError, UsageError
from llmkit.metrics.bleu import OverlapRows, bleu, bleu_rows, chrf, chrf_rows
from llmkit.metrics.rouge import rouge, rouge_rows
from llmkit.metrics.scripts import shares_of
from llmkit.objectives.base import (
    NOT_LEARNED,
    Batch,
    Criterion,
    Example,
    Ints,
    Loss,
    Material,
    Objective,
    cross_entropy,
    token_metrics,
)
from llmkit.objectives.cls import all_one
from llmkit.objectives.detail import Detail, worst_first
from llmkit.objectives.encoder_decoder import collate_two_sides, decoder_loss
from llmkit.objectives.texts import CUT, pad_id
from llmkit.recipe.schema import Finetune
from llmkit.recipe.tasks import Written
from llmkit.registry import kind_for

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_MOSTLY = 0.5


def build(section: Finetune, material: Material) -> Objective:
    """The task as the recipe wants it, and as the model does it: `seq2seq_decoder` holds the other way.

    Raises:
        UsageError: The tokenizer has no token that ends a text.
    """
    from llmkit.objectives.seq2seq_decoder import DecoderWriting

    if kind_for(section.task, material.facts) == "causal":
        return DecoderWriting(section.seq2seq, material)
    return Writing(section.seq2seq, material)


class Writing:
    """The mean over the targets' tokens, their end among them, of -log p(token | source, the tokens before it)."""

    sums: Sequence[str] = ()

    def __init__(self, settings: Written, material: Material) -> None:
        self._settings = settings
        self._tokenizer = material.tokenizer
        self._max_length = material.max_length
        self._language = material.language
        if material.tokenizer.eos_token_id is None:
            raise UsageError(
                "this tokenizer has no token that ends a text, so the model could not learn where to stop",
                hint="use the tokenizer of an encoder-decoder, such as a T5's or a BART's",
            )
        self._end = int(material.tokenizer.eos_token_id)

    def prepare(self, model: "PreTrainedModel") -> None:
        """Keep with the model how it is asked and how it writes, so that it is used as it was trained."""
        if self._settings.prefix:
            model.config.prefix = self._settings.prefix
        model.generation_config.max_new_tokens = self._settings.max_target
        model.generation_config.max_length = None
        model.generation_config.num_beams = self._settings.num_beams

    def encode(self, row: Mapping[str, Any]) -> Example:
        """`input_ids` [S], the source, and `targets` [T], both with the end token; and `cut`.

        A target that is too long loses its end token too: it does not end there.

        Args:
            row: `source`, and `target`, if it is known.

        Raises:
            DataError: The tokenizer does not know the letters of the target.
        """
        source, target = row.get("source", row.get("text")), row.get("target")
        read_S = self._ended(self._tokenizer(self._settings.prefix + source, verbose=False))
        written_T = [] if target is None else self._ended(self._tokenizer(text_target=target, verbose=False))
        self.refuse_unknown(written_T, target)
        spare_read = max(0, len(read_S) - self._max_length)
        spare_written = max(0, len(written_T) - self._settings.max_target)
        if spare_read:
            read_S = [*read_S[: self._max_length - 1], self._end]
        written_T = written_T[: self._settings.max_target] or [NOT_LEARNED]
        return {
            "input_ids": np.array(read_S),
            "targets": np.array(written_T),
            CUT: np.asarray(spare_read + spare_written),
        }

    def refuse_unknown(self, ids: Sequence[int], text: str | None) -> None:
        """Stop at a target that the vocabulary lacks the letters of: the model could never write it."""
        unknown = ids.count(self._tokenizer.unk_token_id)
        if 2 * unknown >= max(2, len(ids) - 1):
            raise DataError(
                f"the tokenizer does not know the letters of the target {short(text)!r}: "
                f"{unknown} of its {len(ids) - 1} tokens are unknown, and the model could never write it",
                hint="take a model whose vocabulary has this language",
            )

    def _ended(self, encoded: Mapping[str, Any]) -> list[int]:
        """The ids, with the end token where the tokenizer does not set it."""
        ids = list(encoded["input_ids"])
        return ids if ids and ids[-1] == self._end else [*ids, self._end]

    def size(self, example: Example) -> int:
        """Tokens of the source and of the target."""
        return len(example["input_ids"]) + len(example["targets"])

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack `input_ids` to [B, S], `targets` to [B, T]."""
        return collate_two_sides(examples, pad=pad_id(self._tokenizer))

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the tokens' negative log-likelihood; in an evaluation also what the model writes."""
        made = decoder_loss(model, batch, criterion)
        if model.training or not self._settings.write:
            return made
        return Loss(made.totals, found=self._written(model, batch))

    def _written(self, model: "PreTrainedModel", batch: Batch) -> list[str]:
        mask_BS = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        ids_BT = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=mask_BS,
            max_new_tokens=self._settings.max_target,
            num_beams=self._settings.num_beams,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad_id(self._tokenizer),
            eos_token_id=self._end,
        )
        texts: list[str] = self._tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats a token, and its perplexity."""
        return token_metrics(sums)

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """BLEU and chrF in 0-100 where sacrebleu is installed, ROUGE in 0-1."""
        references = [[row["target"]] for row in rows]
        language = self._language_of([row["target"] for row in rows])
        figures = rouge(found, references, language=language)
        if find_spec("sacrebleu") is not None:
            figures["bleu"] = bleu(found, references, language=language).value
            figures["chrf"] = chrf(found, references).value
        return figures

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """The rows whose text is least like its reference."""
        keys, owner = [row["place"] for row in rows], range(len(rows))
        if not found:
            lines = [{"input": row["source"], "target": row["target"]} for row in rows]
            return Detail(keys, owner, lambda _: {}, lines)
        references = [[row["target"]] for row in rows]
        language = self._language_of([row["target"] for row in rows])
        scores = rouge_rows(found, references, language=language)
        likeness, overlaps = list[float](scores["rougeL"]), dict[str, OverlapRows]()
        if find_spec("sacrebleu") is not None:
            overlaps["bleu"] = bleu_rows(found, references, language=language)
            overlaps["chrf"] = chrf_rows(found, references)
            likeness = [overlaps["chrf"].value(np.array([number])) for number in owner]

        def figures(items: Ints) -> dict[str, float]:
            means = {name: float(values_N[items].mean()) for name, values_N in scores.items()}
            return {**means, **{name: one.value(items) for name, one in overlaps.items()}}

        lines = [
            {"input": row["source"], "target": row["target"], "prediction": said, "score": float(score)}
            for row, said, score in zip(rows, found, likeness, strict=True)
        ]
        return Detail(
            keys,
            owner,
            figures,
            lines,
            errors=worst_first([-score for score in likeness]),
            warnings=all_one(set(found), {row["target"] for row in rows}),
        )

    def _language_of(self, targets: Sequence[str]) -> str:
        """What is written: as the recipe says; else Chinese or English by their letters, where its own does not fit."""
        if self._settings.target_language is not None:
            return self._settings.target_language
        han, ascii_ = shares_of(targets)
        if han > _MOSTLY:
            return "zh"
        return "en" if ascii_ > _MOSTLY and self._language.startswith("zh") else self._language

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model writes for a row."""
        return {"text": found}
