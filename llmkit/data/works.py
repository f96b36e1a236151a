"""What preparation does to the parts of a corpus, one after the other: clean, count lines, take lines out, sign."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmkit.data.clean.cleaner import Cleaner, StepCount
from llmkit.data.clean.personal import PersonalDataMarker
from llmkit.data.duplicates.contamination import Decontaminator
from llmkit.data.duplicates.exact import document_keys
from llmkit.data.duplicates.lines import line_keys, strip_lines
from llmkit.data.duplicates.near import Signer
from llmkit.data.examples import Examples
from llmkit.data.npy import NpyWriter
from llmkit.data.parts import cut_row
from llmkit.data.pipeline import Fill
from llmkit.data.places import Tally
from llmkit.data.text import utf8_size
from llmkit.data.texts import SourceTexts, StoredTexts, TextWriter
from llmkit.recipe.preparation import NearDuplicates, Prepare

CUT = "cut"
"""The step in which rows over 1 Mi characters become pieces; shown only where it did."""

_BATCH = 256
_BATCH_CHARACTERS = 2**22


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
        return lambda number, folder: self._fill(cleaner, Examples(mask), *places[number], folder)

    def _fill(
        self, cleaner: Cleaner, examples: "Examples", source: SourceTexts, number: int, folder: Path
    ) -> Mapping[str, object]:
        tally, writer, cut = Tally(), TextWriter(folder), StepCount(CUT)
        for document in source.documents(number, tally, whole_rows=True):
            cleaned = cleaner.clean(document.text)
            if cleaned.step is not None:
                examples.add(cleaned.step, cleaned.reason or "", document)
                continue
            for piece in cut_row(cleaned.text) if document.is_row else (cleaned.text,):
                if piece and not piece.isspace():
                    writer.add(piece)
                    cut.documents_out += 1
                    cut.bytes_out += utf8_size(piece)
            cut.documents_in += 1
            cut.bytes_in += utf8_size(cleaned.text)
        writer.close()
        return {
            "steps": [*(_taken(step).as_json() for step in cleaner.steps), cut.as_json()],
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
    frequent: Path

    def open(self) -> Fill:
        """Open the lines' keys, which all processes share."""
        frequent = np.load(self.frequent, mmap_mode="r")
        return lambda number, folder: self._fill(frequent, number, folder)

    def _fill(self, frequent: npt.NDArray[np.uint64], number: int, folder: Path) -> Mapping[str, object]:
        writer, step, examples = TextWriter(folder), StepCount("lines"), Examples()
        for text in StoredTexts(self.parts[number]):
            stripped, removed = strip_lines(text, frequent)
            step.documents_in += 1
            step.bytes_in += len(text.encode())
            for line in _removed_lines(text, stripped) if removed else ():
                examples.add_text("lines", "in too many documents", line)
            if not stripped or stripped.isspace():
                step.dropped["nothing left"] = step.dropped.get("nothing left", 0) + 1
                continue
            writer.add(stripped)
            step.documents_out += 1
            step.bytes_out += len(stripped.encode())
            step.changed += removed > 0
            step.replaced["line"] = step.replaced.get("line", 0) + removed
        writer.close()
        return {"step": step.as_json(), "examples": examples.chosen()}


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
        keys = NpyWriter(folder / "keys.npy", np.dtype(np.uint64), width=2)
        signatures = None
        if self.near is not None:
            width = self.near.permutations
            signatures = NpyWriter(folder / "signatures.npy", np.dtype(np.uint32), width=width)
        for batch in _batches(StoredTexts(self.parts[number])):
            keys.append(document_keys(batch))
            if signer is not None and signatures is not None:
                signatures.append(signer.sign(batch))
        keys.close()
        if signatures is not None:
            signatures.close()
        return {}


def _removed_lines(text: str, stripped: str) -> list[str]:
    """Lines that were in the text and are not any more."""
    left = {*stripped.split("\n")}
    return [line for line in text.split("\n") if line.strip() and line not in left]


def _batches(texts: StoredTexts) -> Iterator[list[str]]:
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _taken(step: StepCount) -> StepCount:
    """The step's counts; it begins anew."""
    taken = replace(step)
    vars(step).update(vars(StepCount(step.name)))
    return taken
