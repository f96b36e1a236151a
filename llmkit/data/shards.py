"""Token shards: documents as ids in `.npy` files, memory-mapped, found again by what made them.

A source's shards lie in a folder named by a hash of all that decides their content: the tokenizer, the texts, the
split. A stale one cannot be taken for a fresh one: it has another address.

Layout: `train-00000.npy`, ... and `held_out-00000.npy`, ... hold each document's ids followed by one
end-of-text id; `train-documents.npy` and `held_out-documents.npy` the position at which each document begins
(int64); `train-counts.npy` and `held_out-counts.npy` how often each id occurs (int64).

They are made in parts (`pipeline.py`), by as many processes as there are, and then joined in order.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmkit.data.encode import PROOF_CHARS, CheckedEncoder, Ids, Verdict, prove
from llmkit.data.npy import NpyWriter
from llmkit.data.pipeline import HERE, Engine, Fill, Progress, Stage, finish
from llmkit.data.places import Tally
from llmkit.data.rows import Ints
from llmkit.data.split import hash_bytes, nothing_to_train_on
from llmkit.data.texts import Texts
from llmkit.data.tokenizers import BATCH_CHARS, LightTokenizer, eos_id, fingerprint, token_dtype
from llmkit.data.tokenizers.encoding import batches
from llmkit.durable import (
    discard,
    make_folders,
    naming_full_disks,
    one_at_a_time,
    read_manifest,
    remove_folder,
    sweep_beside,
    verify_folder,
    write_folder,
)
from llmkit.errors import CorruptError

FORMAT = 1
MAX_FILE_BYTES = 256 * 2**20
_COUNTED_AT_ONCE = 2**22

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")

_WORTH_FAST, _WORTH_SLOW = 24_000_000, 1_000_000
"""Bytes that take the fast encoder, and the other one, as long as a process takes to start."""


@dataclass
class SplitCounts:
    """What one split holds: bytes and characters of the text; tokens with each document's end of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    chars: int = 0
    longest: int = 0
    shortest: int = 0
    tokens_per_file: int = 0

    def add(self, lengths: npt.NDArray[Any], num_bytes: int, num_chars: int) -> None:
        """Count documents of `lengths` tokens each, the end of text included."""
        if not len(lengths):
            return
        self.shortest = min(self.shortest or int(lengths.min()), int(lengths.min()))
        self.longest = max(self.longest, int(lengths.max()))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.bytes += num_bytes
        self.chars += num_chars

    def include(self, other: "SplitCounts") -> None:
        """Add what another part holds."""
        self.longest = max(self.longest, other.longest)
        self.shortest = min(self.shortest or other.shortest, other.shortest or self.shortest)
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.chars += other.chars


def _mapped(path: Path) -> Any:
    """The array in a file, read when it is looked at.

    Raises:
        CorruptError: Its head is damaged. Only sizes are checked beforehand.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise CorruptError(
            f"{path}: not readable as an array ({error})",
            hint=f"remove {path.parent}: the same command makes it anew",
        ) from error


class TokenStream:
    """One split's tokens as one long array, read in place from its files; another process opens them itself.

    Attributes:
        name: The source's name, for messages.
        num_tokens: Tokens, each document's end included.
        num_documents: Documents.
        num_bytes: UTF-8 bytes of the text.
        num_chars: Characters of the text.
    """

    def __init__(self, folder: Path, split: Split, name: str, counts: SplitCounts) -> None:
        self._made_of = (folder, split, name, counts)
        self.name = name
        self.num_tokens = counts.tokens
        self.num_documents = counts.documents
        self.num_bytes = counts.bytes
        self.num_chars = counts.chars
        self._tokens_per_file = counts.tokens_per_file
        num_files = -(-counts.tokens // counts.tokens_per_file) if counts.tokens else 0
        self._files = [_mapped(_token_file(folder, split, i)) for i in range(num_files)]
        starts = folder / f"{split}-documents.npy"
        self._starts: Ints = _mapped(starts) if counts.documents else np.zeros(0, np.int64)

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[Path, Split, str, SplitCounts]]:
        # What is mapped would be copied whole into the pickle.
        return TokenStream, self._made_of

    def read(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens in [start, stop), uint16 or uint32; a view of the file where they lie in one.

        Raises:
            IndexError: The range is not inside the stream.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.name!r}")
        size = self._tokens_per_file
        first, last = start // size, (stop - 1) // size
        parts = [
            self._files[i][max(start - i * size, 0) : min(stop - i * size, size)]
            for i in range(first, last + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> Ints:
        """The positions in [start, stop) at which documents begin, sorted."""
        first, last = np.searchsorted(self._starts, [start, stop])
        return np.asarray(self._starts[first:last])

    def document_lengths(self) -> Ints:
        """The tokens of each document, its end of text included."""
        return np.diff(self._starts, append=self.num_tokens)


class TokenShards:
    """A source's published shards.

    Attributes:
        folder: Where they are; its name is their address.
        name: What the source is called.
        manifest: Hashes, fingerprints and counts.
        was_there: Whether they were found, and not made by this call.
    """

    was_there = False

    def __init__(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.name = name
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path, *, name: str | None = None) -> "TokenShards":
        """Open a folder of shards, checking that every file is there in its full size.

        Args:
            folder: The folder.
            name: What the source is called now; by default what it was called when the shards were made.

        Raises:
            CorruptError: A file is missing or of another size, or the manifest is not ours.
        """
        manifest = read_manifest(folder)
        if manifest.get("kind") != "shards" or manifest.get("format") != FORMAT:
            raise CorruptError(f"{folder}: these are no token shards of format {FORMAT}")
        for file, entry in manifest["files"].items():
            path = folder / file
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "missing" if size is None else f"{size} bytes instead of {entry['bytes']}"
                raise CorruptError(
                    f"{path}: {found}", hint="remove the folder: it is made again from the text"
                )
        return cls(folder, name or manifest["name"], manifest)

    def split(self, split: Split) -> TokenStream:
        """The tokens of one split."""
        return TokenStream(self.folder, split, self.name, self.counts(split))

    def counts(self, split: Split) -> SplitCounts:
        """What one split holds."""
        return SplitCounts(**self.manifest["splits"][split])

    def token_counts(self, split: Split) -> Ints:
        """How often each id occurs in one split, up to the largest that does."""
        path = _count_file(self.folder, split)
        if path.name in self.manifest["files"]:
            return np.asarray(_mapped(path))
        found, stream = np.zeros(0, np.int64), self.split(split)  # shards of before there was this file
        for start in range(0, stream.num_tokens, _COUNTED_AT_ONCE):
            stop = min(start + _COUNTED_AT_ONCE, stream.num_tokens)
            found = add_counts(found, np.bincount(stream.read(start, stop)))
        return found

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            CorruptError: Names the file that differs.
        """
        verify_folder(self.folder)


@dataclass(frozen=True)
class _Job:
    """What decides a source's shards, and hence their address."""

    tokenizer: str
    texts: str
    held_out_below: int
    eos: int
    dtype: str
    tokens_per_file: int

    @property
    def address(self) -> str:
        content = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def build_shards(
    sources: Sequence[Texts],
    tokenizer: Any,
    *,
    held_out: float,
    held_out_below: int,
    cache: Path,
    engine: Engine = HERE,
    progress: Progress | None = None,
    fresh: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[TokenShards]:
    """The shards of each source, in order: found in the cache, else made.

    Several processes may call this at once: one makes a source's shards, the others wait and find them.

    Args:
        sources: The texts.
        tokenizer: A tokenizer with an end-of-text token.
        held_out: Share of documents kept out of training, for the message when nothing is left.
        held_out_below: Documents whose split hash is below this are held out (`split.find_threshold`).
        cache: The cache folder; shards go to `shards/` in it.
        engine: What does the work.
        progress: Called with the bytes done so far and in all.
        fresh: Make them anew, also if they are there.
        max_file_bytes: Size above which tokens go on in another file.

    Raises:
        DataError: The text cannot be read or divided, or the tokenizer has no end of text.
    """
    dtype = np.dtype(token_dtype(tokenizer))
    fixed: dict[str, Any] = {
        "tokenizer": fingerprint(tokenizer),
        "eos": eos_id(tokenizer),
        "dtype": dtype.name,
        "tokens_per_file": max_file_bytes // dtype.itemsize,
        "held_out_below": held_out_below,
    }
    total, before = sum(sum(texts.sizes) for texts in sources), 0
    shards = []
    for texts in sources:
        builder = _Builder(texts, tokenizer, _Job(texts=texts.identity, **fixed), cache / "shards", engine)
        shards.append(builder.find_or_build(_after(progress, before, total), fresh=fresh))
        before += sum(texts.sizes)
    if held_out < 1 and sum(shard.counts("train").documents for shard in shards) == 0:
        raise nothing_to_train_on(None, held_out)
    return shards


@dataclass(frozen=True)
class _Builder:
    texts: Texts
    tokenizer: Any
    job: _Job
    store: Path
    engine: Engine

    def forget(self) -> None:
        """Remove what is there, finished or not."""
        folder = self.store / self.job.address
        for place in (folder, *folder.parent.glob(f"{self.job.address}.*.parts")):
            if place.is_dir():
                remove_folder(place)

    def find_or_build(self, progress: Progress | None, *, fresh: bool = False) -> TokenShards:
        folder = self.store / self.job.address
        found = None if fresh else _opened(folder, self.texts.name)
        if found is not None:
            found.was_there = True
            return found
        with naming_full_disks(folder):
            make_folders(folder.parent)
            with one_at_a_time(folder.with_name(f"{self.job.address}.lock")):
                if fresh:
                    self.forget()
                # While this process waited for the lock, the one that held it may have made them.
                return _opened(folder, self.texts.name) or self._build(folder, progress)

    def _build(self, folder: Path, progress: Progress | None) -> TokenShards:
        sweep_beside(folder)
        parts = folder.with_name(f"{self.job.address}.{self.texts.cut[:8]}.parts")
        verdict = prove(self.tokenizer, _sample(self.texts))
        work = EncodeWork(self.texts, _portable(self.tokenizer), verdict.encoder, self.job)
        worth = _WORTH_FAST if verdict.encoder == "gigatoken" else _WORTH_SLOW
        made = finish(Stage(work, parts, self.texts.sizes, worth), self.engine, progress=progress)
        self._join(made, folder, verdict)
        discard(parts)
        return TokenShards.open(folder, name=self.texts.name)

    def _join(self, made: Sequence[Path], folder: Path, verdict: Verdict) -> None:
        """One array a split, in files of a fixed size, whatever the parts were."""
        facts: dict[str, object] = {"kind": "shards", "format": FORMAT, "address": folder.name}
        manifests = [read_manifest(part) for part in made]
        with write_folder(folder, facts=facts) as temporary:
            facts |= {"name": self.texts.name, **asdict(self.job), "encoder": asdict(verdict)}
            facts["splits"] = {
                split: asdict(_join_split(split, made, manifests, temporary, self.job)) for split in SPLITS
            }
            tally = _tallied(manifests)
            self.texts.check(tally)
            facts["skipped"] = tally.shown()


@dataclass(frozen=True)
class EncodeWork:
    """Texts to ids: each part becomes, for each split, the ids of its documents and how long they are."""

    texts: Texts
    tokenizer: Any
    encoder: str
    job: _Job

    def open(self) -> Fill:
        """Load the encoder."""
        encoder = CheckedEncoder(self.tokenizer, self.encoder)
        return lambda number, folder: self._fill(encoder, number, folder)

    def _fill(self, encoder: CheckedEncoder, number: int, folder: Path) -> Mapping[str, object]:
        tally = Tally()
        writers = {split: _PartWriter(folder, split, self.job) for split in SPLITS}
        for batch in batches(self.texts.read(number, tally), BATCH_CHARS):
            data = [text.encode() for text in batch]
            below = self.job.held_out_below
            sides = [below > 0 and hash_bytes(text) < below for text in data]
            ids = encoder(batch)
            for split, writer in writers.items():
                chosen = [place for place, side in enumerate(sides) if side == (split == "held_out")]
                writer.add(
                    [ids[place] for place in chosen],
                    sum(len(data[place]) for place in chosen),
                    sum(len(batch[place]) for place in chosen),
                )
        counts = {split: asdict(writer.close()) for split, writer in writers.items()}
        return {"splits": counts, "skipped": tally.as_json()}


class _PartWriter:
    """Writes one split of one part: `train.npy` and `train-lengths.npy`."""

    def __init__(self, folder: Path, split: Split, job: _Job) -> None:
        self._eos = job.eos
        self._dtype = np.dtype(job.dtype)
        self._tokens = NpyWriter(folder / f"{split}.npy", self._dtype)
        self._lengths = NpyWriter(folder / f"{split}-lengths.npy", np.dtype(np.int64))
        self._counts = SplitCounts(tokens_per_file=job.tokens_per_file)

    def add(self, documents: Sequence[Ids], num_bytes: int, num_chars: int) -> None:
        """Append documents, each followed by the end of text."""
        if not documents:
            return
        lengths = np.fromiter((len(ids) + 1 for ids in documents), dtype=np.int64, count=len(documents))
        ends = np.cumsum(lengths)
        joined = np.empty(int(ends[-1]), dtype=self._dtype)
        joined[ends - 1] = self._eos
        for ids, end, length in zip(documents, ends.tolist(), lengths.tolist(), strict=True):
            joined[end - length : end - 1] = ids
        self._tokens.append(joined)
        self._lengths.append(lengths)
        self._counts.add(lengths, num_bytes, num_chars)

    def close(self) -> SplitCounts:
        self._tokens.close()
        self._lengths.close()
        return self._counts


def _join_split(
    split: Split, made: Sequence[Path], manifests: Sequence[Mapping[str, Any]], folder: Path, job: _Job
) -> SplitCounts:
    counts = SplitCounts(tokens_per_file=job.tokens_per_file)
    starts = NpyWriter(folder / f"{split}-documents.npy", np.dtype(np.int64))
    occurrences = NpyWriter(_count_file(folder, split), np.dtype(np.int64))
    seen = np.zeros(0, np.int64)
    tokens = _TokenFiles(folder, split, job)
    for part, manifest in zip(made, manifests, strict=True):
        lengths: Ints = np.load(part / f"{split}-lengths.npy")
        starts.append(counts.tokens + np.cumsum(lengths) - lengths)
        ids = np.load(part / f"{split}.npy", mmap_mode="r")
        tokens.append(ids)
        seen = add_counts(seen, np.bincount(ids))
        counts.include(SplitCounts(**manifest["splits"][split]))
    occurrences.append(seen)
    for file in (starts, tokens, occurrences):
        file.close()
    return counts


def add_counts(a: Ints, b: Ints) -> Ints:
    """Two counts by id, added up; one may go further than the other."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total


class _TokenFiles:
    """One array of ids in files of `tokens_per_file` each, but the last."""

    def __init__(self, folder: Path, split: Split, job: _Job) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(job.dtype)
        self._size = job.tokens_per_file
        self._number = 0
        self._file: NpyWriter | None = None

    def append(self, ids: npt.NDArray[Any]) -> None:
        while len(ids):
            if self._file is None:
                self._file = NpyWriter(_token_file(self._folder, self._split, self._number), self._dtype)
            room = self._size - self._file.length
            self._file.append(ids[:room])
            ids = ids[room:]
            if self._file.length == self._size:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._number += 1


def _after(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one source as progress of all."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _portable(tokenizer: Any) -> Any:
    """What another process needs of the tokenizer; that one need not import transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer if backend is None else LightTokenizer(backend, str(tokenizer.name_or_path), {})


def _sample(texts: Texts) -> Iterator[str]:
    """Texts from up to sixteen parts spread over the source, `PROOF_CHARS` characters in all."""
    count = len(texts.sizes)
    places = sorted({count * i // 16 for i in range(16)})
    for place in places:
        room = PROOF_CHARS // len(places)
        for text in texts.read(place, Tally()):
            yield text[:room]
            room -= len(text)
            if room <= 0:
                break


def _tallied(manifests: Sequence[Mapping[str, Any]]) -> Tally:
    total = Tally()
    for manifest in manifests:
        total.add(Tally.from_json(manifest["skipped"]))
    return total


def _opened(folder: Path, name: str) -> TokenShards | None:
    """The shards if they are there whole; damaged ones count as absent, since they can be made again."""
    try:
        return TokenShards.open(folder, name=name)
    except CorruptError:
        return None


def _token_file(folder: Path, split: Split, number: int) -> Path:
    return folder / f"{split}-{number:05d}.npy"


def _count_file(folder: Path, split: Split) -> Path:
    return folder / f"{split}-counts.npy"
