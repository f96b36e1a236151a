"""Training on a TPU, as far as it can be seen without one: on a stand-in for torch_tpu that a processor computes.

The stand-in (`tests/fake_tpu`) is a device type of its own, so everything that differs by device takes the branch of a
TPU. What its compiler would do and how fast it is, only a chip can tell.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import training

FAKE = Path(__file__).parents[1] / "fake_tpu"
NO_DROPOUT = {"pretrain__model__dropout": 0.0}
"""Masks are drawn by the device's generator, which the stand-in does not have."""
LOGGED = {"_local_scalar_dense": 1}
"""What a step that is logged asks for: the norm of its gradient. Its losses are on their way already."""


def on_tpu(folder, name="tiny", **changes):
    """Train on the stand-in; the exit code, what was said, and what each step computed."""
    seen = folder / "seen.json"
    done = subprocess.run(
        [sys.executable, str(FAKE / "drive.py"), str(folder), name, json.dumps(changes), str(seen)],
        env={
            **os.environ,
            "PYTHONPATH": f"{FAKE}:{os.environ.get('PYTHONPATH', '')}",
            "TPU_SKIP_MDS_QUERY": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stderr, json.loads(seen.read_text())


def near(found, expected):
    assert found.keys() == expected.keys()
    return max(abs(found[step] - expected[step]) for step in expected)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same recipe on the stand-in and on the processor: steps seen, and both folders."""
    folder = tmp_path_factory.mktemp("tpu")
    changes = {**NO_DROPOUT, "machine__micro_batch": 4}
    code, said, steps = on_tpu(folder, "there", **changes)
    assert code == 0, said
    here = training.pretrain(folder, "here", **changes)
    return steps, folder / "runs" / "there" / "pretrain", here


def test_it_learns_what_a_processor_learns(both):
    _, there, here = both
    assert json.loads((there / "plan.json").read_text())["device"] == "tpu"
    assert near(training.losses(there), training.losses(here)) < 5e-6
    assert near(training.losses(there, "eval/loss"), training.losses(here, "eval/loss")) < 5e-6
    found, expected = training.weights(there), training.weights(here)
    assert found.keys() == expected.keys()
    assert max(abs(found[name] - expected[name]).max() for name in expected) < 1e-3


def test_after_the_first_step_nothing_is_compiled(both):
    """No operation of shapes or settings that were not there before: not by a step, nor after evaluating and saving."""
    steps, _, _ = both
    assert len(steps) == training.STEPS
    assert len(steps[0]["new"]) > 20
    assert [step["new"] for step in steps[1:]] == [[]] * (training.STEPS - 1)


def test_a_step_asks_for_nothing_but_what_is_logged(both):
    steps, _, _ = both
    assert all(step["asked"] == LOGGED for step in steps[1:])


@pytest.mark.slow
def test_in_bf16_with_isolated_documents_it_is_so_too(tmp_path):
    changes = {**NO_DROPOUT, "machine__precision": "bf16", "pretrain__isolate_documents": True}
    code, said, steps = on_tpu(tmp_path, **changes)
    assert code == 0, said
    assert [step["new"] for step in steps[1:]] == [[]] * (training.STEPS - 1)
    assert all(step["asked"] == LOGGED for step in steps[1:])
    here = training.pretrain(tmp_path, "here", **changes)
    there = tmp_path / "runs" / "tiny" / "pretrain"
    assert near(training.losses(there), training.losses(here)) < 0.02


@pytest.mark.slow
def test_a_run_of_a_tpu_goes_on_on_a_processor(tmp_path):
    """Checkpoints are host copies in the common form: what one device saved, the other goes on from."""
    changes = {**NO_DROPOUT, "pretrain__train__length": "8 steps"}
    code, said, _ = on_tpu(tmp_path, "both", **changes)
    assert code == 0, said
    folder = tmp_path / "runs" / "both" / "pretrain"
    expected = training.weights(folder)
    saved = sorted((folder / "checkpoints").glob("step_*"))
    assert [int(one.name.removeprefix("step_")) for one in saved] == [5, 8]
    for gone in (saved[-1], folder / "model"):
        shutil.rmtree(gone)
    (folder / "report.json").unlink()
    training.pretrain(tmp_path, "both", **changes)
    found = training.weights(folder)
    assert json.loads((folder / "plan.json").read_text())["device"] == "cpu"
    assert max(abs(found[name] - expected[name]).max() for name in expected) < 1e-3


def test_without_a_chip_a_pinned_tpu_is_refused(llmkit, tmp_path):
    command = training.command(tmp_path, "none", machine__device="tpu")
    done = llmkit(*command[3:], cwd=tmp_path)
    assert done.returncode == 3
    assert "no TPU is visible here" in done.stderr
    assert not (tmp_path / "runs" / "none" / "pretrain").exists()
