"""Preparation: a corpus cleaned, in parts and by all cores, and its copies taken out; kept, and found again.

Cleaning looks at one document at a time and is done part by part. Finding copies needs all documents: the parts are
signed (keys, MinHash signatures), one process decides which documents stay, and the decision is an array of
booleans beside the parts. Cleaned text and decision have addresses of their own, so that another threshold for
near copies does not clean the text again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmkit.data.clean.cleaner import Cleaner, StepCount, cleaning_identity
from llmkit.data.clean.personal import PersonalDataMarker
from llmkit.data.duplicates.contamination import Decontaminator
from llmkit.data.duplicates.exact import document_keys, keep_first
from llmkit.data.duplicates.lines import frequent_lines, line_keys, strip_lines
from llmkit.data.duplicates.near import Signer, near_copies, near_identity
from llmkit.data.npy import NpyWriter
from llmkit.data.pipeline import Engine, Fill, Progress, Stage, finish
from llmkit.data.places import Tally
from llmkit.data.split import document_hash
from llmkit.data.texts import TEXT, KeptTexts, SourceTexts, StoredTexts, TextWriter, combined
from llmkit.durable import (
    naming_full_disks,
    one_at_a_time,
    read_manifest,
    remove_folder,
    verify_folder,
    write_folder,
)
from llmkit.errors import CorruptError, DataError
from llmkit.recipe.preparation import NearDuplicates, Prepare

if TYPE_CHECKING:
    from llmkit.data.places import Document

_VERSION = 1
EXAMPLES = 20
"""Dropped documents kept as examples for each reason."""

_SHOWN = 300
_BATCH = 256
Keep = npt.NDArray[np.bool_]
Tell = Callable[[str], Progress | None]
"""Given the name of a stage, what to tell its progress to."""


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus.

    Attributes:
        texts: One entry a source.
        report: Documents and bytes read and kept, what each step did (`StepCount`), what was skipped in reading.
        examples: Dropped documents: step, reason, where, the beginning of the text.
    """

    texts: list[KeptTexts]
    report: dict[str, Any]
    examples: list[dict[str, str]]


def prepare_texts(
    sources: Sequence[SourceTexts],
    spec: Prepare,
    *,
    base: Path,
    cache: Path,
    engine: Engine,
    tell: Tell,
    fresh: bool = False,
) -> Prepared:
    """Prepare the texts of all sources together, or find them prepared.

    Args:
        sources: The texts as they are.
        spec: What to do.
        base: The recipe's folder, for the files of `decontaminate`.
        cache: The cache folder; prepared text goes to `text/` in it.
        engine: What does the work.
        tell: Gives each stage its progress.
        fresh: Prepare anew, also what is there.

    Raises:
        DataError: Text cannot be read, or no document is left; the message says which step took them.
        MissingError: A package is missing.
    """
    contaminated = Decontaminator(spec.decontaminate, base) if spec.decontaminate is not None else None
    settings = spec.model_dump(mode="json")
    duplicates = settings.pop("duplicates")
    cleaning = combined(
        _VERSION,
        settings,
        cleaning_identity(spec),
        contaminated.identity if contaminated else None,
        [(texts.name, texts.identity) for texts in sources],
    )
    decision = combined(
        cleaning, duplicates, near_identity() if spec.duplicates and spec.duplicates.near else None
    )
    builder = _Builder(
        sources, spec, contaminated, cache / "text", cleaning[:32], decision[:32], engine, tell
    )
    with naming_full_disks(cache), one_at_a_time(cache / "text" / f".{cleaning[:32]}.lock"):
        if fresh:
            builder.forget()
        return builder.find_or_build()


@dataclass(frozen=True)
class _Builder:
    sources: Sequence[SourceTexts]
    spec: Prepare
    contaminated: Decontaminator | None
    store: Path
    cleaning: str
    decision: str
    engine: Engine
    tell: Tell

    def forget(self) -> None:
        """Remove what is there, finished or not."""
        for address in (self.cleaning, self.decision):
            for place in self.store.glob(f"{address}.*"):
                remove_folder(place)

    def find_or_build(self) -> Prepared:
        decided = self.store / f"{self.decision}.decided"
        found = _whole(decided)
        if found is None:
            self._build(decided)
            found = verify_folder(decided)
        return self._open(decided, found)

    def _open(self, decided: Path, facts: Mapping[str, Any]) -> Prepared:
        folders = [self.store / name for name in facts["parts"]]
        counts = facts["documents"]
        starts = np.cumsum([0, *counts]).tolist()
        texts = []
        first = 0
        for number, source in enumerate(self.sources):
            last = first + len(source.parts)
            identity = combined(self.decision, number)
            one = KeptTexts(
                tuple(folders[first:last]),
                decided / "keep.npy",
                tuple(starts[first:last]),
                source.name,
                identity,
            )
            texts.append(one)
            first = last
        examples = [json.loads(line) for line in (decided / "dropped.jsonl").read_text("utf-8").splitlines()]
        return Prepared(texts, facts["report"], examples)

    def _build(self, decided: Path) -> None:
        parts = self._run(
            "clean", CleanWork(tuple(self.sources), self.spec, self.contaminated), self._sizes()
        )
        manifests = [read_manifest(part) for part in parts]
        self._check(manifests)
        steps = _added([[StepCount.from_json(one) for one in manifest["steps"]] for manifest in manifests])
        examples = _Examples()
        for manifest in manifests:
            examples.include(manifest["examples"])
        duplicates = self.spec.duplicates
        if duplicates is not None and duplicates.lines is not None:
            parts = self._strip(parts, duplicates.lines)
            manifests_of_lines = [read_manifest(part) for part in parts]
            steps += _added([[StepCount.from_json(manifest["step"])] for manifest in manifests_of_lines])
        keep, more = self._decide(parts, examples)
        report = _report(manifests, [*steps, *more], parts, keep)
        if report["kept"]["documents"] == 0:
            raise _nothing_left(report)
        facts: dict[str, object] = {
            "kind": "prepared text",
            "parts": [str(part.relative_to(self.store)) for part in parts],
            "documents": [len(StoredTexts(part)) for part in parts],
            "report": report,
        }
        with write_folder(decided, facts=facts) as folder:
            np.save(folder / "keep.npy", np.concatenate(keep) if keep else np.zeros(0, bool))
            lines = [json.dumps(example, ensure_ascii=False) for example in examples.chosen()]
            (folder / "dropped.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def _check(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        """Every source must have given text."""
        found = iter(manifests)
        for source in self.sources:
            tally = Tally()
            for _ in source.parts:
                tally.add(Tally.from_json(next(found)["skipped"]))
            source.check(tally)

    def _sizes(self) -> list[int]:
        return [size for source in self.sources for size in source.sizes]

    def _run(self, name: str, work: Any, sizes: Sequence[int]) -> list[Path]:
        address = self.cleaning if name == "clean" else self.decision
        stage = Stage(work, self.store / f"{address}.{name}", sizes)
        return finish(stage, self.engine, progress=self.tell(name))

    def _strip(self, parts: Sequence[Path], more_than: int) -> list[Path]:
        sizes = [(part / TEXT).stat().st_size for part in parts]
        counted = self._run("lines", LinesWork(tuple(parts)), sizes)
        frequent = frequent_lines([np.load(part / "lines.npy", mmap_mode="r") for part in counted], more_than)
        stripped = self._run("stripped", StripWork(tuple(parts), tuple(frequent.tolist())), sizes)
        self._forget("lines")
        return stripped

    def _decide(self, parts: Sequence[Path], examples: "_Examples") -> tuple[list[Keep], list[StepCount]]:
        """Which documents stay, and what the steps that compare documents did."""
        duplicates = self.spec.duplicates
        keep = [np.ones(len(StoredTexts(part)), dtype=bool) for part in parts]
        if duplicates is None or not (duplicates.exact or duplicates.near):
            return keep, []
        sizes = [(part / TEXT).stat().st_size for part in parts]
        signed = self._run("signed", SignWork(tuple(parts), duplicates.near), sizes)
        keys = [np.load(part / "keys.npy", mmap_mode="r") for part in signed]
        lengths = [StoredTexts(part).lengths for part in parts]
        steps = []
        if duplicates.exact:
            before, keep = keep, keep_first(keys)
            steps.append(_step("exact", "copy", before, keep, lengths))
            examples.add_dropped("exact", "copy", parts, keys, before, keep)
        if duplicates.near is not None:
            signatures = [np.load(part / "signatures.npy", mmap_mode="r") for part in signed]
            before, keep = keep, near_copies(signatures, lengths, keys, keep, duplicates.near)
            steps.append(_step("near", "near copy", before, keep, lengths))
            examples.add_dropped("near", "near copy", parts, keys, before, keep)
        self._forget("signed")
        return keep, steps

    def _forget(self, name: str) -> None:
        """Remove what only this build needed, once nothing that is still to be made needs it."""
        # A kill before the decision is published makes it again; that costs time, never a result.
        shutil.rmtree(self.store / f"{self.decision}.{name}", ignore_errors=True)


@dataclass(frozen=True)
class CleanWork:
    """Source text to clean text, one document after the other."""

    sources: tuple[SourceTexts, ...]
    spec: Prepare
    contaminated: Decontaminator | None

    def open(self) -> Fill:
        """Load what the cleaner needs."""
        places = [(source, number) for source in self.sources for number in range(len(source.parts))]
        cleaner = Cleaner(self.spec, self.contaminated)
        personal = self.spec.personal_data
        # Documents are dropped before personal data is marked; what is shown of them must not give it away.
        mask = PersonalDataMarker(personal) if personal is not None else None
        return lambda number, folder: self._fill(cleaner, _Examples(mask), *places[number], folder)

    def _fill(
        self, cleaner: Cleaner, examples: "_Examples", source: SourceTexts, number: int, folder: Path
    ) -> Mapping[str, object]:
        tally, writer = Tally(), TextWriter(folder)
        for document in source.documents(number, tally):
            cleaned = cleaner.clean(document.text)
            if cleaned.step is None:
                writer.add(cleaned.text)
            else:
                examples.add(cleaned.step, cleaned.reason or "", document)
        writer.close()
        return {
            "steps": [_taken(step).as_json() for step in cleaner.steps],
            "skipped": tally.as_json(),
            "examples": examples.chosen(),
        }


@dataclass(frozen=True)
class LinesWork:
    """The keys of each document's lines."""

    parts: tuple[Path, ...]

    def open(self) -> Fill:
        """Nothing to load."""
        return self._fill

    def _fill(self, number: int, folder: Path) -> Mapping[str, object]:
        writer = NpyWriter(folder / "lines.npy", np.dtype(np.uint64))
        for text in StoredTexts(self.parts[number]):
            writer.append(line_keys(text))
        writer.close()
        return {}


@dataclass(frozen=True)
class StripWork:
    """Texts without the lines that stand in too many documents."""

    parts: tuple[Path, ...]
    frequent: tuple[int, ...]

    def open(self) -> Fill:
        """Make the lines' keys an array once."""
        frequent = np.array(self.frequent, dtype=np.uint64)
        return lambda number, folder: self._fill(frequent, number, folder)

    def _fill(self, frequent: npt.NDArray[np.uint64], number: int, folder: Path) -> Mapping[str, object]:
        writer, step = TextWriter(folder), StepCount("lines")
        for text in StoredTexts(self.parts[number]):
            stripped, removed = strip_lines(text, frequent)
            step.documents_in += 1
            step.bytes_in += len(text.encode())
            if not stripped or stripped.isspace():
                step.dropped["nothing left"] = step.dropped.get("nothing left", 0) + 1
                continue
            writer.add(stripped)
            step.documents_out += 1
            step.bytes_out += len(stripped.encode())
            step.changed += removed > 0
            step.replaced["line"] = step.replaced.get("line", 0) + removed
        writer.close()
        return {"step": step.as_json()}


@dataclass(frozen=True)
class SignWork:
    """Each document's key and, if near copies are looked for, its signature."""

    parts: tuple[Path, ...]
    near: NearDuplicates | None

    def open(self) -> Fill:
        """Make the signer."""
        signer = Signer(self.near) if self.near is not None else None
        return lambda number, folder: self._fill(signer, number, folder)

    def _fill(self, signer: Signer | None, number: int, folder: Path) -> Mapping[str, object]:
        texts = StoredTexts(self.parts[number])
        keys = np.empty((len(texts), 2), dtype=np.uint64)
        width = self.near.permutations if self.near is not None else 0
        signatures = np.empty((len(texts), width), dtype=np.uint32)
        start = 0
        for batch in _lists(texts, _BATCH):
            stop = start + len(batch)
            keys[start:stop] = document_keys(batch)
            if signer is not None:
                signatures[start:stop] = signer.sign(batch)
            start = stop
        np.save(folder / "keys.npy", keys)
        np.save(folder / "signatures.npy", signatures)
        return {}


@dataclass
class _Examples:
    """For each step and reason the dropped documents with the smallest hashes: the same in any order of work."""

    mask: PersonalDataMarker | None = None
    _kept: dict[tuple[str, str], list[tuple[int, str, str]]] = field(default_factory=dict)

    def add(self, step: str, reason: str, document: "Document") -> None:
        kept = self._kept.setdefault((step, reason), [])
        # Negative, for the heap gives away its smallest entry.
        rank = -document_hash(document.text, "example")
        if len(kept) < EXAMPLES or rank > kept[0][0]:
            text = document.text[: 4 * _SHOWN]
            text = text if self.mask is None else self.mask(text)[0]
            heappush(kept, (rank, document.where, text[:_SHOWN]))
        if len(kept) > EXAMPLES:
            heappop(kept)

    def add_dropped(
        self,
        step: str,
        reason: str,
        parts: Sequence[Path],
        keys: Sequence[npt.NDArray[np.uint64]],
        before: Sequence[Keep],
        after: Sequence[Keep],
    ) -> None:
        """Add the documents with the smallest keys of those that a step over all documents took."""
        found = []
        for number, (was, stays) in enumerate(zip(before, after, strict=True)):
            gone = np.flatnonzero(was & ~stays)
            order = np.argsort(keys[number][gone, 0], kind="stable")[:EXAMPLES]
            found += [(int(keys[number][place, 0]), number, int(place)) for place in gone[order]]
        for rank, number, place in sorted(found)[:EXAMPLES]:
            text = _text_at(parts[number], place)
            self._kept.setdefault((step, reason), []).append((-rank, "", text[:_SHOWN]))

    def include(self, examples: Sequence[Mapping[str, Any]]) -> None:
        for one in examples:
            kept = self._kept.setdefault((one["step"], one["reason"]), [])
            heappush(kept, (-one["rank"], one["where"], one["text"]))
            if len(kept) > EXAMPLES:
                heappop(kept)

    def chosen(self) -> list[dict[str, Any]]:
        """All of them, by step, reason and hash."""
        return [
            {"step": step, "reason": reason, "where": where, "text": text, "rank": -rank}
            for (step, reason), kept in sorted(self._kept.items())
            for rank, where, text in sorted(kept, reverse=True)
        ]


def _lists(texts: StoredTexts, size: int) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _text_at(part: Path, place: int) -> str:
    ends = StoredTexts(part).ends
    start = int(ends[place - 1]) if place else 0
    with (part / TEXT).open("rb") as file:
        file.seek(start)
        return file.read(int(ends[place]) - start).decode()


def _whole(decided: Path) -> dict[str, Any] | None:
    """The decision's manifest, if it and all the text it speaks of are there."""
    try:
        facts = verify_folder(decided)
        for name in facts["parts"]:
            part = decided.parent / name
            for file, entry in read_manifest(part)["files"].items():
                if (part / file).stat().st_size != entry["bytes"]:
                    return None
    except (CorruptError, OSError):
        return None
    return facts


def _taken(step: StepCount) -> StepCount:
    """The step's counts; it begins anew."""
    taken = replace(step)
    vars(step).update(vars(StepCount(step.name)))
    return taken


def _added(lists: Sequence[Sequence[StepCount]]) -> list[StepCount]:
    total = list(lists[0]) if lists else []
    for steps in lists[1:]:
        for one, other in zip(total, steps, strict=True):
            one.add(other)
    return total


def _step(
    name: str,
    reason: str,
    before: Sequence[Keep],
    after: Sequence[Keep],
    lengths: Sequence[npt.NDArray[np.int64]],
) -> StepCount:
    def size(keep: Sequence[Keep]) -> tuple[int, int]:
        sizes = [(int(one.sum()), int(length[one].sum())) for one, length in zip(keep, lengths, strict=True)]
        return sum(documents for documents, _ in sizes), sum(size for _, size in sizes)

    step = StepCount(name)
    step.documents_in, step.bytes_in = size(before)
    step.documents_out, step.bytes_out = size(after)
    step.dropped = {reason: step.documents_in - step.documents_out}
    return step


def _report(
    manifests: Sequence[Mapping[str, Any]],
    steps: Sequence[StepCount],
    parts: Sequence[Path],
    keep: Sequence[Keep],
) -> dict[str, Any]:
    skipped = Tally()
    for manifest in manifests:
        skipped.add(Tally.from_json(manifest["skipped"]))
    kept_bytes = sum(int(StoredTexts(part).lengths[one].sum()) for part, one in zip(parts, keep, strict=True))
    return {
        "read": {"documents": steps[0].documents_in, "bytes": steps[0].bytes_in} if steps else None,
        "kept": {"documents": sum(int(one.sum()) for one in keep), "bytes": kept_bytes},
        "steps": [step.as_json() for step in steps],
        "skipped": skipped.shown(),
    }


def _nothing_left(report: Mapping[str, Any]) -> DataError:
    taken = Counter[str]()
    for step in report["steps"]:
        for reason, count in step["dropped"].items():
            taken[f"{step['name']} ({reason})"] += count
    listed = ", ".join(f"{what} took {count:,}" for what, count in taken.most_common(5) if count)
    read = report["read"]["documents"] if report["read"] else 0
    return DataError(
        f"preparation left none of the {read:,} documents: {listed or 'nothing was read'}",
        hint="loosen that step in `tokenize.prepare`",
    )
