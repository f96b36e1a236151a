"""Ids for people: what each token spells and whether it is learned. And the id that fills up a batch.

Shapes: T tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import models

from llmkit.data.tokenizers.pieces import token_bytes

Ints = npt.NDArray[np.int64]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BLANK = "▁"


@dataclass(frozen=True)
class MaskedPiece:
    """A token of an example.

    Attributes:
        content: What it spells; its bytes, where it ends inside a character.
        id: Its id.
        token: The vocabulary's own spelling.
        learned: Whether it is a target.
        special: Whether it is a special token.
    """

    content: str | bytes
    id: int
    token: str
    learned: bool
    special: bool


def padding_id(tokenizer: Any) -> int:
    """The id that fills up a batch.

    It is told from text by its position alone (what is filled up is no target, and no target sees it), never by the
    id: so a tokenizer without a padding token may lend its end token, and the end token is still learned.
    """
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    return 0


def unshifted(input_ids: Ints, targets: Ints, not_learned: int = -100) -> tuple[Ints, Ints]:
    """The whole text of an example whose targets are the next tokens, each with its target at its own place.

    Args:
        input_ids: [T].
        targets: [T]: the token behind each, or `not_learned`.
        not_learned: What stands where there is no target.

    Returns:
        Ids and targets [T+1]; [T] if the last has no target, for then nobody knows it.
    """
    last = targets[-1:][targets[-1:] != not_learned]
    whole = np.concatenate([input_ids, last])
    moved = np.concatenate([np.full(1, not_learned, dtype=np.int64), targets])
    return whole, moved[: len(whole)]


def masked_pieces(
    ids: Sequence[int] | Ints, targets: Sequence[int] | Ints, tokenizer: Any, not_learned: int = -100
) -> list[MaskedPiece]:
    """What each token spells, and whether it is learned.

    Args:
        ids: [T].
        targets: [T]: at each token's own place; see `unshifted`.
        tokenizer: One with a `backend_tokenizer`.
        not_learned: What stands where there is no target.
    """
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    found = []
    for number, target in zip(map(int, ids), map(int, targets), strict=True):
        token = backend.id_to_token(number) or f"<{number}>"
        is_special = number in added and bool(added[number].special)
        content = token if number in added else _spelled(backend, token)
        found.append(MaskedPiece(content, number, token, target != not_learned, is_special))
    return found


def _spelled(backend: Any, token: str) -> str | bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        raw = bytes([int(byte[1], 16)])
    elif isinstance(backend.model, models.WordPiece):
        prefix = backend.model.continuing_subword_prefix
        return token.removeprefix(prefix) if token.startswith(prefix) else " " + token
    elif isinstance(backend.model, models.Unigram) or _BLANK in token:
        return token.replace(_BLANK, " ")
    else:
        raw = token_bytes(backend, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
