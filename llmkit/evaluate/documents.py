"""A text's figures by document: what each one adds to them, so that they can be drawn anew, grouped and compared.

Shape suffixes: D documents (or windows, where there are few documents), P pieces of text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.data.shards import TokenStream
from llmkit.evaluate.measurement import FEW_DOCUMENTS
from llmkit.evaluate.text import Found
from llmkit.metrics.inputs import Floats, Integers
from llmkit.recipe.schema import Pretrain

_LENGTHS = (1_000, 4_000, 16_000, 64_000)
"""Bytes of a document at which another group of lengths begins."""
_DECODED_AT_ONCE = 256


@dataclass(frozen=True)
class Counted:
    """What each item contributes, and what groups it belongs to."""

    keys: Sequence[str]
    nll_D: Floats
    targets_D: Floats
    bytes_D: Floats
    chars_D: Floats
    source_D: Integers

    def figures(self, items: Integers) -> dict[str, float]:
        """The figures over some items."""
        nll, targets = self.nll_D[items].sum(), self.targets_D[items].sum()
        if not targets:
            return {}
        loss = float(nll / targets)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if num_bytes := self.bytes_D[items].sum():
            found["bits_per_byte"] = float(nll / math.log(2) / num_bytes)
            found["char_perplexity"] = math.exp(min(float(nll / self.chars_D[items].sum()), 700.0))
        return found

    def table(self, groups: Sequence[tuple[str, Integers]]) -> list[dict[str, Any]]:
        """A line for each group of items that is not empty."""
        return [
            {
                "name": name,
                "num_documents": len(items),
                "num_tokens": int(self.targets_D[items].sum()),
                **self.figures(items),
            }
            for name, items in groups
            if len(items) and self.targets_D[items].sum()
        ]


def items_of(
    found: Found, streams: Sequence[TokenStream], tokenizer: Any, learned: Pretrain
) -> tuple[Counted | None, list[dict[str, Any]]]:
    """What the figures are made of, where that can be told, and figures by the documents' length.

    Args:
        found: What was found of the text.
        streams: The text.
        tokenizer: Its tokenizer, which spells the documents.
        learned: What the model learned: only of the next token's prediction documents are known.
    """
    if learned.objective == "clm":
        return _by_document(found, streams, tokenizer)
    return (_by_row(found) if len(found.nll_P) else None), []


def _by_document(
    found: Found, streams: Sequence[TokenStream], tokenizer: Any
) -> tuple[Counted, list[dict[str, Any]]]:
    """The items of a text, and figures by the documents' length."""
    lengths = [stream.document_lengths() for stream in streams]
    tokens_D = np.concatenate(lengths).astype(np.float64)
    sources_D = np.repeat(np.arange(len(streams)), [len(some) for some in lengths])
    size = len(tokens_D)
    sizes_D2 = _sizes(streams, tokenizer)
    seen_D = _added(found.documents_P, found.targets_P, size)
    share_D = seen_D / np.maximum(tokens_D, 1)
    # Added up, they are what the figure over all is made of.
    totals = [sum(s.num_bytes for s in streams), sum(s.num_chars for s in streams)]
    bytes_D, chars_D = (
        _scaled(sizes_D2[:, column] * share_D, total * seen_D.sum() / tokens_D.sum())
        for column, total in enumerate(totals)
    )
    nll_D = _added(found.documents_P, found.nll_P, size)
    known = np.flatnonzero(seen_D)
    documents = Counted(
        [f"{sources_D[number]}:{number}" for number in known.tolist()],
        nll_D[known],
        seen_D[known],
        bytes_D[known],
        chars_D[known],
        sources_D[known],
    )
    edges = np.searchsorted(_LENGTHS, sizes_D2[known, 0], side="right")
    groups = [(_length_name(place), np.flatnonzero(edges == place)) for place in range(len(_LENGTHS) + 1)]
    per_length = documents.table(groups)
    if len(known) >= FEW_DOCUMENTS:
        return documents, per_length
    return _by_window(found, bytes_D, chars_D, seen_D, sources_D), per_length


def _added(place_P: Integers, weights_P: npt.NDArray[Any], size: int) -> Floats:
    """The weights of each place, added up in their order."""
    return np.asarray(np.bincount(place_P, weights=weights_P, minlength=size), dtype=np.float64)


def _by_window(
    found: Found,
    bytes_D: Floats,
    chars_D: Floats,
    seen_D: Floats,
    sources_D: Integers,
) -> Counted:
    """Windows as the items; a document's bytes are shared out by its tokens."""
    per_token = found.targets_P / np.maximum(seen_D[found.documents_P], 1)
    numbers, place_P = np.unique(found.windows_P, return_inverse=True)

    def added(weights_P: npt.NDArray[Any]) -> Floats:
        return _added(place_P, weights_P, len(numbers))

    source_W = np.zeros(len(numbers), dtype=np.int64)
    source_W[place_P] = sources_D[found.documents_P]
    return Counted(
        [f"window {number}" for number in numbers.tolist()],
        added(found.nll_P),
        added(found.targets_P),
        added(bytes_D[found.documents_P] * per_token),
        added(chars_D[found.documents_P] * per_token),
        source_W,
    )


def _by_row(found: Found) -> Counted:
    """Rows of an objective that does not predict the whole text: there are no bytes to count."""
    nothing = np.zeros(len(found.nll_P))
    keys = [f"row {number}" for number in found.windows_P.tolist()]
    targets_P = found.targets_P.astype(np.float64)
    return Counted(keys, found.nll_P, targets_P, nothing, nothing, np.zeros(len(keys), np.int64))


def _sizes(streams: Sequence[TokenStream], tokenizer: Any) -> Floats:
    """Bytes and characters [D, 2] of each document, as its tokens spell it."""
    sizes = []
    for stream in streams:
        ends = np.append(stream.document_starts(0, stream.num_tokens), stream.num_tokens).tolist()
        for first in range(0, stream.num_documents, _DECODED_AT_ONCE):
            last = min(first + _DECODED_AT_ONCE, stream.num_documents)
            lists = [stream.read(ends[n], ends[n + 1]).tolist() for n in range(first, last)]
            texts = tokenizer.batch_decode(
                lists, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            sizes += [(len(text.encode()), len(text)) for text in texts]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)


def _scaled(values: Floats, total: float) -> Floats:
    """The values, in proportion, so that they add up to the total: what a tokenizer drops is shared by all."""
    added = values.sum()
    return values * (total / added) if added else values


def _length_name(place: int) -> str:
    def short(number: int) -> str:
        return f"{number // 1000} kB"

    if place == 0:
        return f"under {short(_LENGTHS[0])}"
    if place == len(_LENGTHS):
        return f"{short(_LENGTHS[-1])} and more"
    return f"{short(_LENGTHS[place - 1])} to {short(_LENGTHS[place])}"
