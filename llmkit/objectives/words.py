"""Which tokens spell one word: by the tokenizer's own marks, and Chinese by a dictionary.

A word is a run of letters and digits; every other character is one by itself. Where the tokenizer marks pieces that
continue a word (WordPiece's `##`), its marks count. Runs of Han characters are cut by jieba's dictionary.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import models

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import MissingError

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_HAN = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_RUN = re.compile(f"[{_HAN}]+")
_WORD = re.compile(f"(?:(?![{_HAN}])[^\\W_])+")
_KNOWS_HAN = 0.01
"""A vocabulary in which at least this share of the entries spells Han characters is used for Chinese."""


class Words:
    """Finds the words of rows of token ids.

    Args:
        vocabulary: The tokenizer's.

    Attributes:
        cuts_han: Whether Han characters are joined to words: where the vocabulary knows them. Elsewhere each is a word
            by itself.

    Raises:
        MissingError: They are, and rjieba is not installed.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._spellings = vocabulary.spellings
        self._continues = _marked(vocabulary)
        num_han = sum(_HAN_RUN.search(_text(spelling)) is not None for spelling in self._spellings)
        self.cuts_han = num_han >= _KNOWS_HAN * vocabulary.size
        if self.cuts_han:
            _jieba()

    def groups(self, ids: Ints) -> Ints:
        """The number of each token's word, counted from 0 along the row.

        Args:
            ids: [T] token ids; a special token is a word by itself.
        """
        spelled = [self._spellings[number] for number in ids.tolist()]
        lengths = np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled))
        starts = np.cumsum(lengths) - lengths
        text = _text(b"".join(spelled))
        inside = self._inside(text, int(lengths.sum()))
        begins = ~inside[starts]
        if self._continues is not None:
            in_han = _covered(text, int(lengths.sum()))[starts]
            begins = np.where(in_han, begins, ~self._continues[ids])
        begins |= lengths == 0
        begins[1:] |= lengths[:-1] == 0  # nothing goes on beyond a special token
        begins[:1] = True
        return np.cumsum(begins) - 1

    def _inside(self, text: str, num_bytes: int) -> Flags:
        """[bytes + 1]: whether a byte is within a word, and not its first."""
        at = _byte_offsets(text)
        inside = np.ones(num_bytes + 1, dtype=np.bool_)
        inside[at] = False  # a character is never cut
        for match in _WORD.finditer(text):
            inside[at[match.start() + 1 : match.end()]] = True
        if self.cuts_han:
            for match in _HAN_RUN.finditer(text):
                place = match.start()
                for word in _jieba().cut(match.group()):
                    inside[at[place + 1 : place + len(word)]] = True
                    place += len(word)
        return inside


def _marked(vocabulary: Vocabulary) -> Flags | None:
    """[V]: which entries the tokenizer marks as continuing a word; None where it marks none that way."""
    model = vocabulary.backend.model
    if not isinstance(model, models.WordPiece):
        return None
    prefix = model.continuing_subword_prefix
    tokens = (vocabulary.backend.id_to_token(number) for number in range(vocabulary.size))
    return np.fromiter((token is not None and token.startswith(prefix) for token in tokens), dtype=np.bool_)


def _text(data: bytes) -> str:
    """A byte that is no whole character becomes a lone surrogate, so that none is lost."""
    return data.decode("utf-8", "surrogateescape")


def _byte_offsets(text: str) -> Ints:
    """[characters + 1]: where each character begins in bytes, and where the last ends."""
    sizes = [len(character.encode("utf-8", "surrogateescape")) for character in text]
    return np.cumsum([0, *sizes])


def _covered(text: str, num_bytes: int) -> Flags:
    """[bytes + 1]: whether a byte belongs to a Han character."""
    at = _byte_offsets(text)
    covered = np.zeros(num_bytes + 1, dtype=np.bool_)
    for match in _HAN_RUN.finditer(text):
        covered[at[match.start()] : at[match.end()]] = True
    return covered


def _jieba() -> Any:
    try:
        import rjieba
    except ImportError as error:
        raise MissingError(
            "`whole_words` finds Chinese words by rjieba, which is not installed",
            hint="pip install 'llmkit[zh]'",
        ) from error
    return rjieba
