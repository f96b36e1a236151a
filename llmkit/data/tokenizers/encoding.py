"""Documents to ids, with nothing added and nothing interpreted."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.data.tokenizers.patterns import is_ours, portions

BATCH_CHARS = 1_000_000
"""Text handed to the encoder at once: enough to keep its threads busy, little enough to stay small."""


def token_dtype(tokenizer: Any) -> type[np.uint16] | type[np.uint32]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if _largest_id(tokenizer) < 2**16 else np.uint32


def encode_documents(
    texts: Iterable[str], tokenizer: Any, *, batch_chars: int = BATCH_CHARS
) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]]:
    """Each text with its ids (uint16 or uint32), in order, nothing added.

    Text that spells a special token, such as `<|endoftext|>` in a web page, is encoded as the text it is. The
    library needs 170 bytes of memory for each byte of one text, so a long text is encoded in parts where that is
    known to change nothing: by tokenizers that llmkit made.
    """
    return encode_to(token_dtype(tokenizer), texts, tokenizer, batch_chars=batch_chars)


def encode_to(
    dtype: npt.DTypeLike, texts: Iterable[str], tokenizer: Any, *, batch_chars: int = BATCH_CHARS
) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]]:
    """`encode_documents` for a caller that knows the type of the ids; asking the tokenizer takes milliseconds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    may_cut = backend is not None and is_ours(backend)
    for batch in batches(texts, batch_chars):
        # Only the last of a batch can be long.
        long_one = batch.pop() if may_cut and len(batch[-1]) > batch_chars else None
        for text, ids in zip(batch, _encode_batch(batch, tokenizer), strict=True):
            yield text, np.asarray(ids, dtype=dtype)
        if long_one is not None:
            parts = portions(long_one, batch_chars)
            encoded = [np.asarray(next(_encode_batch([part], tokenizer)), dtype=dtype) for part in parts]
            yield long_one, np.concatenate(encoded)


def _encode_batch(batch: list[str], tokenizer: Any) -> Iterator[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        yield from tokenizer(batch, **options)["input_ids"]
        return
    # A copy of the settings, put back afterwards: the caller's tokenizer is left as it was given.
    before = (backend.encode_special_tokens, backend.truncation, backend.padding)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
    finally:
        _restore(backend, *before)
    for encoding in encodings:
        yield encoding.ids


def _restore(
    backend: Any, specials: bool, truncation: dict[str, Any] | None, padding: dict[str, Any] | None
) -> None:
    backend.encode_special_tokens = specials
    if truncation:
        backend.enable_truncation(**truncation)
    if padding:
        backend.enable_padding(**padding)


def batches(texts: Iterable[str], batch_chars: int) -> Iterator[list[str]]:
    """The texts in lists of about `batch_chars` characters; only the last of a list can be long."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _largest_id(tokenizer: Any) -> int:
    # Ids may have holes, and added tokens may lie beyond the vocabulary's count.
    return max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
