"""Losses of a small run on a text that does not change: any change to data, model, order or update moves them.

When a change is meant to move them, say why in its commit and put the new figures here.
"""

from pathlib import Path

import pytest
from training import losses, pretrain

LICENSE = Path(__file__).parents[2] / "LICENSE"
TRAIN = {1: 5.99491, 5: 5.51961, 10: 5.08359, 20: 5.01789}
HELD_OUT = {0: 5.99147, 20: 5.09976}


def test_the_golden_run(tmp_path):
    folder = pretrain(
        tmp_path,
        pretrain__data={"name": "licence", "files": str(LICENSE), "documents": "paragraph"},
        pretrain__model__dropout=0.0,
    )
    found = losses(folder)
    assert {step: found[step] for step in TRAIN} == pytest.approx(TRAIN, abs=1e-4)
    found = losses(folder, "eval/loss")
    assert {step: found[step] for step in HELD_OUT} == pytest.approx(HELD_OUT, abs=1e-4)
