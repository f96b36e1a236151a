"""Entities that tags spell, and how many of them were found: the figures of seqeval, and of conlleval before it.

Two readings of tags. The **lenient** one (seqeval's default) takes IOB1, BIO and BIOES alike: an entity begins at B or
S, and at an I or E that follows no tag of its own type; what a tagger leaves half-said still counts. The **strict** one
takes the tags at their word: `bio` wants a B first, `bioes` a B ... E or an S, and anything else is no entity.

Shape suffixes: S sentences, Y types of entities, 3 counts.

**Source**: Tjong Kim Sang and Buchholz, "Introduction to the CoNLL-2000 Shared Task", 2000 (conlleval); Ramshaw and
Marcus, "Text Chunking using Transformation-Based Learning", 1995 (IOB).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from llmkit.errors import DataError
from llmkit.metrics.classification import Counts, averages, class_table
from llmkit.metrics.inputs import Integers, check_rows

Scheme = Literal["lenient", "bio", "bioes"]

_PREFIXES = {"bio": "BIO", "bioes": "BIOES"}
_NO_TYPE = "_"
"""The type of a tag that says none: a bare `B`."""


class Span(NamedTuple):
    """An entity in a sentence.

    Attributes:
        type: Its type.
        start: Its first token, from 0.
        end: The token after its last.
    """

    type: str
    start: int
    end: int


def spans_of(tags: Sequence[str], scheme: Scheme = "lenient") -> list[Span]:
    """The entities of one sentence, in order.

    Args:
        tags: Such as `B-PER`, `I-PER`, `O`, one a token.
        scheme: How to read them.

    Raises:
        DataError: A strict scheme has no such tag.
    """
    return _lenient(tags) if scheme == "lenient" else _strict(tags, scheme)


def _lenient(tags: Sequence[str]) -> list[Span]:
    spans, start = [], 0
    before, type_before = "O", ""
    for place, tag in enumerate((*tags, "O")):
        prefix, type_ = tag[0], tag[1:].split("-", 1)[-1] or _NO_TYPE
        if _ends(before, prefix, type_before == type_):
            spans.append(Span(type_before, start, place))
        if _begins(before, prefix, type_before == type_):
            start = place
        before, type_before = prefix, type_
    return spans


def _ends(before: str, prefix: str, same_type: bool) -> bool:
    """Whether an entity ends between two tags."""
    if before in "O.":  # the dot is an old sign for "no entity"
        return False
    return before in "ES" or not same_type or (before in "BI" and prefix in "BSO")


def _begins(before: str, prefix: str, same_type: bool) -> bool:
    """Whether an entity begins at a tag."""
    if prefix in "BS":
        return True
    if prefix in "O.":
        return False
    return not same_type or (prefix in "IE" and before in "OES")


def _strict(tags: Sequence[str], scheme: Literal["bio", "bioes"]) -> list[Span]:
    spans, place = [], 0
    while place < len(tags):
        start = place
        prefix, type_ = _parsed(tags[start], scheme)
        place += 1
        if prefix == "S":
            spans.append(Span(type_, start, place))
        elif prefix == "B":
            place, whole = _inside(tags, place, type_, scheme)
            if whole:
                spans.append(Span(type_, start, place))
    return spans


def _inside(tags: Sequence[str], place: int, type_: str, scheme: Literal["bio", "bioes"]) -> tuple[int, bool]:
    """Where an entity that began before `place` ends, and whether it ends as the scheme says."""
    while place < len(tags):
        prefix, other = _parsed(tags[place], scheme)
        if prefix == "E" and other == type_:
            return place + 1, True
        if prefix != "I" or other != type_:
            break
        place += 1
    return place, scheme == "bio"


def _parsed(tag: str, scheme: Literal["bio", "bioes"]) -> tuple[str, str]:
    prefix = tag[:1]
    if not prefix or prefix not in _PREFIXES[scheme]:
        raise DataError(
            f"the tag {tag!r} is not one of {scheme.upper()}, whose tags begin with {', '.join(_PREFIXES[scheme])}",
            hint="measure leniently, which reads IOB1, BIO and BIOES alike, or correct the tags",
        )
    return prefix, tag[1:].strip("-") or _NO_TYPE


def entity_counts(
    targets: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: Scheme = "lenient"
) -> tuple[list[str], Counts]:
    """The types that occur, sorted, and the counts of each: an entity is found when type, start and end are right.

    Args:
        targets: The true tags of each sentence.
        predicted: The predicted ones, as many.
        scheme: How to read them.

    Raises:
        DataError: There are no sentences, or a strict scheme has no such tag.
        ValueError: A sentence has more or fewer tags than it should.
    """
    counted = EntityRows.of(targets, predicted, scheme)
    return list(counted.types), counted.counts(np.arange(len(counted.tags_S)))


@dataclass(frozen=True)
class EntityRows:
    """What each sentence contributes to the figures of entities, counted once, so that those of any are quick.

    Attributes:
        types: Those that occur, sorted.
        parts_3SY: Entities found and true, found, and true, of each sentence and type.
        right_S: Right tags of each sentence.
        tags_S: Its tags.
    """

    types: tuple[str, ...]
    parts_3SY: Integers
    right_S: Integers
    tags_S: Integers

    @classmethod
    def of(
        cls, targets: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: Scheme = "lenient"
    ) -> "EntityRows":
        """See `entity_metrics`.

        Raises:
            DataError: There are no sentences, or a strict scheme has no such tag.
            ValueError: A sentence has more or fewer tags than it should.
        """
        check_rows(targets, predicted)
        rows = []
        for number, (wanted, said) in enumerate(zip(targets, predicted, strict=True), 1):
            if len(wanted) != len(said):
                raise ValueError(f"sentence {number} has {len(wanted)} tags, but {len(said)} were predicted")
            true, found = set(spans_of(wanted, scheme)), set(spans_of(said, scheme))
            rows.append([Counter(span.type for span in spans) for spans in (true & found, found, true)])
        types = sorted({type_ for row in rows for some in row for type_ in some})
        parts = [[[row[part][type_] for type_ in types] for row in rows] for part in range(3)]
        right = [
            sum(one == other for one, other in zip(wanted, said, strict=True))
            for wanted, said in zip(targets, predicted, strict=True)
        ]
        return cls(
            tuple(types),
            np.array(parts, dtype=np.int64).reshape(3, len(rows), len(types)),
            np.array(right, dtype=np.int64),
            np.array([len(wanted) for wanted in targets], dtype=np.int64),
        )

    def counts(self, items: Integers) -> Counts:
        """Those of each type over some sentences."""
        times_S = np.bincount(items, minlength=len(self.tags_S))
        return Counts(*(times_S @ part_SY for part_SY in self.parts_3SY))

    def figures(self, items: Integers) -> dict[str, float]:
        """As `entity_metrics`, of some sentences, one of them several times if it is named so."""
        counts = self.counts(items)
        figures = averages(counts.of((counts.found > 0) | (counts.true > 0)))
        tags = int(self.tags_S[items].sum())
        return {
            **{name: figures.pop(f"micro_{name}") for name in ("precision", "recall", "f1")},
            **figures,
            "accuracy": int(self.right_S[items].sum()) / tags if tags else 0.0,
        }


def entity_metrics(
    targets: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: Scheme = "lenient"
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, and the accuracy of single tags.

    Args:
        targets: The true tags of each sentence.
        predicted: The predicted ones, as many.
        scheme: How to read them.

    Returns:
        `precision`, `recall`, `f1` over all entities (micro), `macro_*` (the mean over types that occur), `weighted_*`
        (by true entities), and `accuracy`, the share of tokens with the right tag. Without any entity, true or
        predicted, all but the accuracy are 0.

    Raises:
        DataError: There are no sentences, or a strict scheme has no such tag.
        ValueError: A sentence has more or fewer tags than it should.
    """
    counted = EntityRows.of(targets, predicted, scheme)
    return counted.figures(np.arange(len(counted.tags_S)))


def entity_table(
    targets: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: Scheme = "lenient"
) -> list[dict[str, Any]]:
    """One entry a type: `label`, `precision`, `recall`, `f1`, `support` (true entities), `predicted` (entities).

    Args:
        targets: The true tags of each sentence.
        predicted: The predicted ones, as many.
        scheme: How to read them.

    Raises:
        DataError: There are no sentences, or a strict scheme has no such tag.
    """
    types, counts = entity_counts(targets, predicted, scheme)
    return class_table(counts, types)
