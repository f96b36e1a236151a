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
    training = model.training
    model.eval()
    try:
        return [_fill_one(model, vocabulary, prompt, top) for prompt in prompts]
    finally:
        model.train(training)


@torch.inference_mode()
def _fill_one(model: PreTrainedModel, vocabulary: Vocabulary, prompt: str, top: int) -> Filled:
    mask = vocabulary.role("mask_token")
    parts = prompt.replace(vocabulary.backend.id_to_token(mask), GAP).split(GAP)
    encoded = [vocabulary.encode(part) for part in parts]
    ids = [vocabulary.role("cls_token"), *encoded[0]]
    for part in encoded[1:]:
        ids += [mask, *part]
    ids.append(vocabulary.role("sep_token"))
    limit = max_length(model.config)
    if limit is not None and len(ids) > limit:
        raise UsageError(
            f"the text has {len(ids):,} tokens, the model reads at most {limit:,}: {prompt[:40]!r}..."
        )
    where = torch.tensor([place for place, number in enumerate(ids) if number == mask], dtype=torch.int64)
    if not len(where):
        return Filled(prompt, prompt, [])
    scores, _ = masked_scores(model, input_ids=torch.tensor([ids], device=model.device))
    logits_GV = scores.logits(where.to(model.device)).float()
    logits_GV[:, list(vocabulary.special_ids)] = -torch.inf
    best = torch.softmax(logits_GV, dim=1).topk(top, dim=1)
    gaps = [
        Gap([vocabulary.decode([number]) for number in numbers], probabilities)
        for numbers, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    for place, number in zip(where.tolist(), best.indices[:, 0].tolist(), strict=True):
        ids[place] = number
    return Filled(prompt, vocabulary.decode(ids[1:-1]), gaps)
