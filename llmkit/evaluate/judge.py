"""From what a model says of each row to metrics: in training, in `llmkit eval` and in the tests the same code."""

from collections.abc import Mapping
from typing import Any

from llmkit.data.samples import RowStore
from llmkit.objectives.base import Judges


def judge(objective: Judges, rows: RowStore, found: Mapping[int, Any]) -> dict[str, float]:
    """Metrics of the rows that were measured, taken in their order whatever process measured which.

    Args:
        objective: The task.
        rows: All rows of the part.
        found: What the model says of a row, by the row's number.
    """
    numbers = sorted(found)
    if not numbers:
        return {}
    return objective.measure([rows[number] for number in numbers], [found[number] for number in numbers])
