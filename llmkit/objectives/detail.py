"""What a task can say of an evaluation beyond its figures: what each item contributes, and which ones went wrong.

Shape suffix: N targets in a line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from llmkit.models.heads import Scores
from llmkit.objectives.base import NOT_LEARNED, Example, Ints

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Detail:
    """What an evaluation's figures were made of. An item is what could have been another: a row, a sentence, ...

    Attributes:
        keys: What each item is; the same for every model that is measured on it.
        owner: The number of the item that each row is of; -1: of none.
        figures: Numbers of items, some of them several times -> the figures of `Judges.measure` over them. Quick.
        lines: Of each item, as JSON: `input`, `target`, `prediction`, `score`.
        errors: Numbers of the items that went wrong, the worst or most confident first; None: the largest losses.
        right: Whether each item was answered rightly, where `accuracy` is the share of those.
        tables: What else is told; see `Measurement.tables`.
        files: What is too long to be told.
        warnings: What a person should know.
    """

    keys: Sequence[str]
    owner: Sequence[int]
    figures: Callable[[Ints], Mapping[str, float]]
    lines: Sequence[Mapping[str, Any]]
    errors: Sequence[int] | None = None
    right: Sequence[bool] | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


@runtime_checkable
class Details(Protocol):
    """A task that can say what its figures are made of."""

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """What the figures of these rows are made of; of all items they are those of `Judges.measure`.

        Args:
            rows: Labelled rows, in their order.
            found: What `Loss.found` said of each; empty where it says nothing.
        """
        ...


@runtime_checkable
class Regroups(Protocol):
    """A task that can make a row again of those that stand for it."""

    def whole(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The row that `expand` made these of."""
        ...


@runtime_checkable
class Packs(Protocol):
    """A task whose batches have several rows in a line."""

    def owners(self, examples: Sequence[Example]) -> Ints:
        """The number of the example that each position of `collate(examples)["targets"]` is of, in a line [N]."""
        ...


class Recording:
    """The plain cross-entropy, which keeps the loss of each target that it is given.

    Args:
        hits: Whether to keep, too, which targets are the likeliest token.
    """

    def __init__(self, *, hits: bool = False) -> None:
        self._hits = hits
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Of each call, [N] each: the loss in nats, whether there is a target, whether that was the likeliest."""

    @torch.no_grad()
    def __call__(self, scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
        """The sum of the losses, the same bits as of `cross_entropy`."""
        is_target_N = targets_N != NOT_LEARNED
        hit_N = torch.zeros(len(targets_N), dtype=torch.bool)
        for part in is_target_N.nonzero().squeeze(1).split(_ROWS_AT_ONCE) if self._hits else ():
            hit_N[part.cpu()] = (scores.logits(part).argmax(1) == targets_N[part]).cpu()
        self.seen.append((scores.each(targets_N).double().cpu(), is_target_N.cpu(), hit_N))
        return scores.nll(targets_N)


def worst_first(badness: Sequence[float], wrong: Sequence[bool] | None = None) -> list[int]:
    """Numbers of items by their badness, the largest first; only those that are wrong, where that is told."""
    chosen = [number for number in range(len(badness)) if wrong is None or wrong[number]]
    return sorted(chosen, key=lambda number: -badness[number])
