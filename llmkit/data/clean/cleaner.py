"""The cleaning steps of one document in their order, and what they did, counted."""

import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Self

from llmkit.data.clean.filters import DocumentFilter
from llmkit.data.clean.language import model_file
from llmkit.data.clean.normalise import Normaliser
from llmkit.data.clean.personal import PersonalDataMarker
from llmkit.data.text import utf8_size
from llmkit.recipe.preparation import Prepare

RULES_VERSION: Final = 1
"""Goes up with every change of what a cleaning step gives for some text."""

BLANK: Final = "blank"
"""Why a document of nothing but blanks is dropped."""

Contaminated = Callable[[str], str | None]


@dataclass
class StepCount:
    """What one step did to the documents it was given."""

    name: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    """UTF-8 bytes of the documents given."""
    bytes_out: int = 0
    """UTF-8 bytes of the documents that went on."""
    changed: int = 0
    """Documents that went on with another text."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents dropped, by reason."""
    replaced: dict[str, int] = field(default_factory=dict)
    """Places replaced by marks, by kind."""

    def count(self, before: str, after: str, reason: str | None = None) -> None:
        """Count one document; with a reason, it was dropped."""
        size = utf8_size(before)
        self.documents_in += 1
        self.bytes_in += size
        if reason is not None:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            return
        self.documents_out += 1
        self.bytes_out += size if after is before else utf8_size(after)
        self.changed += after is not before and after != before

    def add(self, other: "StepCount") -> None:
        """Add what the same step did elsewhere; the sum does not depend on the order."""
        assert self.name == other.name
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped = _sum(self.dropped, other.dropped)
        self.replaced = _sum(self.replaced, other.replaced)

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values; reasons and kinds in the order of the alphabet."""
        values = asdict(self)
        return values | {name: dict(sorted(values[name].items())) for name in ("dropped", "replaced")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The counts that `as_json` gave."""
        return cls(**values)


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(one) + Counter(other)).items()))


@dataclass(frozen=True)
class Cleaned:
    """A document after cleaning.

    Attributes:
        text: Its text; of a dropped document, as the step got it that dropped it.
        step: The step that dropped it, None when it stays.
        reason: Why.
    """

    text: str
    step: str | None = None
    reason: str | None = None


class Cleaner:
    """Does to a document what the recipe asks for, and counts.

    Args:
        spec: The recipe's `tokenize.prepare`.
        contaminated: Says which evaluation file a text shares a piece with; None without such files.

    Attributes:
        steps: What each step did so far, in their order: normalise, filter, personal_data, decontaminate; only the
            steps that the recipe asks for.

    Raises:
        MissingError: A package that a step needs is not installed.
        RecipeError: A language or a detector does not exist.
    """

    def __init__(self, spec: Prepare, contaminated: Contaminated | None = None) -> None:
        self.steps: list[StepCount] = []
        self._work: list[tuple[StepCount, Callable[[str, StepCount], tuple[str, str | None]]]] = []
        if spec.normalise is not None:
            self._add("normalise", _normalising(Normaliser(spec.normalise)))
        if spec.filter is not None:
            reason = DocumentFilter(spec.filter).reason
            self._add("filter", lambda text, _: (text, reason(text)))
        if spec.personal_data is not None:
            self._add("personal_data", _marking(PersonalDataMarker(spec.personal_data)))
        if contaminated is not None:
            self._add("decontaminate", lambda text, _: (text, contaminated(text)))

    def _add(self, name: str, work: Callable[[str, StepCount], tuple[str, str | None]]) -> None:
        self.steps.append(StepCount(name))
        self._work.append((self.steps[-1], work))

    def clean(self, text: str) -> Cleaned:
        """One document through all steps, until one drops it.

        Raises:
            DataError: The recipe's detector gave something wrong.
        """
        for step, work in self._work:
            after, reason = work(text, step)
            step.count(text, after, reason)
            if reason is not None:
                return Cleaned(text, step.name, reason)
            text = after
        return Cleaned(text)


def _normalising(normalise: Normaliser) -> Callable[[str, StepCount], tuple[str, str | None]]:
    def work(text: str, _: StepCount) -> tuple[str, str | None]:
        after = normalise(text)
        return after, BLANK if not after or after.isspace() else None

    return work


def _marking(mark: PersonalDataMarker) -> Callable[[str, StepCount], tuple[str, str | None]]:
    def work(text: str, step: StepCount) -> tuple[str, str | None]:
        after, replaced = mark(text)
        if replaced:
            step.replaced = _sum(step.replaced, replaced)
        return after, None

    return work


def cleaning_identity(spec: Prepare) -> dict[str, Any]:
    """All that decides what cleaning gives, besides the text and the recipe's settings.

    That is the version of our own rules, the versions of the packages that the settings use, the tables of Unicode
    in this Python, the language model's bytes and a detector's source. The evaluation files are not part of it.

    Raises:
        MissingError: A package that a step needs is not installed.
        RecipeError: A detector does not exist.
    """
    identity = dict[str, Any]()
    normalise, chosen, personal = spec.normalise, spec.filter, spec.personal_data
    if normalise is None and chosen is None and personal is None:
        return identity
    # Character classes (letters, digits, blanks) are Unicode's, so its version decides in every step.
    identity |= {"rules": RULES_VERSION, "unicode": unicodedata.unidata_version}
    if normalise is not None:
        Normaliser(normalise)
        identity |= {"ftfy": _version("ftfy")} if normalise.fix else {}
        identity |= {"resiliparse": _version("resiliparse")} if normalise.html else {}
    if chosen is not None and chosen.languages:
        identity["language_model"] = _sha256(model_file())
    if personal is not None and personal.detector is not None:
        PersonalDataMarker(personal)
        identity["detector"] = _source_hash(personal.detector)
    return identity


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # put on the path without its metadata
        return str(getattr(import_module(package), "__version__", "unknown"))


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _source_hash(detector: str) -> str:
    """Of the module that holds the detector: its file's bytes. What it imports in turn is its author's matter."""
    module = sys.modules[detector.partition(":")[0]]
    file = getattr(module, "__file__", None)
    return _sha256(Path(file)) if file else module.__name__
