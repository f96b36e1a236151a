"""What came of measuring a model: figures, how far they can be trusted, and what they were made of. No torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.metrics.bootstrap import Comparison, Interval, compare_all, intervals
from llmkit.metrics.inputs import Integers
from llmkit.registry import direction_of

Figures = Mapping[str, float]
FEW_DOCUMENTS = 20
"""Of fewer documents of a text, windows are the items that figures get their intervals from."""
FEWEST = 10
"""Items that draws can be made from: of fewer, the bootstrap sees differences far too often where there are none."""


@dataclass(frozen=True)
class Items:
    """What figures are made of: rows, documents or questions that could have been others.

    Attributes:
        keys: What each item is; two measurements with equal keys can be compared item by item.
        figures: Numbers of items, some of them several times -> the figures over them. Called a thousand times, so what
            an item contributes is counted once, beforehand.
        right: Whether each item was answered rightly, where that can be said: for McNemar's test.
    """

    keys: Sequence[str]
    figures: Callable[[Integers], Figures]
    right: Sequence[bool] | None = None


@dataclass(frozen=True)
class Measurement:
    """What came of measuring one model on something.

    Attributes:
        subject: The model, as a person named it.
        model: Its folder.
        task: What it was asked: a task's name, `text`, `choice`, `harness`, `generation`, `retrieval`, `speed`.
        data: The address of what it was measured on; empty where that has none.
        figures: By name, without the `eval/` in front.
        shown: The names to show first, in their order.
        best: The figure that tells a better model.
        items: What the figures were made of; None: they have no intervals.
        tables: What else is told, for `report.json` and the page: `per_source`, `per_length`, `classes`, `confusion`,
            `errors`, `calibration`, `references`, ...; plain JSON.
        settings: How it was measured: windows, decoding, signatures; plain JSON.
        predictions: A line of `predictions.jsonl` for each row, as JSON; empty where there is none.
        warnings: What a person should know, in words.
        files: Further files to leave beside the report, by name, as JSON.
        directions: Of figures that are not known elsewhere, whether a model gets better as they rise or fall.
    """

    subject: str
    model: str
    task: str
    data: str
    figures: Figures
    shown: Sequence[str]
    best: str
    items: Items | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    predictions: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    directions: Mapping[str, Literal["higher", "lower"]] = field(default_factory=dict)

    def direction(self, name: str) -> Literal["higher", "lower"] | None:
        """Whether a figure is better as it rises or falls; None where that is not known."""
        return self.directions.get(name) or direction_of(name)

    def intervals(self, *, seed: int, resamples: int) -> Mapping[str, Interval]:
        """Each figure with the interval in which 95% of the figures of other such items would lie.

        Args:
            seed: The draws follow from it.
            resamples: How many draws; 0: none are made.
        """
        if self.items is None or not resamples or len(self.items.keys) < FEWEST:
            return {}
        return intervals(self.items.figures, len(self.items.keys), seed=seed, resamples=resamples)

    def compare(self, other: "Measurement", *, seed: int, resamples: int) -> Mapping[str, Comparison]:
        """Each figure of `other` less this one's, on the same items.

        Raises:
            ValueError: They were not measured on the same items.
        """
        if self.items is None or other.items is None or not resamples or len(self.items.keys) < FEWEST:
            return {}
        if list(self.items.keys) != list(other.items.keys):
            raise ValueError("these were not measured on the same items")
        return compare_all(
            self.items.figures, other.items.figures, len(self.items.keys), seed=seed, resamples=resamples
        )
