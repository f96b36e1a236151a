"""Fill the gaps of a text with a masked language model.

Shape suffixes: G gaps of a text, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import UsageError
from llmkit.models.build import max_length
from llmkit.models.heads import masked_scores

GAP = "[MASK]"
"""How a gap is written, whatever the tokenizer's own token is."""


@dataclass(frozen=True)
class Gap:
    """What may stand in one gap.

    Attributes:
        tokens: The likeliest tokens as text, best first.
        probabilities: Theirs.
    """

    tokens: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Filled:
    """A text and its gaps.

    Attributes:
        prompt: The text as it was given.
        text: The same with the likeliest token in each gap.
        gaps: One for each gap, in order.
    """

    prompt: str
    text: str
    gaps: list[Gap]


def fill(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, top: int = 5
) -> list[Filled]:
    """Fill each `[MASK]`, or the tokenizer's own mask token, of each text; gaps of one text are filled independently.

    Args:
        model: A masked language model.
        tokenizer: Its tokenizer.
        prompts: Texts, with any number of gaps.
        top: Tokens to give for each gap.

    Raises:
        UsageError: A text is longer than the model reads, or the tokenizer has no mask token.
    """
    vocabulary = Vocabulary.of(tokenizer)
    limits = [limit for limit in (max_length(model.config), tokenizer.model_max_length) if limit]
    training = model.training
    model.eval()
    try:
        return [_fill_one(model, vocabulary, min(limits, default=None), prompt, top) for prompt in prompts]
    finally:
        model.train(training)


@torch.inference_mode()
def _fill_one(
    model: PreTrainedModel, vocabulary: Vocabulary, limit: int | None, prompt: str, top: int
) -> Filled:
    ids, places = _with_gaps(vocabulary, prompt)
    if limit is not None and len(ids) > limit:
        raise UsageError(
            f"the text has {len(ids):,} tokens with its frame, the model reads at most {limit:,}: {prompt[:40]!r}...",
            hint="leave out what is far from the gaps",
        )
    if not places:
        return Filled(prompt, prompt, [])
    where = torch.tensor(places, device=model.device)
    scores, _ = masked_scores(model, input_ids=torch.tensor([ids], device=model.device))
    logits_GV = scores.logits(where).float()[:, : vocabulary.size]
    logits_GV[:, list(vocabulary.special_ids)] = -torch.inf
    best = torch.softmax(logits_GV, dim=1).topk(
        min(top, vocabulary.size - len(vocabulary.special_ids)), dim=1
    )
    gaps = [
        Gap([_written(vocabulary, number) for number in numbers], probabilities)
        for numbers, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    for place, number in zip(places, best.indices[:, 0].tolist(), strict=True):
        ids[place] = number
    return Filled(prompt, vocabulary.decode(ids[1:-1]), gaps)


def _with_gaps(vocabulary: Vocabulary, prompt: str) -> tuple[list[int], list[int]]:
    """The ids of `[CLS] text [SEP]`, and where the gaps are.

    A blank before a gap belongs to the hidden word: vocabularies spell the two as one token.
    """
    mask = vocabulary.role("mask_token")
    parts = split_at_gaps(vocabulary, prompt)
    ids = [vocabulary.role("cls_token")]
    places = []
    for part in parts[:-1]:
        ids += vocabulary.encode(part.removesuffix(" "))
        places.append(len(ids))
        ids.append(mask)
    ids += [*vocabulary.encode(parts[-1]), vocabulary.role("sep_token")]
    return ids, places


def split_at_gaps(vocabulary: Vocabulary, prompt: str) -> list[str]:
    """The text between the gaps; one piece where there is none.

    Raises:
        UsageError: The tokenizer has no mask token.
    """
    own = vocabulary.backend.id_to_token(vocabulary.role("mask_token"))
    return prompt.replace(own, GAP).split(GAP)


def _written(vocabulary: Vocabulary, number: int) -> str:
    """A token as text; one that is a part of a character by its bytes, `<0xE6>`."""
    text = vocabulary.decode([number])
    if "\ufffd" not in text:
        return text
    return "".join(f"<0x{byte:02X}>" for byte in vocabulary.spellings[number])
