"""How good a tokenizer is: exact, short, and without entries that nobody uses."""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.data.text import utf8_size
from llmkit.data.tokenizers.encoding import encode_documents
from llmkit.data.tokenizers.pieces import Piece, pieces, token_bytes
from llmkit.data.tokenizers.words import boundaries

SCRIPTS = ("han", "latin", "other")

_HAN = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+"
)
_LATIN = re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]+")
_OTHER = re.compile(
    "[\u0250-\u1dff\u1f00-\u1fff\u2c00-\u2dff\u3040-\u31ff\ua000-\ud7ff\ufb00-\ufdff\ufe70-\ufefe]+"
)

_NUM_WASTEFUL = 20
_ENOUGH = 10
"""Tokens for each entry of the vocabulary from which on it means something that an entry does not occur."""

_NUM_SPLITS = 6
_SPLIT_CHARS = 60
_CONTEXT = 20
_JIEBA_CHARS = 200_000


def measure_tokenizer(tokenizer: Any, texts: Sequence[str], *, words: bool = False) -> dict[str, Any]:
    """Figures of a tokenizer on texts it has not learnt from (or on some it has).

    Args:
        tokenizer: A tokenizer with a `backend_tokenizer`.
        texts: What to measure on.
        words: Also compare the cuts of Chinese with jieba's.

    Returns:
        `round_trip` (all texts came back), `round_trip_documents` checked, `round_trip_failures` of them,
        `round_trip_first_failure` (document, character, what was there and what came back; empty if none) and
        `round_trip_of` (`text`, or `normalised text` where the tokenizer changes it);
        `unknown_ratio` of tokens; `chars_per_token`, `bytes_per_token`, and both for the documents that are
        mostly `han`, `latin` or `other` letters; where there is text enough to tell, `used_ratio`, the share of the
        vocabulary that occurs, and `wasteful_tokens`, entries that never occur, longest first; `splits`, some lines
        with their pieces; with `words` also `jieba_precision`, `jieba_recall` and `jieba_f1` of cuts inside runs of
        Han characters.
    """
    trip = _RoundTrip(tokenizer)
    groups = {script: np.zeros(4, dtype=np.int64) for script in SCRIPTS}
    uses = np.zeros(len(tokenizer), dtype=np.int64)
    for text, ids in encode_documents(texts, tokenizer):
        trip.check(text, ids.tolist())
        uses += np.bincount(ids, minlength=len(uses))
        groups[script_of(text)] += (1, len(ids), len(text), utf8_size(text))
    _, num_tokens, num_chars, total_bytes = sum(groups.values(), np.zeros(4, dtype=np.int64)).tolist()
    unknown = _unknown_id(tokenizer)
    return {
        "bytes_per_token": round(total_bytes / max(num_tokens, 1), 4),
        "chars_per_token": round(num_chars / max(num_tokens, 1), 4),
        **_by_script(groups),
        **trip.figures(),
        "unknown_ratio": 0.0 if unknown is None else round(int(uses[unknown]) / max(num_tokens, 1), 6),
        **(_use_of(tokenizer, uses) if num_tokens >= _ENOUGH * len(tokenizer) else {}),
        "splits": [[_shown(piece) for piece in pieces(tokenizer, line)] for line in _sample_lines(texts)],
        **(_against_jieba(tokenizer, texts) if words else {}),
    }


def _use_of(tokenizer: Any, uses: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "used_ratio": round(float((uses > 0).mean()), 4),
        "wasteful_tokens": _wasteful(tokenizer, uses),
    }


def script_of(text: str) -> str:
    """Whether most letters of a text are `han`, `latin` or `other`; a text without letters is `other`."""
    counts = [sum(map(len, letters.findall(text))) for letters in (_HAN, _LATIN, _OTHER)]
    return SCRIPTS[counts.index(max(counts))] if max(counts) else "other"


class _RoundTrip:
    """Whether decoding gives the text that went in, or what normalising made of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        self._documents = 0
        self._failures = 0
        self._first = ""

    def check(self, text: str, ids: list[int]) -> None:
        expected = self._normalizer.normalize_str(text) if self._normalizer is not None else text
        got = self._tokenizer.decode(ids, skip_special_tokens=False)
        self._documents += 1
        if got == expected:
            return
        self._failures += 1
        if not self._first:
            at = _first_difference(expected, got)
            self._first = (
                f"document {self._documents}, character {at + 1}: "
                f"{expected[at : at + _CONTEXT]!r} came back as {got[at : at + _CONTEXT]!r}"
            )

    def figures(self) -> dict[str, Any]:
        return {
            "round_trip": self._failures == 0,
            "round_trip_of": "text" if self._normalizer is None else "normalised text",
            "round_trip_documents": self._documents,
            "round_trip_failures": self._failures,
            "round_trip_first_failure": self._first,
        }


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _by_script(groups: dict[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for script, sums in groups.items():
        documents, tokens, chars, size = sums.tolist()
        if tokens:
            figures[f"{script}_documents"] = documents
            figures[f"{script}_chars_per_token"] = round(chars / tokens, 4)
            figures[f"{script}_bytes_per_token"] = round(size / tokens, 4)
    return figures


def _unknown_id(tokenizer: Any) -> int | None:
    unknown = tokenizer.special_tokens_map.get("unk_token")
    return None if unknown is None else tokenizer.backend_tokenizer.token_to_id(unknown)


def _wasteful(tokenizer: Any, uses: npt.NDArray[np.int64]) -> list[str]:
    """Entries without a use, longest first; not special tokens and not single bytes, which must be there."""
    backend = tokenizer.backend_tokenizer
    special = set(tokenizer.all_special_ids)
    unused = [number for number in np.flatnonzero(uses == 0).tolist() if number not in special]
    written = [token_bytes(backend, backend.id_to_token(number) or "") for number in unused]
    longest = sorted((data for data in written if len(data) > 1), key=lambda data: (-len(data), data))
    return [data.decode(errors="backslashreplace") for data in longest[:_NUM_WASTEFUL]]


def _sample_lines(texts: Sequence[str]) -> list[str]:
    """The first lines of some length, from documents of each script in turn."""
    found: dict[str, list[str]] = {script: [] for script in SCRIPTS}
    for text in texts:
        lines = found[script_of(text[:2000])]
        if len(lines) < _NUM_SPLITS:
            lines += [line.strip()[:_SPLIT_CHARS] for line in text[:2000].splitlines() if len(line) > 10][:1]
        if all(len(lines) == _NUM_SPLITS for lines in found.values()):
            break
    share = _NUM_SPLITS // max(1, sum(map(bool, found.values())))
    return [line for lines in found.values() for line in lines[:share]]


def _shown(piece: Piece) -> str:
    content = piece.content
    return content if isinstance(content, str) else content.decode(errors="backslashreplace")


def _against_jieba(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    counts = boundaries(_han_cuts(tokenizer, texts))
    if not counts["jieba"]:
        return {}
    precision = counts["both"] / max(1, counts["ours"])
    recall = counts["both"] / counts["jieba"]
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return {
        "jieba_precision": round(precision, 4),
        "jieba_recall": round(recall, 4),
        "jieba_f1": round(f1, 4),
    }


def _han_cuts(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Runs of Han characters and the places, in characters, where the tokenizer cuts them."""
    seen = 0
    for text in texts:
        for run in _HAN.findall(text):
            starts = list(accumulate(len(char.encode()) for char in run))
            place = {end: number for number, end in enumerate(starts, start=1)}
            ends = [place[piece.end] for piece in pieces(tokenizer, run) if piece.end in place]
            yield run, [end for end in ends if end < len(run)]
            seen += len(run)
        if seen > _JIEBA_CHARS:
            return
