"""Text from a model, in batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.models.attention import kernels_of
from llmkit.models.build import max_length, set_attention
from llmkit.recipe.schema import Sampling
from llmkit.registry import SENTINELS


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        prompt: The text it was given.
        text: What it added, without the prompt.
        num_tokens: Tokens added, the end token included.
        finished: Whether it ended by itself rather than at the limit.
        prompt_cut: Tokens of the prompt's beginning that did not fit the model's length.
    """

    prompt: str
    text: str
    num_tokens: int
    finished: bool
    prompt_cut: int = 0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int = 16,
    more: Mapping[str, Any] | None = None,
) -> list[Continuation]:
    """Continue each prompt, `batch_size` at a time.

    Prompts that leave less room in the model's length than is asked for are computed apart: else the longest of a batch
    would decide how much all others may write.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with an end token and a padding token.
        prompts: Texts to go on from; an empty one starts from the beginning of a document.
        sampling: How to draw.
        seed: The draw is a function of this, the prompts and the batch size.
        batch_size: Prompts computed together.
        more: Further arguments of transformers' `generate`; they stand above `sampling`. What is of rows in them, such
            as a state, is of one batch: then all prompts must have the same room.
    """
    torch.manual_seed(seed)
    encoded = encode(model, tokenizer, prompts)
    rooms = [room_of(model, len(ids), sampling.max_new_tokens) for ids in encoded]
    write = _answer_batch if model.config.is_encoder_decoder else _generate_batch
    found: dict[int, Continuation] = {}
    with _ready_to_generate(model):
        for rows in _batches(rooms, batch_size):
            some, ids = [prompts[row] for row in rows], [encoded[row] for row in rows]
            made = write(model, tokenizer, some, ids, rooms[rows[0]], {**_draw(sampling), **(more or {})})
            found |= dict(zip(rows, made, strict=True))
    return [found[row] for row in range(len(prompts))]


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[list[int]]:
    """The ids that a model is given for each prompt, before any are cut.

    Args:
        model: A causal or an encoder-decoder model.
        tokenizer: Its tokenizer.
        prompts: Texts to go on from, or to read.
    """
    if model.config.is_encoder_decoder:
        prefix = getattr(model.config, "prefix", None) or ""  # that of fine-tuning
        return [_ended(tokenizer(prefix + p, verbose=False)["input_ids"], tokenizer) for p in prompts]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [tokenizer(p, add_special_tokens=False, verbose=False)["input_ids"] or [start] for p in prompts]


def room_of(model: PreTrainedModel, length: int, max_new_tokens: int) -> int:
    """Tokens that a model can write to a prompt: those asked for, or what the prompt leaves of the model's length.

    Args:
        model: A causal or an encoder-decoder model.
        length: Tokens of the prompt, before any are cut.
        max_new_tokens: Tokens asked for.
    """
    limit = _limit(model)
    if model.config.is_encoder_decoder:
        return min(max_new_tokens, limit - 1)
    # The prompt goes before what is to come: only one that would leave under a quarter of the length is cut.
    least = min(max_new_tokens, max(1, limit // 4))
    return min(max_new_tokens, max(least, limit - length))


def _limit(model: PreTrainedModel) -> int:
    return max_length(model.config) or 1 << 30


def _batches(rooms: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows with the same room together, in their order."""
    for room in dict.fromkeys(rooms):
        rows = [row for row, own in enumerate(rooms) if own == room]
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


@contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and an attention that takes a cache; afterwards all is as before."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if kernels_of(model):
        set_attention(model, "sdpa")
    try:
        with torch.inference_mode():
            yield
    finally:
        if kernels_of(model):
            set_attention(model, attention)
        model.train(training)


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    room: int,
    more: Mapping[str, Any],
) -> list[Continuation]:
    """What a causal model goes on with after each prompt; all leave it the same room."""
    longest = _limit(model) - room
    fitting = [ids[-longest:] for ids in encoded]
    width = max(map(len, fitting))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = [[pad] * (width - len(ids)) + ids for ids in fitting]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in fitting]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=room,
        use_cache=True,  # whatever the configuration says: without it generation is eight times slower
        pad_token_id=pad,
        eos_token_id=_ends(model, tokenizer),
        **more,
    )
    rows = output[:, width:].tolist()
    return [
        _continuation(model, tokenizer, prompt, row, cut=len(ids) - len(kept))
        for prompt, row, ids, kept in zip(prompts, rows, encoded, fitting, strict=True)
    ]


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    room: int,
    more: Mapping[str, Any],
) -> list[Continuation]:
    """What an encoder-decoder writes when it has read each prompt."""
    fitting = [ids[-_limit(model) :] for ids in encoded]
    width = max(map(len, fitting))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=torch.tensor([ids + [pad] * (width - len(ids)) for ids in fitting], device=model.device),
        attention_mask=torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids in fitting], device=model.device
        ),
        max_new_tokens=room,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=_ends(model, tokenizer),
        **more,
    )
    rows = output[:, 1:].tolist()  # without the start token
    return [
        _continuation(model, tokenizer, prompt, row, cut=len(ids) - len(kept))
        for prompt, row, ids, kept in zip(prompts, rows, encoded, fitting, strict=True)
    ]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids, with the end token where the tokenizer does not set it."""
    end = tokenizer.eos_token_id
    return ids if ids and ids[-1] == end else [*ids, end]


def _draw(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature == 0:
        return {**options, "do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {
        **options,
        "do_sample": True,
        "num_beams": 1,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
    }


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end what the model writes: the end of text, and others that its own configuration names."""
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return sorted({number for number in (*named, tokenizer.eos_token_id) if number is not None})


def _continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, row: list[int], *, cut: int
) -> Continuation:
    ends = set(_ends(model, tokenizer))
    stop = next((place + 1 for place, number in enumerate(row) if number in ends), None)
    row = row[:stop]
    # Marks of gaps say what belongs where; other special tokens are no text, such as the end of a turn, which a
    # tokenizer need not name.
    added = tokenizer.get_added_vocab()
    unnamed = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {*tokenizer.all_special_ids, *unnamed} - {added[mark] for mark in SENTINELS if mark in added}
    text = tokenizer.decode(
        [number for number in row if number not in special],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return Continuation(prompt, text, num_tokens=len(row), finished=stop is not None, prompt_cut=cut)
