"""Texts that begin alike, in one line: what they share stands once, and branches do not see each other. No torch.

The texts of a line are a tree of tokens, written in preorder. Then whatever goes on from a token stands between it and
its `end`, and a token sees exactly those before it whose end lies behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

Ids = Sequence[int]

_MOST_TOKENS = 1024
"""A line of branches is no longer: attention costs its square."""
_WORTH_SHARING = 0.25
"""The share of a text that must stand in the line already for the rest to be added to it, not to a line of its own."""


@dataclass
class Line:
    """Some texts as one line of tokens.

    Attributes:
        ids: The tokens.
        depths: How many tokens of its own text stand before each.
        ends: Where what goes on from each token ends.
        places: By text, where the last of its tokens stand: as many as were asked for.
        branched: Whether texts part in it; else each token sees all before it.
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    places: dict[int, list[int]] = field(default_factory=dict)
    branched: bool = False

    def go_on(self, trail: list[int], path: Ids, shared: int) -> None:
        """Put a text into the line.

        Args:
            trail: Where the tokens of the text before it stand; becomes those of this text.
            path: The text.
            shared: How many tokens of it are the trail's first.
        """
        self._end(trail[shared:])
        self.branched |= shared < len(trail)
        del trail[shared:]
        for token in path[shared:]:
            self.depths.append(len(trail))
            trail.append(len(self.ids))
            self.ids.append(token)
        self.ends += [0] * (len(self.ids) - len(self.ends))

    def _end(self, places: Sequence[int]) -> None:
        for place in places:
            self.ends[place] = len(self.ids)


def lay_out(
    paths: Sequence[Ids], wanted: Sequence[int], *, share: bool = True, most: int = _MOST_TOKENS
) -> list[Line]:
    """Put texts into as few tokens as may be.

    Args:
        paths: The texts.
        wanted: By text, the places of how many of its last tokens are needed.
        share: Whether texts that part may share a line; else only a text and those that go on from its end do.
        most: Tokens of a line of branches, unless one text has more.

    Returns:
        Lines in the order of their texts as numbers sort.
    """
    lines: list[Line] = []
    trail: list[int] = []
    before: Ids = ()
    for number in sorted(range(len(paths)), key=lambda one: tuple(paths[one])):
        path = paths[number]
        shared = _num_shared(before, path)
        grown = len(lines[-1].ids) + len(path) - shared if lines else 0
        branches = share and shared >= _WORTH_SHARING * len(path) and grown <= most
        if not lines or not (shared == len(before) or branches):
            _close(lines, trail)
            lines.append(Line())
            trail, shared = [], 0
        lines[-1].go_on(trail, path, shared)
        lines[-1].places[number] = trail[len(trail) - wanted[number] :]
        before = path
    _close(lines, trail)
    return lines


def _close(lines: Sequence[Line], trail: Sequence[int]) -> None:
    if lines:
        lines[-1]._end(trail)


def _num_shared(first: Ids, second: Ids) -> int:
    """How many tokens two texts begin with alike."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
