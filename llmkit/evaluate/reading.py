"""A text as a model reads it, each token with its place in it; and tokens joined to words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import UsageError
from llmkit.metrics.scripts import UNSPACED

_OWN_WORD = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True)
class Attribution:
    """A stretch of text, and what it adds.

    Attributes:
        piece: The text.
        score: By how much it raises what is explained.
        start: Where it begins, in characters.
        end: Where it ends.
        part: 0 for the text, 1 for the second of a pair.
    """

    piece: str
    score: float
    start: int
    end: int
    part: int = 0


@dataclass(frozen=True)
class Reading:
    """A text as the model reads it.

    Attributes:
        ids: Its tokens.
        type_ids: Which of two texts each belongs to, for models that are told.
        spans: Where each token stands: part, word, begin and end in characters; None for the frame around texts.
        texts: The one or two texts.
        cut: Tokens that did not fit.
    """

    ids: list[int]
    type_ids: list[int] | None
    spans: list[tuple[int, int, int, int] | None]
    texts: tuple[str, ...]
    cut: int = 0


def read_text(tokenizer: Any, text: str, other: str | None, longest: int | None, *, framed: bool) -> Reading:
    """A text as it is read, in training and here; of one that is too long the end is cut off.

    Raises:
        UsageError: The tokenizer cannot tell where its tokens stand, or there are none.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("the tokenizer is written in Python and does not tell where its tokens stand")
    texts = (text,) if other is None else (text, other)
    whole = tokenizer(*texts, add_special_tokens=framed, verbose=False)
    num_tokens, kept = len(whole["input_ids"]), whole
    if longest is not None and num_tokens > longest:
        kept = tokenizer(*texts, add_special_tokens=framed, truncation="longest_first", max_length=longest)
    encoding = kept.encodings[0]
    spans = [
        None if part is None else (part, word, *place)
        for part, word, place in zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True)
    ]
    if all(span is None for span in spans):
        raise UsageError("there is no text to explain", hint='llmkit explain RUN "A text."')
    cut = num_tokens - len(encoding.ids)
    return Reading(list(encoding.ids), kept.get("token_type_ids"), spans, texts, cut)


def with_scores(read: Reading, scores: Sequence[float]) -> list[tuple[Attribution, int]]:
    """Each token of the text with what it adds, and the number of its word."""
    found = []
    for span, score in zip(read.spans, scores, strict=False):  # what follows the text is not explained
        if span is not None:
            part, word, start, end = span
            piece = read.texts[part][start:end]
            found.append((Attribution(piece, score, start, end, part), word))
    return found


def joined(tokens: Sequence[tuple[Attribution, int]], texts: Sequence[str]) -> list[Attribution]:
    """Tokens as words: what the tokenizer takes for one, cut at blanks and around signs that are words themselves."""
    words: list[Attribution] = []
    before: tuple[Attribution, int] | None = None
    for token, number in tokens:
        if before is None or _begins_word(token, number, *before, text=texts[token.part]):
            words.append(token)
        else:
            last = words[-1]
            end = max(last.end, token.end)
            whole = texts[last.part][last.start : end]
            words[-1] = replace(last, piece=whole, end=end, score=last.score + token.score)
        before = token, number
    return words


def _begins_word(token: Attribution, number: int, last: Attribution, last_number: int, *, text: str) -> bool:
    if (token.part, number) != (last.part, last_number):
        return True
    if token.start < last.end:  # both are parts of one character
        return False
    between = text[last.end : token.start] + token.piece[:1]
    return any(map(str.isspace, between)) or any(
        _OWN_WORD.match(character) for character in (token.piece[:1], last.piece[-1:])
    )
