"""Evaluation data is kept out: documents that share a run of words with it are found by 64-bit hashes of the runs.

**Source**: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (runs of 13 words, case and
punctuation ignored).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from llmkit.data.duplicates.evaluation import evaluation_texts
from llmkit.data.files import File, hash_of, shown
from llmkit.data.inputs import resolve_files
from llmkit.data.words import RULES, Hashes, run_blocks, runs, word_hashes
from llmkit.errors import DataError
from llmkit.recipe.preparation import Decontaminate

SHORTEST = 8
"""Words that an evaluation text must have to be looked for as a whole when it has fewer than a run."""

_RULES = f"contamination 1, {RULES}"
_BATCH = 1024
_FILTER_BITS = 32
"""Bits of the filter for each run looked for: one run in 32 passes it by chance."""


class Decontaminator:
    """Says of a document whether it holds a piece of the evaluation files.

    A piece is a run of `spec.ngram` words of an evaluation text (`llmkit.data.words` says what a word is: in
    Chinese a character; case, accents and punctuation are ignored). An evaluation text with fewer words, but at
    least 8, counts when it stands in a document as a whole; a shorter one (`yes`, `Paris`) is not looked for,
    because it is anywhere. Every text value of a file is such a text; of plain text, every paragraph.

    Time is linear in the document; memory is some 16 bytes a run of the evaluation files.

    Args:
        spec: The settings.
        base: Where relative paths are looked for after the current folder.

    Attributes:
        identity: A hash of all that decides the result: the files' contents and names, the settings, the rules.
        figures: For each evaluation file its `texts`, the `runs` taken from it, and how many texts were
            `too_short`.

    Raises:
        DataError: A file is not there, cannot be read, or has no text of 8 words.
        MissingError: A package that reading a file needs is not installed.
    """

    def __init__(self, spec: Decontaminate, base: Path) -> None:
        files = _files(spec, base)
        self._names = _names(files)
        self._ngram = spec.ngram
        self.identity = _identity(spec, files, self._names)
        self.figures: dict[str, dict[str, int]] = {}
        self._sizes: set[int] = set()
        self._known = _Known([self._read(number, path) for number, path in enumerate(files)])

    def __call__(self, text: str) -> str | None:
        """The name of the evaluation file that the document shares words with; None when it is clean."""
        for found in run_blocks(text, sorted(self._sizes)):
            file = self._known.first_file(found)
            if file is not None:
                return self._names[file]
        return None

    def _read(self, number: int, path: File) -> Hashes:
        """The runs of a file, sorted."""
        found: list[Hashes] = []
        texts = short = 0
        for batch in _batches(evaluation_texts(path)):
            words, counts = word_hashes(batch)
            texts += int(np.count_nonzero(counts))
            short += int(np.count_nonzero((counts > 0) & (counts < min(SHORTEST, self._ngram))))
            for size, hashes in _pieces(words, counts, self._ngram):
                self._sizes.add(size)
                found.append(hashes)
        if not found:
            what = f"no text of {min(SHORTEST, self._ngram)} words or more" if texts else "no text"
            raise DataError(
                f"{shown(path)}: there is {what} in it, so there is nothing to look for",
                hint="name files with the questions and contexts in `decontaminate.files`",
            )
        unique = np.unique(np.concatenate(found))
        self.figures[self._names[number]] = {"texts": texts, "runs": len(unique), "too_short": short}
        return unique


class _Known:
    """Hashes of runs, and in which file each is; most others are told apart by one bit."""

    def __init__(self, by_file: Sequence[Hashes]) -> None:
        files = np.repeat(np.arange(len(by_file), dtype=np.uint32), [len(found) for found in by_file])
        # Of a run that is in several files the first one stays, as np.unique gives first places.
        self._hashes, firsts = np.unique(np.concatenate(by_file), return_index=True)
        self._files = files[firsts]
        bits = max(10, min(30, (len(self._hashes) * _FILTER_BITS).bit_length()))
        self._shift = np.uint64(64 - bits)
        marked = np.zeros(2**bits // 8, np.uint8)
        places = self._hashes >> self._shift
        np.bitwise_or.at(marked, places >> np.uint64(3), _bit(places))
        self._filter = marked

    def first_file(self, runs: Hashes) -> int | None:
        """The first file that has the earliest known one of these runs; None when none is known."""
        places = runs >> self._shift
        passed = runs[(self._filter[places >> np.uint64(3)] & _bit(places)) != 0]
        if not len(passed):
            return None
        at = np.minimum(np.searchsorted(self._hashes, passed), len(self._hashes) - 1)
        known = self._hashes[at] == passed
        return int(self._files[at[known.argmax()]]) if known.any() else None


def _bit(places: Hashes) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))


def _pieces(words: Hashes, counts: NDArray[np.int64], ngram: int) -> Iterator[tuple[int, Hashes]]:
    """What to look for of some texts: all runs of the long ones, the short ones whole."""
    begins = np.cumsum(counts) - counts
    sizes = [size for size in range(min(SHORTEST, ngram), ngram) if (counts == size).any()]
    for size, found in runs(words, [*sizes, ngram]):
        if size < ngram:
            yield size, found[begins[counts == size]]
            continue
        own = np.ones(len(words), np.bool_)  # not the runs that cross from one text into the next
        ends = begins + counts
        for back in range(1, ngram):
            own[np.maximum(ends - back, 0)[counts >= back]] = False
        if own[: len(found)].any():
            yield size, found[own[: len(found)]]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        yield batch


def _files(spec: Decontaminate, base: Path) -> list[File]:
    from llmkit.recipe.schema import Source

    return resolve_files(Source(files=list(spec.files)), base)


def _names(files: Sequence[File]) -> list[str]:
    """The files' names, and the folder's before it where two have one name."""
    parts = [PurePosixPath(shown(path)).parts for path in files]
    names = Counter(part[-1] for part in parts)
    return [part[-1] if names[part[-1]] == 1 else "/".join(part[-2:]) for part in parts]


def _identity(spec: Decontaminate, files: Sequence[File], names: Sequence[str]) -> str:
    contents = [(name, hash_of(path)) for name, path in zip(names, files, strict=True)]
    facts = [_RULES, SHORTEST, spec.ngram, contents]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()
