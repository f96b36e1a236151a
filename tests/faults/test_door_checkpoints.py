"""Real checkpoints, by safetensors and the saving thread, under faults at each call of a save and its rotation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from injection import without_strace

TRIALS = Path(__file__).with_name("checkpoint_trials.py")


def tried(folder: Path, *kinds: str) -> list[list[dict]]:
    done = subprocess.run(
        [sys.executable, str(TRIALS), str(folder / "checkpoints"), *kinds],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return [found[kind] for kind in kinds]


def check(trials: list[dict], at_least: int) -> None:
    """After each fault the old or the new checkpoint loads, to the last bit, and the next save goes well."""
    assert len(trials) >= at_least
    for trial in trials:
        assert trial["newest"] in (1, 2), trial
        assert trial["code"] in ((-9, 0) if "kill" in trial["how"] else (1, 0, -9)), trial
        assert (trial["code"] == 0) <= (trial["newest"] == 2), trial
        assert trial["then"] == 3, trial
        assert trial["left"] == ["step_00000003"], trial
    assert {trial["newest"] for trial in trials} == {1, 2}


def test_killed_at_every_call_of_a_save_and_safe_from_a_loss_of_power(in_memory):
    kills, power = tried(in_memory, "kills", "power")
    check(kills, 20)
    for witness in power:
        assert witness["losses"] == [], witness["by"]
        assert witness["fsyncs"] == power[0]["fsyncs"] > 8
    assert [w["by"] for w in power] == ["fail points", *([] if without_strace() else ["strace"])]


@pytest.mark.slow
def test_every_fault_at_every_call_of_a_save(in_memory):
    (trials,) = tried(in_memory, "fail points")
    check(trials, 100)
    refused = [trial for trial in trials if trial["how"] in ("ENOSPC", "EIO")]
    assert {1, 0} >= {trial["code"] for trial in refused}, "every error is a clear one"


@pytest.mark.slow
def test_killed_by_strace_at_every_call_of_a_save(in_memory):
    if reason := without_strace():
        pytest.skip(reason)
    (trials,) = tried(in_memory, "strace")
    check(trials, 40)
    assert all(trial["code"] == -9 for trial in trials)
