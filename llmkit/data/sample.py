"""The documents that a tokenizer learns from and is measured on: chosen by hash, so the same in any order of work."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.data.pipeline import Engine, Fill, Progress, Stage, finish
from llmkit.data.places import Tally
from llmkit.data.split import document_hash
from llmkit.data.text import utf8_size
from llmkit.data.texts import StoredTexts, Texts, TextWriter, combined
from llmkit.durable import discard, naming_full_disks, one_at_a_time

MEASURED_BYTES = 2_000_000
"""Held-out text that a tokenizer is measured on."""

_RANGE = 2**64
_WORTH = 50_000_000
_AMPLE = 1.5


@dataclass(frozen=True)
class Sample:
    """What a tokenizer learns from, and what it is measured on: held-out documents, or none where none are."""

    learn: list[str]
    measure: list[str]


def choose_sample(
    sources: Sequence[Texts],
    *,
    limit: int,
    held_out_below: int,
    cache: Path,
    engine: Engine,
    progress: Progress | None = None,
) -> Sample:
    """The training documents with the smallest hashes, as many as fit into `limit` UTF-8 bytes.

    Each worker looks at parts of the corpus and puts aside the documents that can be among them; what it puts aside is
    about the sample's size, however large the corpus is.

    Args:
        sources: The texts.
        limit: Bytes to learn from.
        held_out_below: Documents whose split hash is below this are not learnt from, and serve to measure.
        cache: Where parts are kept meanwhile.
        engine: What does the work.
        progress: Told how far it is.
    """
    total = max(1, sum(sum(texts.sizes) for texts in sources))
    below = _share(limit / total)
    # Measuring takes what it gets: a little less text than wanted does not matter there.
    held_out = max(1, total * held_out_below // _RANGE)
    measure_below = _share(MEASURED_BYTES / held_out)
    while True:
        learn, measure = _Smallest(limit, "tokenizer"), _Smallest(MEASURED_BYTES, "measure")
        work = SampleWork(tuple(sources), limit, held_out_below, below, measure_below)
        identities = [(texts.identity, texts.cut) for texts in sources]
        store = cache / "samples" / combined(identities, limit, held_out_below, below, measure_below)[:32]
        with naming_full_disks(store), one_at_a_time(store.with_name(f".{store.name}.lock")):
            sizes = [size for texts in sources for size in texts.sizes]
            for part in finish(Stage(work, store, sizes, _WORTH), engine, progress=progress):
                for name, chosen in (("learn", learn), ("measure", measure)):
                    for text in StoredTexts(part / name):
                        chosen.add(text)
            discard(store)
        if below == _RANGE or learn.is_full:
            return Sample(learn.texts(), measure.texts())
        # Compressed files hold more text than their size says, and filters leave less: look at more of it.
        below = min(_RANGE, below * 8)


@dataclass(frozen=True)
class SampleWork:
    """Puts aside the documents of a part that may be in the sample."""

    sources: tuple[Texts, ...]
    limit: int
    held_out_below: int
    below: int
    measure_below: int

    def open(self) -> Fill:
        """Number the parts of all sources."""
        places = [(texts, number) for texts in self.sources for number in range(len(texts.sizes))]
        return lambda number, folder: self._fill(*places[number], folder)

    def _fill(self, texts: Texts, number: int, folder: Path) -> Mapping[str, object]:
        learn, measure = _Smallest(self.limit, "tokenizer"), _Smallest(MEASURED_BYTES, "measure")
        for text in texts.read(number, Tally()):
            if self.held_out_below and document_hash(text) < self.held_out_below:
                measure.add(text, self.measure_below)
            else:
                learn.add(text, self.below)
        for name, chosen in (("learn", learn), ("measure", measure)):
            (folder / name).mkdir()
            writer = TextWriter(folder / name)
            for text in chosen.texts():
                writer.add(text)
            writer.close()
        return {}


class _Smallest:
    """Keeps the documents with the smallest hashes, as many as fit into `limit` bytes.

    The result is the longest beginning of all documents sorted by hash that fits. Once a document was
    refused, so is every one with a larger hash: else a small late one could slip in, and the order would
    matter.
    """

    def __init__(self, limit: int, purpose: str) -> None:
        self._limit = limit
        self._purpose = purpose
        self._heap: list[tuple[int, str, int]] = []
        self._total = 0
        self._refused_from = _RANGE

    @property
    def is_full(self) -> bool:
        """Whether something had to be refused, so that more text would not change the choice."""
        return self._refused_from < _RANGE

    def add(self, text: str, below: int = _RANGE) -> None:
        text = _clip(text, self._limit)
        hashed = document_hash(text, self._purpose)
        if hashed >= min(self._refused_from, below):
            return
        size = utf8_size(text)
        heapq.heappush(self._heap, (-hashed, text, size))
        self._total += size
        while self._total > self._limit:
            largest, _, gone = heapq.heappop(self._heap)
            self._refused_from = -largest
            self._total -= gone

    def texts(self) -> list[str]:
        return [text for _, text, _ in sorted(self._heap, reverse=True)]


def _share(share: float) -> int:
    """The hash below which a share of all documents lies, and some more."""
    return min(_RANGE, int(_RANGE * _AMPLE * share) + _RANGE // 1000)


def _clip(text: str, limit: int) -> str:
    """The text's beginning that fits into `limit` bytes."""
    if len(text) * 4 <= limit or utf8_size(text) <= limit:
        return text
    return text.encode()[:limit].decode(errors="ignore")
