"""Preparation: a corpus cleaned, in parts and by all cores, and its copies taken out; kept, and found again.

Cleaning looks at one document at a time and is done part by part. Finding copies needs all documents: the parts are
signed (keys, MinHash signatures), one process decides which documents stay, and the decision is an array of
booleans beside the parts. Cleaned text and decision have addresses of their own, so that another threshold for
near copies does not clean the text again.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmkit.data.clean.cleaner import StepCount, cleaning_identity
from llmkit.data.duplicates.contamination import Decontaminator
from llmkit.data.duplicates.exact import keep_first, part_edges
from llmkit.data.duplicates.lines import frequent_lines
from llmkit.data.duplicates.near import kept_of, near_groups, near_identity
from llmkit.data.examples import EXAMPLES, Examples, Gone
from llmkit.data.pipeline import Engine, Progress, Stage, finish
from llmkit.data.places import Tally, count_before
from llmkit.data.texts import TEXT, KeptTexts, SourceTexts, StoredTexts, combined
from llmkit.data.works import CUT, CleanWork, LinesWork, SignWork, StripWork
from llmkit.durable import (
    discard,
    naming_full_disks,
    one_at_a_time,
    read_manifest,
    remove_folder,
    verify_folder,
    write_folder,
)
from llmkit.errors import CorruptError, DataError
from llmkit.recipe.preparation import Prepare

if TYPE_CHECKING:
    pass

_VERSION = 2

_WORTH = {"clean": 1_000_000, "lines": 20_000_000, "stripped": 20_000_000, "signed": 8_000_000}
_SCANNED = 2**20
Keep = npt.NDArray[np.bool_]
Tell = Callable[[str], Progress | None]
"""Given the name of a stage, what to tell its progress to."""


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus.

    Attributes:
        texts: One entry a source.
        report: Documents and bytes read and kept, what each step did (`StepCount`), what was skipped in reading.
        examples: Dropped documents: step, reason, where, the beginning of the text; of copies and near copies
            also `kept`, the beginning of the document that stays.
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
    content = combined(
        _VERSION,
        settings,
        cleaning_identity(spec),
        contaminated.identity if contaminated else None,
        [texts.identity for texts in sources],
    )
    identity = combined(
        content, duplicates, near_identity() if spec.duplicates and spec.duplicates.near else None
    )
    # Parts cut in another way are other parts; together they are the same text.
    cuts = [texts.cut for texts in sources]
    cleaning, decision = combined(content, cuts)[:32], combined(identity, cuts)[:32]
    builder = _Builder(
        sources, spec, contaminated, cache / "text", identity, cleaning, decision, engine, tell
    )
    with naming_full_disks(cache), one_at_a_time(cache / "text" / f".{cleaning}.lock"):
        if fresh:
            builder.forget()
        return builder.find_or_build()


@dataclass(frozen=True)
class _Builder:
    sources: Sequence[SourceTexts]
    spec: Prepare
    contaminated: Decontaminator | None
    store: Path
    identity: str
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
            identity = combined(self.identity, number)
            one = KeptTexts(
                tuple(folders[first:last]),
                decided / "keep.npy",
                tuple(starts[first:last]),
                source.name,
                identity,
            )
            texts.append(one)
            first = last
        examples = json.loads((decided / "dropped.json").read_bytes())
        return Prepared(texts, facts["report"], examples)

    def _build(self, decided: Path) -> None:
        parts = self._run(
            "clean", CleanWork(tuple(self.sources), self.spec, self.contaminated), self._sizes()
        )
        found = self._added(parts)
        duplicates = self.spec.duplicates
        if duplicates is not None and duplicates.lines is not None:
            parts = self._strip(parts, duplicates.lines)
            lines = _Found()
            for part in parts:
                manifest = read_manifest(part)
                lines.include([manifest["step"]], ())
                found.examples.include(manifest["examples"])
            found.steps += lines.steps
        keep, more = self._decide(parts, found.examples)
        found.steps += more
        report, examples = found.report(parts, keep), found.examples.shown()
        if report["kept"]["documents"] == 0:
            raise _nothing_left(report, examples)
        facts: dict[str, object] = {
            "kind": "prepared text",
            "parts": [str(part.relative_to(self.store)) for part in parts],
            "documents": [len(StoredTexts(part)) for part in parts],
            "report": report,
        }
        with write_folder(decided, facts=facts) as folder:
            np.save(folder / "keep.npy", np.concatenate(keep) if keep else np.zeros(0, bool))
            (folder / "dropped.json").write_text(json.dumps(examples, ensure_ascii=False), "utf-8")

    def _added(self, parts: Sequence[Path]) -> "_Found":
        """What cleaning found in all parts, one manifest at a time; every source must have given text."""
        found, folders = _Found(), iter(parts)
        for source in self.sources:
            tally = Tally()
            for _ in source.parts:
                manifest = read_manifest(next(folders))
                found.include(manifest["steps"], manifest["examples"])
                tally.add(Tally.from_json(manifest["skipped"]))
            source.check(tally)
            found.skipped.add(tally)
        return found

    def _sizes(self) -> list[int]:
        return [size for source in self.sources for size in source.sizes]

    def _run(self, name: str, work: Any, sizes: Sequence[int]) -> list[Path]:
        address = self.cleaning if name == "clean" else self.decision
        stage = Stage(work, self.store / f"{address}.{name}", sizes, _WORTH[name])
        return finish(stage, self.engine, progress=self.tell(name))

    def _strip(self, parts: Sequence[Path], more_than: int) -> list[Path]:
        sizes = [(part / TEXT).stat().st_size for part in parts]
        counted = self._run("lines", LinesWork(tuple(parts)), sizes)
        frequent = frequent_lines([np.load(part / "lines.npy", mmap_mode="r") for part in counted], more_than)
        stored = self.store / f"{self.decision}.frequent"
        with write_folder(stored) as folder:
            np.save(folder / "frequent.npy", frequent)
        stripped = self._run("stripped", StripWork(tuple(parts), stored / "frequent.npy"), sizes)
        self._forget("lines")
        self._forget("frequent")
        return stripped

    def _decide(self, parts: Sequence[Path], examples: "Examples") -> tuple[list[Keep], list[StepCount]]:
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
            gone = _smallest(keys, before, keep)
            examples.add_copies("exact", "copy", parts, gone, _first_equal(keys, gone))
        if duplicates.near is not None:
            signatures = [np.load(part / "signatures.npy", mmap_mode="r") for part in signed]
            leaders = near_groups(signatures, lengths, keys, keep, duplicates.near)
            edges = part_edges(keys)
            before, keep = keep, kept_of(leaders, edges)
            steps.append(_step("near", "near copy", before, keep, lengths))
            gone = _smallest(keys, before, keep)
            stay = {key: _in_part(int(leaders[edges[part] + place]), edges) for key, part, place in gone}
            examples.add_copies("near", "near copy", parts, gone, stay)
        self._forget("signed")
        return keep, steps

    def _forget(self, name: str) -> None:
        """Remove what only this build needed, once nothing that is still to be made needs it."""
        # A kill before the decision is published makes it again; that costs time, never a result.
        discard(self.store / f"{self.decision}.{name}")


@dataclass
class _Found:
    """What the parts' manifests say, added up."""

    steps: list[StepCount] = field(default_factory=list)
    examples: Examples = field(default_factory=Examples)
    skipped: Tally = field(default_factory=Tally)

    def include(self, steps: Sequence[dict[str, Any]], examples: Sequence[Mapping[str, Any]]) -> None:
        """Add one part's."""
        counts = [StepCount.from_json(step) for step in steps]
        for one, other in zip(self.steps, counts, strict=True) if self.steps else ():
            one.add(other)
        self.steps = self.steps or counts
        self.examples.include(examples)

    def report(self, parts: Sequence[Path], keep: Sequence[Keep]) -> dict[str, Any]:
        """What `Prepared.report` is."""
        # For both kinds of examples together: then each file is read once for their lines' numbers.
        count_before([*self.examples.places(), *(example.place for example in self.skipped.examples)])
        sizes = (int(StoredTexts(part).lengths[one].sum()) for part, one in zip(parts, keep, strict=True))
        first = self.steps[0] if self.steps else None
        return {
            "read": {"documents": first.documents_in, "bytes": first.bytes_in} if first else None,
            "kept": {"documents": sum(int(one.sum()) for one in keep), "bytes": sum(sizes)},
            "steps": [step.as_json() for step in self.steps if step.name != CUT or _did_cut(step)],
            "skipped": self.skipped.shown(),
        }


def _did_cut(step: StepCount) -> bool:
    return (step.documents_in, step.bytes_in) != (step.documents_out, step.bytes_out)


def _smallest(
    keys: Sequence[npt.NDArray[np.uint64]], before: Sequence[Keep], after: Sequence[Keep]
) -> list[Gone]:
    """The documents with the smallest keys of those that a step over all documents took; no key twice."""
    found: dict[int, Gone] = {}
    for part, (was, stays) in enumerate(zip(before, after, strict=True)):
        gone = np.flatnonzero(was & ~stays)
        firsts, at = np.unique(keys[part][gone, 0], return_index=True)
        for key, place in zip(firsts[:EXAMPLES].tolist(), gone[at[:EXAMPLES]].tolist(), strict=True):
            found.setdefault(key, (key, part, place))
        found = {key: found[key] for key in sorted(found)[:EXAMPLES]}
    return [*found.values()]


def _first_equal(keys: Sequence[npt.NDArray[np.uint64]], gone: Sequence[Gone]) -> dict[int, tuple[int, int]]:
    """For each dropped copy the part and place of the first document with its key."""
    wanted = np.array([key for key, _, _ in gone], np.uint64)
    whole = {key: keys[part][place].tolist() for key, part, place in gone}
    found: dict[int, tuple[int, int]] = {}
    for number, part in enumerate(keys):
        for start in range(0, len(part), _SCANNED):
            block = part[start : start + _SCANNED]
            for place in np.flatnonzero(np.isin(block[:, 0], wanted)).tolist():
                pair = block[place].tolist()
                if pair == whole[pair[0]]:
                    found.setdefault(pair[0], (number, start + place))
    return found


def _in_part(place: int, edges: Sequence[int]) -> tuple[int, int]:
    """A place in the whole corpus as a part and a place in it."""
    part = bisect_right(edges, place) - 1
    return part, place - edges[part]


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


class NothingLeftError(DataError):
    """Preparation left no document.

    Attributes:
        report: What each step did, see `Prepared`.
        examples: Documents that were dropped.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.report: dict[str, Any] = {}
        self.examples: list[dict[str, str]] = []


def _nothing_left(report: dict[str, Any], examples: list[dict[str, str]]) -> NothingLeftError:
    taken = Counter[str]()
    for step in report["steps"]:
        for reason, count in step["dropped"].items():
            taken[f"{step['name']} ({reason})"] += count
    listed = ", ".join(f"{what} took {count:,}" for what, count in taken.most_common(5) if count)
    read = report["read"]["documents"] if report["read"] else 0
    error = NothingLeftError(
        f"preparation left none of the {read:,} documents: {listed or 'nothing was read'}",
        hint="loosen that step in `tokenize.prepare`; examples are in dropped.jsonl",
    )
    error.report, error.examples = report, examples
    return error
