"""Words and the tokens that a tokenizer cuts them into; and windows of a sentence that is longer than a model reads.

Shape suffixes: T positions of an example, W words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.errors import UsageError

Ints = npt.NDArray[np.int64]

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+|[^\w\s]")
_NO_WORD = -1


def words_of(text: str) -> list[str]:
    """The words of a plain text: runs of letters and digits, single signs, single Han characters."""
    return _WORD.findall(text)


@dataclass(frozen=True)
class Pieces:
    """A sentence as a model reads it.

    Attributes:
        input_ids_T: Its tokens, the tokenizer's own ones among them.
        type_ids_T: `token_type_ids`.
        words_T: The number of the word that each token is of; -1: of none.
    """

    input_ids_T: Ints
    type_ids_T: Ints
    words_T: Ints

    @property
    def starts(self) -> npt.NDArray[np.bool_]:
        """Whether a token is the first of its word [T]."""
        before_T = np.concatenate([[_NO_WORD], self.words_T[:-1]])
        return (self.words_T != _NO_WORD) & (self.words_T != before_T)


class WordPieces:
    """Cuts words into tokens, each into one at least.

    Whether a tokenizer wants to be told of the space before a word is seen by trying.

    Args:
        tokenizer: The model's.

    Raises:
        UsageError: It cannot say which word a token is of.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                "tags are learned for words, and this tokenizer cannot say which word a token is of",
                hint="take a model with a tokenizer.json",
            )
        self._backend = backend
        self._unknown = tokenizer.unk_token or "?"
        self._before = self._joint()

    def __call__(self, words: Sequence[str]) -> Pieces:
        """The tokens of words, none of them cut off."""
        made = self._encoded(words)
        missing = set(range(len(words))) - set(made.words_T.tolist())
        if missing:  # such as a word of control characters alone
            made = self._encoded([self._unknown if n in missing else word for n, word in enumerate(words)])
        return made

    def lengths(self, words: Sequence[str]) -> Ints:
        """Tokens of each word [W]."""
        numbers_T = self(words).words_T
        return np.bincount(numbers_T[numbers_T != _NO_WORD], minlength=len(words))

    @property
    def num_own(self) -> int:
        """Tokens that the tokenizer adds to a sentence."""
        return int(self._backend.num_special_tokens_to_add(False))

    def _encoded(self, words: Sequence[str]) -> Pieces:
        self._backend.no_truncation()  # an earlier call of the tokenizer may have set it
        given = [word if n == 0 else self._before + word for n, word in enumerate(words)]
        made = self._backend.encode(given, is_pretokenized=True)
        numbers = [_NO_WORD if number is None else number for number in made.word_ids]
        return Pieces(*(np.asarray(values, dtype=np.int64) for values in (made.ids, made.type_ids, numbers)))

    def _joint(self) -> str:
        """What stands before a word, so that words are cut as in running text."""
        words = ["the", "old", "house"]
        whole = self._backend.encode(" ".join(words), add_special_tokens=False).ids
        for before in ("", " "):
            given = [word if n == 0 else before + word for n, word in enumerate(words)]
            if self._backend.encode(given, is_pretokenized=True, add_special_tokens=False).ids == whole:
                return before
        return ""


@dataclass(frozen=True)
class Window:
    """Some words of a sentence.

    Attributes:
        start, stop: What the model reads.
        first, last: What is learned and said of it; every word is in one window's share.
    """

    start: int
    stop: int
    first: int
    last: int


def windows(lengths_W: Ints, room: int, overlap: int) -> list[Window]:
    """Windows over a sentence, each as full as it can be; a sentence that fits is one.

    Two neighbours share about `overlap` tokens, and each says what it sees from further within.

    Args:
        lengths_W: Tokens of each word.
        room: Tokens of a window at most; a longer word is alone in its own.
        overlap: Tokens that two windows share at most.
    """
    ends_W = np.cumsum(lengths_W)
    reads = [(0, _reach(ends_W, 0, room))]
    while reads[-1][1] < len(lengths_W):
        before, stop = reads[-1]
        start = max(before + 1, _back(ends_W, stop, overlap))
        # Where a long word follows, there is no room for so much of the overlap.
        while _reach(ends_W, start, room) <= stop:
            start += 1
        reads.append((start, _reach(ends_W, start, room)))
    middles = [(stop + start + 1) // 2 for (_, stop), (start, _) in pairwise(reads)]
    firsts, lasts = [0, *middles], [*middles, len(lengths_W)]
    return [Window(*read, *share) for read, share in zip(reads, zip(firsts, lasts, strict=True), strict=True)]


def _reach(ends_W: Ints, start: int, room: int) -> int:
    """The word after the last that fits a window from `start` on."""
    before = int(ends_W[start - 1]) if start else 0
    return max(start + 1, int(np.searchsorted(ends_W, before + room, side="right")))


def _back(ends_W: Ints, stop: int, overlap: int) -> int:
    """The first of the words that end at `stop` and have at most `overlap` tokens together."""
    return int(np.searchsorted(ends_W, int(ends_W[stop - 1]) - overlap, side="left")) + 1
