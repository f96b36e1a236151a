"""A question and a text as a model reads them: a text that is too long in windows, each with the whole question.

Shape suffixes: T positions of a window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.errors import DataError, UsageError
from llmkit.objectives.base import Ints

_TEXT = 1
"""What `sequence_ids` calls the second of two texts."""


@dataclass(frozen=True)
class Window:
    """A question and a part of a text.

    Attributes:
        inputs: `input_ids` [T], and `token_type_ids` [T] where the model knows them.
        begins_T: Where each token of the text begins in it, in characters; -1 where a token is not the text's.
        ends_T: Where it ends.
        none: The position that says "no answer here": the first where texts begin with a token of the tokenizer's own,
            else the last, the only one that has read all when a model reads from left to right.
    """

    inputs: Mapping[str, Ints]
    begins_T: Ints
    ends_T: Ints
    none: int

    def positions(self, start: int, end: int) -> tuple[int, int]:
        """The first and the last token of characters `start` to `end` of the text.

        Both are `none` where not all of them are here.
        """
        touched = np.flatnonzero((self.begins_T >= 0) & (self.ends_T > start) & (self.begins_T < end))
        if len(touched) and self.begins_T[touched[0]] <= start and self.ends_T[touched[-1]] >= end:
            return int(touched[0]), int(touched[-1])
        return self.none, self.none


@dataclass(frozen=True)
class Windows:
    """How questions and texts are cut.

    Attributes:
        tokenizer: A fast one: it says which characters each token stands for.
        max_length: Tokens of a window at most.
        stride: Tokens that two windows share.
    """

    tokenizer: Any
    max_length: int
    stride: int

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                "this tokenizer does not say where in the text its tokens stand, and answers are places in a text",
                hint="use a model with a fast tokenizer (tokenizer.json)",
            )

    def question(self, text: str) -> tuple[str, int]:
        """The question, at most half as long as what the model reads, and how many tokens of it were cut."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spare = len(found["input_ids"]) - self.max_length // 2
        if spare > 0:
            text = text[: found["offset_mapping"][self.max_length // 2 - 1][1]]
        # A tokenizer without a mark between two texts would join the question's last word to the text's first.
        return text if self.tokenizer.sep_token is not None else text + "\n", max(0, spare)

    def of(self, question: str, text: str) -> list[Window]:
        """The windows of a text, the first first.

        Raises:
            DataError: The tokenizer makes nothing of the text.
        """
        # Cut here, not by the tokenizer: that would change its state, and several threads use it.
        whole = self.tokenizer(
            question, text, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        text_N = np.flatnonzero(np.array([side == _TEXT for side in whole.sequence_ids(0)]))
        if not len(text_N):
            raise DataError(
                f"the tokenizer makes no token of the text {text[:40]!a}",
                hint="mend the row: a text without letters holds no answer",
            )
        first, count, length = int(text_N[0]), len(text_N), len(whole["input_ids"])
        room = max(1, self.max_length - (length - count))
        step = room - min(self.stride, room // 2)
        starts = range(0, max(1, count - room + step), step)
        before, after = np.arange(first), np.arange(first + count, length)
        return [
            self._window(whole, np.concatenate([before, text_N[start : start + room], after]))
            for start in starts
        ]

    def _window(self, whole: Any, kept_T: Ints) -> Window:
        names = [name for name in ("input_ids", "token_type_ids") if name in whole]
        inputs = {name: np.asarray(whole[name], dtype=np.int64)[kept_T] for name in names}
        is_text_T = np.array([side == _TEXT for side in whole.sequence_ids(0)])[kept_T]
        begins_T, ends_T = np.array(whole["offset_mapping"], dtype=np.int64)[kept_T].T
        first = inputs["input_ids"][0]
        is_framed = self.tokenizer.cls_token_id is not None and first == self.tokenizer.cls_token_id
        return Window(
            inputs,
            np.where(is_text_T, begins_T, -1),
            np.where(is_text_T, ends_T, -1),
            0 if is_framed else len(kept_T) - 1,
        )
