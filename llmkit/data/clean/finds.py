"""What a search for personal data gives: places in a text and what stands there."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

ORDER: Final = ("secret", "iban", "card", "id", "mail", "ip", "phone")
"""Which kind is named where two finds of one length overlap; the kinds of a detector come after these."""


class Find(NamedTuple):
    """Characters `start` to `stop` of a text are personal data of a kind."""

    start: int
    stop: int
    kind: str


def resolve(finds: Iterable[Find]) -> list[Find]:
    """Finds that do not overlap, in the order of the text.

    Finds that overlap become one that covers them all, so that no piece of any is left; it has the kind of the
    longest of them, and among equally long ones of the first in `ORDER`. The order of `finds` does not matter.
    """
    groups = list[list[Find]]()
    stop = -1
    for find in sorted(set(finds)):
        if find.start < stop:
            groups[-1].append(find)
        else:
            groups.append([find])
        stop = max(stop, find.stop)
    return [_one(group) for group in groups]


def _one(group: Sequence[Find]) -> Find:
    if len(group) == 1:
        return group[0]
    chosen = min(group, key=lambda find: (find.start - find.stop, _rank(find.kind), find.kind, find.start))
    return Find(group[0].start, max(find.stop for find in group), chosen.kind)


def _rank(kind: str) -> int:
    return ORDER.index(kind) if kind in ORDER else len(ORDER)
