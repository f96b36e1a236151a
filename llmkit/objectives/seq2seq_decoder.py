"""A text written for a text by a decoder: one row holds the source and then the target, which alone is learned.

Where the tokenizer has a chat template the source is what the user says and the target is the answer, so that whatever
serves the model asks it as it was trained. Else `separator` stands between them. Each is encoded by itself, as the
target is when the model writes it token by token.

Shape suffixes: B rows, T positions of a row, P positions of a prompt.

**Source**: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019, section 3 (a pair as
one text); the source's loss is left out as in instruction tuning, and as of prefix language models: Raffel et al.,
"Exploring the Limits of Transfer Learning" (T5), 2020, section 3.2.1.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.data.chat import conversations_of, unshifted
from llmkit.data.tables import short
from llmkit.errors import DataError, UsageError
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
)
from llmkit.objectives.detail import Detail
from llmkit.objectives.seq2seq import Writing
from llmkit.objectives.texts import CUT, pad_id
from llmkit.recipe.tasks import Written

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

PROMPT = "prompt_lengths"


def asked_text(settings: Written, source: str, *, chat: bool) -> str:
    """A source as the model is given it: what the user says in a chat, or what the model goes on from.

    Args:
        settings: Those that the model was trained by.
        source: The text.
        chat: Whether a chat template says where it ends.
    """
    end = "\n" if settings.separator is None else settings.separator
    return settings.prefix + source + ("" if chat else end)


class DecoderWriting:
    """The mean over the targets' tokens, their end among them, of -log p(token | source, the tokens before it).

    What is measured of what the model writes is as of an encoder-decoder, by `Writing`.

    Args:
        settings: The recipe's.
        material: Tokenizer, length and language.

    Raises:
        UsageError: The tokenizer has no end token, or its template ends no turn; targets may fill the whole row.
    """

    sums: Sequence[str] = ()

    def __init__(self, settings: Written, material: Material) -> None:
        if settings.max_target >= material.max_length:
            raise UsageError(
                f"seq2seq.max_target is {settings.max_target}, and a row of {material.max_length} tokens holds the "
                "source too",
                hint=f"finetune.seq2seq.max_target={max(1, material.max_length // 2)}, or a larger model.context",
            )
        self._settings = settings
        self._tokenizer = material.tokenizer
        self._max_length = material.max_length
        self._template = bool(getattr(material.tokenizer, "chat_template", None))
        self._conversations = conversations_of(
            material.tokenizer, material.tokenizer.chat_template, learn="last"
        )
        self._like = Writing(settings, material)
        # As whatever serves the model stops: at the end of a turn and at the end of a text.
        self.stops: frozenset[int] = self._conversations.stops | {int(material.tokenizer.eos_token_id)}

    def prepare(self, model: "PreTrainedModel") -> None:
        """Keep with the model how it writes, so that it is used as it was trained."""
        model.generation_config.max_new_tokens = self._settings.max_target
        model.generation_config.max_length = None
        model.generation_config.num_beams = self._settings.num_beams

    def encode(self, row: Mapping[str, Any]) -> Example:
        """`input_ids` [T], `targets` [T], the token after each in the target; `prompt_lengths` and `cut`.

        A target that is too long loses its end, which is not learned then; a source that leaves it no room loses its.

        Args:
            row: `source`, and `target`, if it is known.

        Raises:
            DataError: The tokenizer does not know the letters of the target, or there is no room for any source.
        """
        source, target = str(row.get("source", row.get("text"))), row.get("target")
        prompt, written = self._pair(source, target)
        kept = written[: self._settings.max_target]
        # As much room as the model takes to write, so that training and serving read the same of a source.
        prompt, cut = self._shortened(prompt, source, self._max_length - self._settings.max_target)
        ids = np.array([*prompt, *kept], dtype=np.int64)
        counts = {PROMPT: np.array([len(prompt)]), CUT: np.asarray(cut + len(written) - len(kept))}
        if not kept:
            return {"input_ids": ids, "targets": np.full_like(ids, NOT_LEARNED), **counts}
        is_target = np.arange(1, len(ids)) >= len(prompt)
        return {"input_ids": ids[:-1], "targets": np.where(is_target, ids[1:], NOT_LEARNED), **counts}

    def _pair(self, source: str, target: str | None) -> tuple[list[int], list[int]]:
        """The ids of what the model goes on from, and of the target with the token that ends it."""
        asked = {"role": "user", "content": self._asked(source)}
        if target is None:
            return self._conversations.prompt_ids([asked]), []
        plain = self._tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"]
        self._like.refuse_unknown([*plain, -1], target)
        whole = self._conversations.encode([asked, {"role": "assistant", "content": target}])
        learned = np.flatnonzero(whole.learned)
        return whole.ids[: learned[0]].tolist(), whole.ids[learned[0] : learned[-1] + 1].tolist()

    def _shortened(self, prompt: list[int], source: str, room: int) -> tuple[list[int], int]:
        """A prompt in at most so many tokens, and how many of its source's were left out at the end."""
        if len(prompt) <= room:
            return prompt, 0
        pieces = list(self._tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"])
        keep = len(pieces)
        while len(prompt) > room:
            keep -= len(prompt) - room
            if keep < 1:
                raise DataError(
                    f"no room for the source {short(source)!r}: what stands around it and seq2seq.max_target fill "
                    f"all {self._max_length} tokens",
                    hint="a smaller seq2seq.max_target or a larger model.context",
                )
            prompt = self._pair(self._tokenizer.decode(pieces[:keep]), None)[0]
        return prompt, len(pieces) - keep

    def _asked(self, source: str) -> str:
        return asked_text(self._settings, source, chat=self._template)

    def size(self, example: Example) -> int:
        """Tokens of the row."""
        return len(example["input_ids"])

    def texts(self, example: Example) -> dict[str, tuple[Ints, Ints]]:
        """The row; see `Shows`."""
        return {"pair": unshifted(example["input_ids"], example["targets"])}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to [B, T], filled up on the right: no target is there, and no target sees it."""
        fills = {"input_ids": pad_id(self._tokenizer), "targets": NOT_LEARNED}
        batch = padded(examples, fills)
        batch[PROMPT] = torch.from_numpy(np.concatenate([example[PROMPT] for example in examples]))
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the tokens' negative log-likelihood; in an evaluation also what the model writes."""
        total = criterion(causal_scores(model, batch["input_ids"], None), batch["targets"].flatten())
        if model.training or not self._settings.write:
            return Loss({TARGETS: total})
        return Loss({TARGETS: total}, found=self._written(model, batch))

    def _written(self, model: "PreTrainedModel", batch: Batch) -> list[str]:
        """What the model writes for each row: it goes on from the prompts, filled up on the left."""
        lengths = batch[PROMPT].tolist()
        width, pad = max(lengths), pad_id(self._tokenizer)
        prompt_BP = batch["input_ids"].new_full((len(lengths), width), pad)
        mask_BP = torch.zeros_like(prompt_BP)
        for row, length in enumerate(lengths):
            prompt_BP[row, width - length :] = batch["input_ids"][row, :length]
            mask_BP[row, width - length :] = 1
        ids_BT = model.generate(
            input_ids=prompt_BP,
            attention_mask=mask_BP,
            max_new_tokens=self._settings.max_target,
            num_beams=self._settings.num_beams,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(self.stops),
        )
        return [self._said(ids) for ids in ids_BT[:, width:].tolist()]

    def _said(self, ids: Sequence[int]) -> str:
        end = next((place for place, number in enumerate(ids) if number in self.stops), len(ids))
        text: str = self._tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip()

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats a token, and its perplexity."""
        return self._like.summarise(sums)

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """BLEU and chrF in 0-100 where sacrebleu is installed, ROUGE in 0-1."""
        return self._like.measure(rows, found)

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """The rows whose text is least like its reference."""
        return self._like.detail(rows, found)

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model writes for a row."""
        return self._like.predict(row, found)
