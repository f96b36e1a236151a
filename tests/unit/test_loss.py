"""Sums and counts: several losses, each over its own count."""

import pytest
import torch

from llmkit.objectives.base import Loss
from llmkit.train.loop import counts_of


def scalar(value):
    return torch.tensor(float(value))


def test_each_sum_is_divided_by_its_own_count():
    loss = Loss({"num_targets": scalar(12), "num_pairs": scalar(3)})
    assert float(loss.mean({"num_targets": 6, "num_pairs": 2})) == 12 / 6 + 3 / 2
    assert float(loss.total) == 15


def test_micro_batches_of_unequal_counts_add_up_to_the_mean_over_all():
    """Means of micro-batches would be (12/6 + 4/1) / 2 + (3/1 + 1/4) / 2 = 4.625."""
    counts = {"num_targets": 7, "num_pairs": 5}
    parts = [
        Loss({"num_targets": scalar(12), "num_pairs": scalar(3)}),
        Loss({"num_targets": scalar(4), "num_pairs": scalar(1)}),
    ]
    added = sum(float(part.mean(counts)) for part in parts)
    assert added == pytest.approx(16 / 7 + 4 / 5)


def test_a_step_without_pairs_loses_nothing_but_them():
    loss = Loss({"num_targets": scalar(12), "num_pairs": scalar(0)})
    assert float(loss.mean({"num_targets": 6, "num_pairs": 0})) == 2.0


def test_counts_of_a_step_are_whatever_its_batches_count():
    batches = [
        (
            index,
            {"targets": torch.zeros(2), "num_targets": torch.tensor(3 + index), "num_pairs": torch.tensor(2)},
        )
        for index in (0, 1)
    ]
    assert counts_of(batches) == {"num_targets": 7, "num_pairs": 4}
