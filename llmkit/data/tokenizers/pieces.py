"""A text as the pieces a tokenizer makes of it, exact to the byte."""

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tokenizers import models

from llmkit.data.tokenizers.patterns import byte_values

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Piece:
    """A stretch of text that one token stands for.

    Attributes:
        content: The text; its bytes, where it ends inside a character.
        id: The token's id; None for text that the tokenizer leaves out, such as blanks.
        token: The vocabulary's own spelling of it; empty where there is none.
        start: Where it begins, in bytes of UTF-8.
        end: Where it ends.
    """

    content: str | bytes
    id: int | None
    token: str
    start: int
    end: int


def pieces(tokenizer: Any, text: str) -> list[Piece]:
    """The pieces of a text, in order; joined they give the text.

    Special tokens that the text spells are text, as everywhere in llmkit. Where the tokenizer changes the text
    (small letters, for one), the pieces still show the text as it is.

    Args:
        tokenizer: One with a `backend_tokenizer`.
        text: Any valid Unicode text.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    data = text.encode()
    written = [token_bytes(backend, token) for token in encoding.tokens]
    if b"".join(written) == data:
        ends = list(accumulate(map(len, written)))
        spans = list(zip([0, *ends], ends, strict=False))
    else:
        spans = _spans(text, encoding)
    return _with_gaps(data, spans, encoding.ids, encoding.tokens)


def token_bytes(backend: Any, token: str) -> bytes:
    """The bytes that a byte-level model's token stands for; another model's token as it is written."""
    model = backend.model
    if isinstance(model, models.WordPiece):
        token = token.removeprefix(model.continuing_subword_prefix)
    values = byte_values()
    if all(char in values for char in token):
        return bytes(values[char] for char in token)
    return token.encode()


def _spans(text: str, encoding: Any) -> list[tuple[int, int]]:
    """From the encoder's own offsets, in characters, those in bytes; tokens of single bytes get one byte each."""
    at = [0, *accumulate(len(char.encode()) for char in text)]
    spans = []
    done = 0
    for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        first, last = max(at[start], done), max(at[end], done)
        if _BYTE_TOKEN.fullmatch(token):
            last = min(first + 1, last)
        spans.append((first, last))
        done = last
    return spans


def _with_gaps(data: bytes, spans: list[tuple[int, int]], ids: list[int], tokens: list[str]) -> list[Piece]:
    found = []
    done = 0
    for (start, end), number, token in zip(spans, ids, tokens, strict=True):
        if start > done:
            found.append(_piece(data, done, start, None, ""))
        found.append(_piece(data, start, end, number, token))
        done = end
    if done < len(data):
        found.append(_piece(data, done, len(data), None, ""))
    return found


def _piece(data: bytes, start: int, end: int, number: int | None, token: str) -> Piece:
    raw = data[start:end]
    try:
        return Piece(raw.decode(), number, token, start, end)
    except UnicodeDecodeError:
        return Piece(raw, number, token, start, end)
