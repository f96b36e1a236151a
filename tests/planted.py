"""Scores of preparation against what was planted: one row a finding, as a table."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How well one step found one thing.

    `found` of `planted` were treated as they should be; `wrong` of `others` were treated so and should not be. Where
    there are no `others` nothing can be wrong, and there is no precision to speak of.
    """

    step: str
    what: str
    found: int
    planted: int
    wrong: int
    others: int

    @property
    def recall(self) -> float:
        return self.found / self.planted

    @property
    def precision(self) -> float | None:
        return self.found / max(self.found + self.wrong, 1) if self.others else None

    @classmethod
    def of(cls, step: str, what: str, found: Iterable[int], planted: Iterable[int], all_: Iterable[int]):
        """From sets of document numbers: what was found, what should be, and all there were."""
        found, planted, all_ = set(found), set(planted), set(all_)
        return cls(step, what, len(found & planted), len(planted), len(found - planted), len(all_ - planted))

    def check(self, recall: float, precision: float | None = None) -> None:
        """Fail below the floors; a floor of precision needs something that could have been treated wrongly."""
        assert self.planted > 0, f"{self.step}, {self.what}: nothing was planted"
        assert self.recall >= recall, f"{self} finds too few: {self.recall:.3f} < {recall}"
        if precision is None:
            return
        assert self.precision is not None, f"{self.step}, {self.what}: nothing could be wrong"
        assert self.precision >= precision, f"{self} is wrong too often: {self.precision:.3f} < {precision}"


def table(scores: Iterable[Score]) -> str:
    """Markdown, as the documentation shows it."""
    lines = [
        "| step | what | planted | found | recall | wrongly | of others | precision |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {s.step} | {s.what} | {s.planted} | {s.found} | {s.recall:.3f} | {s.wrong} | {s.others} "
        f"| {'–' if s.precision is None else f'{s.precision:.3f}'} |"
        for s in scores
    ]
    return "\n".join(lines)


def shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    """The word sequences by which two documents are compared, for the exact answer."""
    words = text.casefold().split()
    return {tuple(words[i : i + ngram]) for i in range(max(len(words) - ngram + 1, 1))}


def jaccard(a: str, b: str, ngram: int) -> float:
    """The exact share of common word sequences."""
    one, other = shingles(a, ngram), shingles(b, ngram)
    return len(one & other) / len(one | other)
