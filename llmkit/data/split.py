"""Training or held out: decided by a document's own text, so by nothing that can change around it.

The same document is on the same side whatever its file, its position and the machine; two copies of one
document are never on both sides.
"""

import hashlib
from collections.abc import Iterable

from llmkit.errors import DataError

_RANGE = 2**64


def document_hash(text: str, purpose: str = "split") -> int:
    """A 64-bit hash of the text, uniform and different for each `purpose`."""
    return hash_bytes(text.encode(), purpose)


def hash_bytes(data: bytes, purpose: str = "split") -> int:
    """`document_hash` of a text that is UTF-8 bytes already."""
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode()[:16]).digest()
    return int.from_bytes(digest, "little")


def is_held_out(text: str, ratio: float) -> bool:
    """Whether a document belongs to the held-out part, a pure function of its text."""
    return document_hash(text) < threshold_of_ratio(ratio)


def threshold_of_ratio(ratio: float) -> int:
    """The hash below which a document is held out.

    Raises:
        ValueError: `ratio` is not in 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the held-out ratio must be in 0..1, not {ratio}")
    return int(ratio * _RANGE)


def find_threshold(texts: Iterable[str], ratio: float) -> int:
    """The hash below which a document is held out, such that at least one document is when `ratio` > 0.

    That is `ratio` itself as soon as one document falls below it (reading stops there); where none does, the
    document with the smallest hash is held out. Independent of the documents' order.

    Raises:
        UndividedError: The ratio is above 0 and there is but one document, or only copies of one.
    """
    threshold = threshold_of_ratio(ratio)
    if threshold in (0, _RANGE):
        return threshold
    smallest, largest, count = _RANGE, -1, 0
    for text in texts:
        count += 1
        hashed = document_hash(text)
        smallest, largest = min(smallest, hashed), max(largest, hashed)
        # One on each side is enough: reading on cannot change the answer.
        if smallest < threshold <= largest:
            return threshold
    if smallest == largest or largest < threshold:
        raise nothing_to_train_on(count if smallest >= largest else None, ratio)
    return smallest + 1


class UndividedError(DataError):
    """The text cannot be divided into a training and a held-out part."""


def nothing_to_train_on(same: int | None, ratio: float) -> UndividedError:
    """The error for text that cannot be divided.

    Args:
        same: How many documents there are, if they are all the same; 0 for no document at all.
        ratio: The share asked for.
    """
    if same is None:
        what = "every document is held out"
    elif same <= 1:
        what = "the text is one single document" if same else "there is no text"
    else:
        what = f"all {same:,} documents are the same"
    finer = "set `documents: paragraph` or `documents: line` on the source, or `held_out: 0`"
    return UndividedError(
        f"{what}, so it cannot be divided into a training and a held-out part (held_out: {ratio:g})",
        hint=finer if same == 1 else "give more text, or set `held_out: 0`",
    )
