"""Token shards: documents as ids in `.npy` files, memory-mapped, found again by what made them.

A source's shards lie in a folder named by a hash of all that decides their content: the tokenizer, the bytes
of the files, the settings of the source that matter, the split. A stale one cannot be taken for a fresh one:
it has another address.

Layout: `train-00000.npy`, ... and `held_out-00000.npy`, ... hold each document's ids followed by one
end-of-text id; `train-documents.npy` and `held_out-documents.npy` the position at which each document begins
(int64).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from llmkit.data import sources as sources_module
from llmkit.data.rows import Ints
from llmkit.data.sources import Tally
from llmkit.data.split import document_hash, find_threshold, nothing_to_train_on
from llmkit.data.tokenizers import encode_documents, eos_id, fingerprint, token_dtype
from llmkit.durable import naming_full_disks, one_at_a_time, read_manifest, verify_folder, write_folder
from llmkit.errors import CorruptError

if TYPE_CHECKING:
    from llmkit.recipe.schema import Source

FORMAT = 1
MAX_FILE_BYTES = 256 * 2**20

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")
Progress = Callable[[int, int], None]


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

    def add(self, text: str, num_tokens: int) -> None:
        """Count one document."""
        self.shortest = num_tokens if self.documents == 0 else min(self.shortest, num_tokens)
        self.longest = max(self.longest, num_tokens)
        self.documents += 1
        self.tokens += num_tokens
        self.bytes += len(text) if text.isascii() else len(text.encode())
        self.chars += len(text)


class TokenStream:
    """One split's tokens as one long array, read in place from its files.

    Attributes:
        name: The source's name, for messages.
        num_tokens: Tokens, each document's end included.
        num_documents: Documents.
        num_bytes: UTF-8 bytes of the text.
    """

    def __init__(self, folder: Path, split: Split, name: str, counts: SplitCounts) -> None:
        self.name = name
        self.num_tokens = counts.tokens
        self.num_documents = counts.documents
        self.num_bytes = counts.bytes
        self._tokens_per_file = counts.tokens_per_file
        num_files = -(-counts.tokens // counts.tokens_per_file) if counts.tokens else 0
        self._files = [np.load(_token_file(folder, split, i), mmap_mode="r") for i in range(num_files)]
        starts = folder / f"{split}-documents.npy"
        self._starts: Ints = np.load(starts, mmap_mode="r") if counts.documents else np.zeros(0, np.int64)

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


class TokenShards:
    """A source's published shards.

    Attributes:
        folder: Where they are; its name is their address.
        name: What the source is called.
        manifest: Hashes, fingerprints and counts.
    """

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
    source: str
    held_out_below: int
    eos: int
    dtype: str
    tokens_per_file: int

    @property
    def address(self) -> str:
        content = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def build_shards(
    sources: "Sequence[Source]",
    tokenizer: Any,
    *,
    held_out: float,
    cache: Path,
    base: Path,
    progress: Progress | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[TokenShards]:
    """The shards of each source, in order: found in the cache, else made.

    Several processes may call this at once: one makes a source's shards, the others wait and find them.

    Args:
        sources: Where the text comes from.
        tokenizer: A transformers tokenizer with an end-of-text token.
        held_out: Share of documents kept out of training. Above 0 at least one document of all is held out.
        cache: The cache folder; shards go to `shards/` in it.
        base: Folder of the recipe, see `sources.resolve_files`.
        progress: Called with the bytes read so far and in all (0 in all where the size is unknown).
        max_file_bytes: Size above which tokens go on in another file.

    Raises:
        DataError: The text cannot be read or divided, or the tokenizer has no end of text.
    """
    threshold = held_out_threshold(sources, held_out, base=base, cache=cache)
    dtype = token_dtype(tokenizer)
    fixed: dict[str, Any] = {
        "tokenizer": fingerprint(tokenizer),
        "eos": eos_id(tokenizer),
        "dtype": np.dtype(dtype).name,
        "tokens_per_file": max_file_bytes // np.dtype(dtype).itemsize,
        "held_out_below": threshold,
    }
    meter = _Meter(progress, [sources_module.num_bytes(source, base, cache=cache) for source in sources])
    shards = []
    for source in sources:
        job = _Job(source=sources_module.fingerprint(source, base, cache=cache), **fixed)
        shards.append(_find_or_build(job, source, tokenizer, cache=cache, base=base, meter=meter))
        meter.source_done()
    if held_out < 1 and sum(shard.counts("train").documents for shard in shards) == 0:
        raise nothing_to_train_on(one=False, ratio=held_out)
    return shards


def held_out_threshold(sources: "Sequence[Source]", held_out: float, *, base: Path, cache: Path) -> int:
    """The split hash below which a document of these sources is held out (`split.find_threshold`).

    It reads documents until one of each side was seen, about 1/`held_out` of them.
    """
    texts = (
        document.text
        for source in sources
        for document in sources_module.read_documents(source, base=base, cache=cache)
    )
    return find_threshold(texts, held_out)


def _find_or_build(
    job: _Job, source: "Source", tokenizer: Any, *, cache: Path, base: Path, meter: "_Meter"
) -> TokenShards:
    name = sources_module.source_name(source, base)
    folder = cache / "shards" / job.address
    found = _opened(folder, name)
    if found is not None:
        return found
    with naming_full_disks(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder.with_name(f"{job.address}.lock")):
            # While this process waited for the lock, the one that held it may have made them.
            found = _opened(folder, name)
            if found is None:
                _sweep(folder)
                _build(folder, job, source, tokenizer, name=name, cache=cache, base=base, meter=meter)
                found = TokenShards.open(folder, name=name)
    return found


def _opened(folder: Path, name: str) -> TokenShards | None:
    """The shards if they are there whole; damaged ones count as absent, since they can be made again."""
    try:
        return TokenShards.open(folder, name=name)
    except CorruptError:
        return None


def _build(
    folder: Path,
    job: _Job,
    source: "Source",
    tokenizer: Any,
    *,
    name: str,
    cache: Path,
    base: Path,
    meter: "_Meter",
) -> None:
    tally = Tally()
    documents = sources_module.read_documents(source, base=base, cache=cache, tally=tally)
    texts = meter.watch((document.text for document in documents), tally)
    started = time.perf_counter()
    facts: dict[str, object] = {"kind": "shards", "format": FORMAT, "address": folder.name, "name": name}
    with write_folder(folder, facts=facts) as temporary:
        writers = {split: _SplitWriter(temporary, split, job) for split in SPLITS}
        for text, ids in encode_documents(texts, tokenizer):
            held_out = document_hash(text) < job.held_out_below
            writers["held_out" if held_out else "train"].add(text, ids)
        facts.update(asdict(job))
        facts["splits"] = {split: asdict(writer.close()) for split, writer in writers.items()}
        facts["skipped"] = {"empty_files": tally.empty_files, "empty_documents": tally.empty_documents}
        facts["seconds"] = round(time.perf_counter() - started, 3)


class _SplitWriter:
    """Writes one split's files."""

    def __init__(self, folder: Path, split: Split, job: _Job) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(job.dtype)
        self._eos = np.array([job.eos], dtype=self._dtype)
        self._counts = SplitCounts(tokens_per_file=job.tokens_per_file)
        self._starts = _NpyWriter(folder / f"{split}-documents.npy", np.dtype(np.int64))
        self._file: _NpyWriter | None = None

    def add(self, text: str, ids: npt.NDArray[np.unsignedinteger]) -> None:
        self._starts.append(np.array([self._counts.tokens], dtype=np.int64))
        tokens = np.concatenate([ids, self._eos])
        position = self._counts.tokens
        while tokens.size:
            room = self._counts.tokens_per_file - position % self._counts.tokens_per_file
            self._current(position).append(tokens[:room])
            position += min(room, tokens.size)
            tokens = tokens[room:]
        self._counts.add(text, position - self._counts.tokens)

    def close(self) -> SplitCounts:
        self._starts.close()
        if self._file is not None:
            self._file.close()
        return self._counts

    def _current(self, position: int) -> "_NpyWriter":
        """The file that the token at `position` belongs to; a new one at each multiple of its capacity."""
        if self._file is None or position % self._counts.tokens_per_file == 0:
            if self._file is not None:
                self._file.close()
            number = position // self._counts.tokens_per_file
            self._file = _NpyWriter(_token_file(self._folder, self._split, number), self._dtype)
        return self._file


class _NpyWriter:
    """Appends to a one-dimensional `.npy` file whose length is written when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file: BinaryIO = path.open("wb", buffering=2**20)
        self._dtype = dtype
        self._length = 0
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        # numpy pads the header so that a growing length never changes its size.
        assert self._file.tell() == self._header_bytes
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _Meter:
    """Adds up the progress over sources and tells it, a few times a second at most."""

    def __init__(self, progress: Progress | None, sizes: Sequence[int]) -> None:
        self._progress = progress
        self._sizes = list(sizes)
        self._total = sum(sizes) if all(sizes) else 0
        self._before = 0
        self._last = 0.0

    def watch(self, texts: Iterable[str], tally: Tally) -> Iterator[str]:
        for text in texts:
            yield text
            now = time.monotonic()
            if self._progress is not None and now - self._last > 0.2:
                self._last = now
                self._progress(self._before + tally.bytes_read, self._total)

    def source_done(self) -> None:
        self._before += self._sizes.pop(0)
        if self._progress is not None:
            self._progress(self._before, self._total)


def _token_file(folder: Path, split: Split, number: int) -> Path:
    return folder / f"{split}-{number:05d}.npy"


def _sweep(folder: Path) -> None:
    """Remove what a killed builder of this very address left; the lock is held, so nobody writes there."""
    for leftover in (
        *folder.parent.glob(f".{folder.name}.tmp-*"),
        *folder.parent.glob(f".{folder.name}.old-*"),
    ):
        shutil.rmtree(leftover, ignore_errors=True)
