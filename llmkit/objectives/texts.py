"""Texts and pairs of texts as a model reads them: framed by the tokenizer's own tokens, cut where they are too long.

Shape suffixes: T positions of an example.
"""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch

from llmkit.objectives.base import Example, padded

_CUTTING = Lock()
"""How a tokenizer cuts is a state of its own, and rows to learn and rows to measure are encoded at the same time."""
CUT = "cut"
"""In an example: tokens that did not fit. Preparation counts them; a batch does not have it."""
PASSED_OVER = "passed_over"
"""In an example: answers that are not learned though they should be; see `data.chat.Encoded`."""


def encode_texts(tokenizer: Any, text: str, other: str | None, max_length: int) -> dict[str, Any]:
    """`input_ids`, and `token_type_ids` where the model knows them, both [T]; and `cut`.

    Of a pair the longer text is cut first, token by token, at its end.

    Args:
        tokenizer: The model's.
        text: The text, or the first of a pair.
        other: The second.
        max_length: T at most, the tokenizer's own tokens counted.
    """
    given = (text,) if other is None else (text, other)
    with _CUTTING:
        whole = tokenizer(*given, truncation=False, return_attention_mask=False, verbose=False)
        length = len(whole["input_ids"])
        if length > max_length:
            whole = tokenizer(
                *given, truncation="longest_first", max_length=max_length, return_attention_mask=False
            )
    example = {name: np.asarray(values, dtype=np.int64) for name, values in whole.items()}
    return {**example, CUT: np.asarray(max(0, length - max_length))}


def stack_texts(tokenizer: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Stack examples of `encode_texts` to [B, T], filled up on the right, with an `attention_mask`."""
    fills = {"input_ids": pad_id(tokenizer), "token_type_ids": 0, "attention_mask": 0}
    return padded([_masked(example) for example in examples], fills)


def pad_id(tokenizer: Any) -> int:
    """What stands where a batch is filled up; the attention mask leaves it out, so it may be any token."""
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    return 0


def _masked(example: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**example, "attention_mask": np.ones_like(example["input_ids"])}
