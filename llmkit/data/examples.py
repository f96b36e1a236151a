"""Examples of what preparation dropped, chosen by hash: the same in any order of work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data.clean.personal import PersonalDataMarker
from llmkit.data.places import Place
from llmkit.data.split import document_hash
from llmkit.data.texts import TEXT, StoredTexts

if TYPE_CHECKING:
    from llmkit.data.places import Document

EXAMPLES = 20
"""Dropped documents kept as examples for each reason."""

_SHOWN = 300
_KEPT_SHOWN = 100

Gone = tuple[int, int, int]
"""The first half of a dropped document's key, its part, and its place there."""


@dataclass
class Example:
    """A dropped document to show.

    Attributes:
        text: Its beginning.
        place: Where it comes from, or where it is.
        number: Its number there.
        kept: The beginning of the document that stays for it.
    """

    text: str
    place: Place | str = ""
    number: int | None = None
    kept: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON, the place not yet worked out: that may mean to count the lines of a file."""
        place = self.place if isinstance(self.place, str) else self.place.as_json()
        return {**vars(self), "place": place}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Example":
        """What `as_json` gave."""
        place = stored["place"]
        return cls(**{**stored, "place": place if isinstance(place, str) else Place(**place)})

    def shown(self) -> dict[str, str]:
        """For people."""
        where = self.place if isinstance(self.place, str) else self.place.show(self.number)
        return {"where": where, "text": self.text} | ({} if self.kept is None else {"kept": self.kept})


@dataclass
class Examples:
    """For each step and reason the dropped documents with the smallest hashes: the same in any order of work."""

    mask: PersonalDataMarker | None = None
    _kept: dict[tuple[str, str], dict[int, Example]] = field(default_factory=dict)

    def add(self, step: str, reason: str, document: "Document") -> None:
        """Add a document that a step dropped, if it is among the smallest."""
        self.add_text(step, reason, document.text, document.place, document.number)

    def add_text(
        self, step: str, reason: str, text: str, place: Place | str = "", number: int | None = None
    ) -> None:
        """Add a text, masked as the recipe says, if it is among the smallest."""
        rank = document_hash(text, "example")
        if self._has_room(step, reason, rank):
            shown = text[: 4 * _SHOWN]
            shown = shown if self.mask is None else self.mask(shown)[0]
            self._keep(step, reason, rank, Example(shown[:_SHOWN], place, number))

    def add_copies(
        self,
        step: str,
        reason: str,
        parts: Sequence[Path],
        gone: Sequence["Gone"],
        stay: Mapping[int, tuple[int, int]],
    ) -> None:
        """Add copies that were dropped; `stay` has for each key the part and place of the document that stays."""
        for key, part, place in gone:
            other, there = stay[key]
            text, kept = _text(parts[part], place), _text(parts[other], there)
            self._keep(step, reason, key, Example(text[:_SHOWN], kept=kept[:_KEPT_SHOWN]))

    def include(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Add those that `chosen` gave elsewhere."""
        for one in examples:
            if self._has_room(one["step"], one["reason"], one["rank"]):
                self._keep(one["step"], one["reason"], one["rank"], Example.from_json(one["example"]))

    def shown(self) -> list[dict[str, str]]:
        """All of them for people, by step, reason and hash."""
        return [
            {"step": step, "reason": reason, **example.shown()} for step, reason, _, example in self._all()
        ]

    def chosen(self) -> list[dict[str, Any]]:
        """All of them for `include`."""
        return [
            {"step": step, "reason": reason, "rank": rank, "example": example.as_json()}
            for step, reason, rank, example in self._all()
        ]

    def places(self) -> list[Place]:
        """All places that may have to be worked out."""
        return [example.place for *_, example in self._all() if isinstance(example.place, Place)]

    def _all(self) -> Iterator[tuple[str, str, int, Example]]:
        for (step, reason), kept in sorted(self._kept.items(), key=itemgetter(0)):
            for rank in sorted(kept):
                yield step, reason, rank, kept[rank]

    def _has_room(self, step: str, reason: str, rank: int) -> bool:
        kept = self._kept.get((step, reason), {})
        return rank not in kept and (len(kept) < EXAMPLES or rank < max(kept))

    def _keep(self, step: str, reason: str, rank: int, example: Example) -> None:
        kept = self._kept.setdefault((step, reason), {})
        kept[rank] = example
        if len(kept) > EXAMPLES:
            del kept[max(kept)]


def _text(part: Path, place: int) -> str:
    ends = StoredTexts(part).ends
    start = int(ends[place - 1]) if place else 0
    with (part / TEXT).open("rb") as file:
        file.seek(start)
        return file.read(int(ends[place]) - start).decode()
