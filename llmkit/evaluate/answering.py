"""What a model writes to many prompts: sorted by length, in batches, by the likeliest tokens, by beams, or drawn.

What is drawn for a row depends on the seed and the row alone, whatever else is in its batch: instead of drawing a token
from the probabilities, noise is added to their logarithms and the largest is taken, which is the same distribution. The
noise comes from a generator of the row's own.

Shape suffixes: B rows, V vocabulary, T tokens.

**Source**: Maddison et al., "A* Sampling", 2014, section 2 (the Gumbel-max trick); Holtzman et al., "The Curious Case
of Neural Text Degeneration", 2020, section 3.1 (top-p).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmkit.data.chat import Template
from llmkit.errors import DataError, UsageError
from llmkit.evaluate.generate import Continuation, encode, generate, room_of
from llmkit.evaluate.prompts import Prompt
from llmkit.recipe.evaluation import Generation
from llmkit.recipe.schema import Sampling

_TOKENS_AT_ONCE = 4096
_MOST_ROWS = 32
_TAIL = 24
"""Tokens at the end of what was written in which a text that ends it is looked for: no such text is longer."""


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        text: Without what ended it, and without blanks around it.
        num_tokens: Its tokens, the end token included.
        finished: Whether it ended by itself or at a text that ends it, rather than at the limit.
        cut: Tokens of the prompt's beginning that did not fit.
        room: Tokens that it may have at most: as asked, or fewer, where the model's length leaves fewer.
    """

    text: str
    num_tokens: int
    finished: bool
    cut: int
    room: int


def inputs_of(tokenizer: Any, prompts: Sequence[Prompt], *, chat: bool) -> list[str]:
    """What the model is given for each prompt.

    Args:
        tokenizer: The model's.
        prompts: Texts or conversations.
        chat: Texts are the first turn of a conversation. Conversations always go through the chat template.

    Raises:
        UsageError: There is a conversation and no template.
        DataError: A text spells a special token, or the template refuses a conversation or leaves out its tools.
    """
    if not chat and not any(prompt.messages for prompt in prompts):
        return [prompt.text for prompt in prompts]
    if not tokenizer.chat_template:
        return [_joined(prompt, tokenizer) for prompt in prompts]
    template = Template(tokenizer)
    return [_rendered(template, prompt) for prompt in prompts]


def _rendered(template: Template, prompt: Prompt) -> str:
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    spelled = template.control_token(messages)
    if spelled is not None:
        raise DataError(
            f"{prompt.place}: the text spells the special token {spelled[1]!r}, which would be taken for the real one",
            hint="take it out of the row",
        )
    text = template.render(messages, prompt.tools, prompt=True)
    if prompt.tools and text == template.render(messages, prompt=True):
        raise DataError(
            f"{prompt.place}: the model's chat template leaves out the tools",
            hint="measure a model whose template writes them, or take `tools` out of the rows",
        )
    return text


def _joined(prompt: Prompt, tokenizer: Any) -> str:
    """A question as a model reads it that learned prompt and answer with nothing between."""
    if [turn["role"] for turn in prompt.messages] not in ([], ["user"]) or prompt.tools:
        what = "with tools" if prompt.tools else "of several turns"
        raise UsageError(
            f"{prompt.place} is a conversation {what}, and tokenizer {tokenizer.name_or_path!r} has no chat template "
            "to write it with",
            hint="measure a model with a chat template, or give rows of `prompt, references`",
        )
    return prompt.text


def write_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: Generation,
    *,
    seed: int,
    keys: Sequence[str],
    told: Callable[[int], None] | None = None,
) -> list[Written]:
    """What the model writes to each text, in their order.

    Args:
        model: A causal or an encoder-decoder model.
        tokenizer: Its tokenizer.
        texts: What it goes on from, or reads.
        settings: How it writes.
        seed: What is drawn is a function of this and the row's key.
        keys: What each row is.
        told: Told how many rows were done, batch after batch.

    Raises:
        UsageError: Beams are to be drawn.
    """
    if settings.temperature and settings.beams > 1:
        raise UsageError(
            f"`beams: {settings.beams}` looks for the likeliest text and `temperature: {settings.temperature:g}` draws "
            "one",
            hint="eval.generation.temperature=0, or eval.generation.beams=1",
        )
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=0)
    lengths = [len(ids) for ids in encode(model, tokenizer, texts)]
    rooms = [room_of(model, length, settings.max_new_tokens) for length in lengths]
    found: dict[int, Written] = {}
    for rows in _batches(lengths, rooms, settings):
        some = [texts[row] for row in rows]
        more = _decoding(settings, tokenizer, [_seed(seed, keys[row]) for row in rows])
        made = generate(model, tokenizer, some, sampling, seed=seed, batch_size=len(rows), more=more)
        for row, one in zip(rows, made, strict=True):
            found[row] = _ended(one, settings.stop, tokenizer, rooms[row])
        if told is not None:
            told(len(rows))
    return [found[row] for row in range(len(texts))]


def _batches(lengths: Sequence[int], rooms: Sequence[int], settings: Generation) -> list[list[int]]:
    """Rows of about one length together, the longest first, so that what does not fit in memory fails at once.

    Those of a batch have the same room: what draws and what stops is of one batch, which `generate` then leaves whole.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    left = 0
    for row in order:
        if left == 0 or rooms[row] != rooms[batches[-1][-1]]:
            width = (lengths[row] + settings.max_new_tokens) * settings.beams
            left = max(1, min(_MOST_ROWS, _TOKENS_AT_ONCE // width))
            batches.append([])
        batches[-1].append(row)
        left -= 1
    return batches


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=7).digest(), "big")


def _decoding(
    settings: Generation, tokenizer: PreTrainedTokenizerBase, seeds: Sequence[int]
) -> dict[str, Any]:
    more: dict[str, Any] = {"num_beams": settings.beams, "do_sample": False}
    if settings.temperature:
        more["logits_processor"] = LogitsProcessorList([_Drawn(settings, seeds)])
    if settings.stop:
        more["stopping_criteria"] = StoppingCriteriaList([_Stopped(settings.stop, tokenizer)])
    return more


class _Drawn(LogitsProcessor):
    """Scores whose largest is a token drawn by temperature, top-k and top-p, each row by a generator of its own."""

    def __init__(self, settings: Generation, seeds: Sequence[int]) -> None:
        self._warpers: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
        if settings.top_k is not None:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))
        self._chances = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores_BV: Any = scores
        for warper in self._warpers:
            scores_BV = warper(input_ids, scores_BV)
        noise_BV = torch.stack(
            [
                torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=chance)
                for chance in self._chances
            ]
        )
        drawn: torch.FloatTensor = scores_BV - noise_BV.log().to(scores_BV.device, scores_BV.dtype)
        return drawn


class _Stopped(StoppingCriteria):
    """Whether each row holds a text that ends it, in what was written so far."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._stop = stop
        self._tokenizer = tokenizer
        self._start: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        if self._start is None:  # asked first when one token was written
            self._start = input_ids.shape[1] - 1
        tails = self._tokenizer.batch_decode(input_ids[:, max(self._start, input_ids.shape[1] - _TAIL) :])
        ended = [any(mark in tail for mark in self._stop) for tail in tails]
        answer: Any = torch.tensor(ended, device=input_ids.device)
        return answer


def _ended(one: Continuation, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, room: int) -> Written:
    places = [place for mark in stop if (place := one.text.find(mark)) >= 0]
    if not places:
        return Written(one.text.strip(), one.num_tokens, one.finished, one.prompt_cut, room)
    text = one.text[: min(places)]
    num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Written(text.strip(), num_tokens, finished=True, cut=one.prompt_cut, room=room)
