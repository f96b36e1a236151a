"""Parts: a source cut into pieces of work that can be read apart, the same whoever reads them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data import cuts, files, hub, inputs, python_library, tables, text, warc
from llmkit.data.files import File
from llmkit.data.places import Document, Faults, FileFault, Place, Tally
from llmkit.data.remote import RemoteFile

if TYPE_CHECKING:
    from llmkit.recipe.schema import Source

_LONGEST_ROW = 2**20
"""Characters a table's row may have as one document; a longer one is cut into pieces (`cut_row`)."""
_BY_LINE = ("jsonl", "tsv")


@dataclass(frozen=True)
class Segment:
    """A piece of one file or data set, or all of it.

    Attributes:
        file: The file, here or elsewhere, or a data set's shard.
        start: The first byte; for parquet the first row group.
        stop: Where the next segment starts; None for the end of the file.
        num_bytes: How many bytes it has, about.
        docstrings: The docstrings of the Python file are wanted, not its source.
    """

    file: File | hub.Shard
    start: int = 0
    stop: int | None = None
    num_bytes: int = 0
    docstrings: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its file."""
        return self.start == 0 and self.stop is None

    @property
    def name(self) -> str:
        """What messages call it; holds no secrets."""
        if isinstance(self.file, hub.Shard):
            return f"{self.file.dataset} {self.file.index + 1} of {self.file.count}"
        return files.shown(self.file) if self.is_whole else f"{files.shown(self.file)} from {self.start:,}"

    def as_json(self) -> dict[str, Any]:
        """What it is, for a record; holds no secrets."""
        return {"name": self.name, "start": self.start, "stop": self.stop, "num_bytes": self.num_bytes}


@dataclass(frozen=True)
class Part:
    """A piece of work: what one process reads at a time.

    Attributes:
        index: Its place among the source's parts.
        name: What messages call it.
        segments: What it reads, in order.
        num_bytes: How many bytes it has, about, as they lie on the disk.
    """

    index: int
    name: str
    segments: tuple[Segment, ...]
    num_bytes: int

    def as_json(self) -> dict[str, Any]:
        """What it is, for a record; holds no secrets."""
        segments = [segment.as_json() for segment in self.segments]
        return {"index": self.index, "name": self.name, "num_bytes": self.num_bytes, "segments": segments}


def parts_of(source: "Source", base: Path, *, cache: Path | None = None, part_bytes: int) -> list[Part]:
    """Cut a source into parts of about `part_bytes` bytes; all parts in order give what the source gives.

    A large file is cut where that can be told by its bytes alone; small files share a part. A source with a
    `limit` is one part. The documents do not depend on `part_bytes`.

    Args:
        source: What to read.
        base: The recipe's folder, see `inputs.resolve_files`.
        cache: The cache folder, where standard input is kept.
        part_bytes: How large a part should be.

    Raises:
        DataError: A path, glob or folder holds nothing.
        MissingError: A package or data set is missing.
        RecipeError: The source names neither files nor a data set, or both.
    """
    patterns = inputs.patterns(source)
    if source.dataset is not None:
        return _of_shards(source.dataset, source, base)
    paths = inputs.resolve_files(source, base, cache=cache)
    if python_library.DOCSTRINGS in patterns:
        found = [replace(_whole(path, source), docstrings=True) for path in paths]
        return _grouped(found, None)
    if source.limit is not None:
        return _grouped([_whole(path, source) for path in paths], None)
    found = [segment for path in paths for segment in _segments_of(path, source, part_bytes)]
    return _grouped(found, part_bytes)


def read_part(part: Part, source: "Source", *, tally: Tally, whole_rows: bool = False) -> Iterator[Document]:
    """The part's documents in order, none of them blank, in bounded memory.

    Args:
        part: One of `parts_of`.
        source: The source it is a part of.
        tally: Counts what was read and skipped.
        whole_rows: Long rows and pages come whole (`Document.is_row`), to be cut with `cut_row` once they are
            clean: half a page of HTML is no page. By default they come in pieces.

    Raises:
        DataError: Something cannot be read or is not of the stated form, unless the source says to skip it.
        MissingError: A package or data set is missing.
    """
    room = source.limit
    found = False
    for segment in part.segments:
        found_here = _documents(segment, source, tally)
        for document in found_here if whole_rows else _cut(found_here):
            content = document.text
            if not content or content.isspace():
                tally.empty_documents += 1
                continue
            if room is not None:
                room -= len(content.encode())
                if room < 0 and found:
                    return
            found = True
            tally.documents += 1
            yield document


def cut_row(row: str) -> Iterator[str]:
    """A row whole, or if it has over 1 Mi characters its pieces (`text.pieces`); they depend on the row alone."""
    if len(row) <= _LONGEST_ROW:
        yield row
    else:
        yield from (piece for _, piece in text.pieces([row]))


def _cut(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        if document.is_row and len(document.text) > _LONGEST_ROW:
            yield from (Document(piece, document.place, document.number) for piece in cut_row(document.text))
        else:
            yield document


def _of_shards(dataset: str, source: "Source", base: Path) -> list[Part]:
    commit, number = hub.dataset_shards(dataset, source.split, base)
    segments = [Segment(hub.Shard(dataset, base, commit, index, number)) for index in range(number)]
    if source.limit is not None:
        return [Part(0, dataset, tuple(segments), source.limit)]
    return [Part(index, segment.name, (segment,), 0) for index, segment in enumerate(segments)]


def _segments_of(path: File, source: "Source", part_bytes: int) -> list[Segment]:
    whole = _whole(path, source)
    size = whole.num_bytes
    if size <= part_bytes:
        return [whole]
    if inputs.format_of(path, source) == "parquet" and not files.ending(path)[1]:
        return _of_groups(path, source, part_bytes) or [whole]
    step = _cutting_step(path, source, part_bytes)
    if step is None or size <= step or (source.on_error == "skip" and not _opens(path)):
        return [whole]
    starts = range(0, size, step)
    return [
        Segment(path, start, start + step if start + step < size else None, min(step, size - start))
        for start in starts
    ]


def _of_groups(path: File, source: "Source", part_bytes: int) -> list[Segment]:
    """The file's row groups, joined to about `part_bytes`; none if it cannot be read and that is to be skipped."""
    try:
        sizes = tables.parquet_group_bytes(path)
    except FileFault:
        if source.on_error == "stop":
            raise
        return []
    bounds, size = [0], 0
    for group, more in enumerate(sizes):
        if size and size + more > part_bytes:
            bounds.append(group)
            size = 0
        size += more
    bounds.append(len(sizes))
    return [
        Segment(path, start, stop, sum(sizes[start:stop])) for start, stop in pairwise(bounds) if stop > start
    ]


def _whole(path: File, source: "Source") -> Segment:
    try:
        return Segment(path, num_bytes=files.size_of(path))
    except FileFault:
        if source.on_error == "stop":
            raise
        return Segment(path)  # reading it will count it as skipped


def _opens(path: File) -> bool:
    """Whether the file lets itself be opened; one that does not is skipped whole, not once for each part."""
    if isinstance(path, RemoteFile):
        return True
    try:
        files.open_file(path).close()
    except OSError:
        return False
    return True


def _cutting_step(path: File, source: "Source", part_bytes: int) -> int | None:
    """Every how many bytes the file may be cut; None if it may not."""
    seeks = not isinstance(path, RemoteFile) or path.seeks
    if files.ending(path)[1] or not seeks or not cuts.is_cuttable(source.encoding):
        return None
    form = inputs.format_of(path, source)
    if form in _BY_LINE or (form == "text" and source.documents == "line"):
        return max(part_bytes, 1)
    if form == "text" and source.documents in ("auto", "paragraph"):
        return max(-(-part_bytes // cuts.SECTION), 1) * cuts.SECTION
    return None


def _grouped(segments: Sequence[Segment], part_bytes: int | None) -> list[Part]:
    """Join neighbours that together have at most `part_bytes`; None joins all."""
    groups: list[list[Segment]] = []
    size = 0
    for segment in segments:
        if groups and (part_bytes is None or size + segment.num_bytes <= part_bytes):
            groups[-1].append(segment)
            size += segment.num_bytes
        else:
            groups.append([segment])
            size = segment.num_bytes
    return [
        Part(index, _name(group), tuple(group), sum(segment.num_bytes for segment in group))
        for index, group in enumerate(groups)
    ]


def _name(segments: Sequence[Segment]) -> str:
    return segments[0].name + (f" and {len(segments) - 1} more" if len(segments) > 1 else "")


def _documents(segment: Segment, source: "Source", tally: Tally) -> Iterator[Document]:
    before, file = tally.bytes_read, segment.file
    try:
        if isinstance(file, hub.Shard):
            yield from _of_dataset(file, source, tally)
        elif segment.num_bytes == 0 and _is_empty(file):
            tally.empty_files += 1
        elif segment.docstrings:
            assert isinstance(file, Path)
            for where, document in python_library.docstring_documents([file], tally):
                yield Document(document, where)
        else:
            yield from _of_file(file, segment, source, tally)
    except FileFault as fault:
        Faults(Place(segment.name), tally, source.on_error == "skip").file(fault)
    tally.bytes_read = before + segment.num_bytes


def _is_empty(file: File) -> bool:
    return files.size_of(file) == 0 and not (isinstance(file, RemoteFile) and file.size is None)


def _of_dataset(shard: hub.Shard, source: "Source", tally: Tally) -> Iterator[Document]:
    which = f"[{shard.index + 1} of {shard.count}]" if shard.count > 1 else ""
    place = Place(f"{shard.dataset}:{source.split}{which}")
    faults = Faults(place, tally, source.on_error == "skip")
    return _of_rows(hub.dataset_rows(shard, source.split, source.columns.text, faults), place)


def _of_file(path: File, segment: Segment, source: "Source", tally: Tally) -> Iterator[Document]:
    form, skip = inputs.format_of(path, source), source.on_error == "skip"
    if form == "parquet":
        place = Place(files.shown(path), sign=": row ")
        groups = None if segment.stop is None else range(segment.start, segment.stop)
        faults = Faults(place, tally, skip)
        return _of_rows(tables.parquet_rows(path, source.columns.text, faults, groups=groups), place)
    if form == "warc":
        faults = Faults(Place(files.shown(path), sign=": answer "), tally, skip)
        pages = warc.warc_pages(path, faults)
        return (Document(page, address, is_row=True) for address, page in pages)
    if form == "text" and source.documents != "line":
        return _of_text(path, segment, source, tally)
    return _of_lines(path, segment, source, tally)


def _of_lines(path: File, segment: Segment, source: "Source", tally: Tally) -> Iterator[Document]:
    """The documents of a file in which each row, or each document, is a line of its own (and of csv)."""
    form, column, skip = inputs.format_of(path, source), source.columns.text, source.on_error == "skip"
    start, stream = _lines_from(path, segment, tally)
    mark = skip and cuts.is_cuttable(source.encoding)
    name = files.shown(path)
    chunks = text.decode(stream, source.encoding, name, start=start, mark=mark)
    place = Place(name, path=_countable(path), start=start, bare_first=form == "text")
    faults = Faults(place, tally, skip, mark)
    if form == "jsonl":
        return _of_rows(tables.jsonl_rows(chunks, column, faults), place)
    if form == "tsv":
        header = _header(path, source, tally) if start else None
        return _of_rows(tables.tsv_rows(chunks, column, faults, header=header), place)
    if form == "csv":
        return _of_rows(tables.csv_rows(chunks, column, faults), place)
    return (Document(line, place, number) for number, line in text.line_documents(chunks, faults))


def _lines_from(path: File, segment: Segment, tally: Tally) -> tuple[int, Iterator[bytes]]:
    """Where the segment's first line begins, and the bytes of the lines that begin in it."""
    if segment.is_whole:
        return 0, files.read_chunks(path, tally)
    begin = max(segment.start - 1, 0)
    wanted = [cut for cut in (segment.start, segment.stop) if cut]
    found = cuts.sections(
        files.read_chunks(path, tally, start=begin), begin, wanted, to_end=segment.stop is None
    )
    pieces = (piece for piece in found if piece[0] >= segment.start)
    first = next(pieces, None)
    if first is None:
        return segment.start, iter(())
    return first[0], _chained(first[1], (data for _, data in pieces))


def _chained(first: bytes, others: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from others


def _countable(path: File) -> str | None:
    return str(path) if isinstance(path, Path) else None


def _header(path: File, source: "Source", tally: Tally) -> list[str]:
    name = files.shown(path)
    return tables.first_line(text.decode(files.read_chunks(path, tally), source.encoding, name), name)


def _of_text(path: File, segment: Segment, source: "Source", tally: Tally) -> Iterator[Document]:
    """The documents of running text, read in sections that are cut at fixed places."""
    name, skip = files.shown(path), source.on_error == "skip"
    packed = files.ending(path)[1] != ""
    lines_before = 0
    for start, group in groupby(_sections(path, segment, source, tally), key=itemgetter(0)):
        lines = _Lines()
        stream = lines.counted(data for _, data in group)
        chunks = text.decode(stream, source.encoding, name, start=start)
        before = lines_before if packed else None
        place = Place(name, path=_countable(path), start=start, before=before, bare_first=True)
        try:
            for number, document in text.documents(chunks, source.documents, name):
                yield Document(document, place, number)
        except FileFault as fault:
            Faults(Place(name), tally, skip).file(fault)
            deque(stream, maxlen=0)  # on to the next section
        lines_before += lines.number


class _Lines:
    """Counts the line ends that pass."""

    def __init__(self) -> None:
        self.number = 0

    def counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.number += chunk.count(b"\n")
            yield chunk


def _sections(path: File, segment: Segment, source: "Source", tally: Tally) -> Iterator[tuple[int, bytes]]:
    begin = max(segment.start - 1, 0)
    chunks = files.read_chunks(path, tally, start=begin)
    if source.documents == "file" or not cuts.is_cuttable(source.encoding):
        return ((0, chunk) for chunk in chunks)
    first = segment.start or cuts.SECTION
    wanted: Iterable[int] = (
        count(first, cuts.SECTION) if segment.stop is None else range(first, segment.stop + 1, cuts.SECTION)
    )
    found = cuts.sections(chunks, begin, wanted, window=cuts.WINDOW, to_end=segment.stop is None)
    return (piece for piece in found if piece[0] >= segment.start)


def _of_rows(rows: Iterable[tuple[int, str]], place: Place) -> Iterator[Document]:
    return (Document(row, place, number, is_row=True) for number, row in rows)
