"""Whole runs, from the shell: what they leave after a kill inside a save, and after a loss of power."""

import os
import subprocess

import pytest
from injection import CHANGING, environment, losses, read_strace, without_strace
from training import command, same_bits, start, weights
from training import losses as curve


@pytest.mark.slow
def test_a_run_killed_inside_a_save_goes_on_to_the_same_bits(in_memory):
    whole, words = start(command(in_memory, "whole", "-q")), command(in_memory, "killed", "-q")
    # The third call below `checkpoints` is the writing of the weights, of which half is left.
    killed = start(words, **environment("kill-middle", 3, path="checkpoints"))
    assert killed.wait(240) == -9, killed.communicate()
    again = start(words)
    assert again.wait(240) == 0, again.communicate()
    assert whole.wait(240) == 0, whole.communicate()
    runs = [in_memory / "runs" / name / "pretrain" for name in ("whole", "killed")]
    assert same_bits(*map(weights, runs))
    assert curve(runs[0]) == curve(runs[1])


@pytest.mark.slow
def test_nothing_a_run_leaves_is_torn_by_a_loss_of_power(in_memory):
    """Of all that a run writes, by the word of strace: text cache, checkpoints, export, reports and logs."""
    if reason := without_strace():
        pytest.skip(reason)
    trace, runs = in_memory / "trace", in_memory / "runs"
    runs.mkdir()
    tracer = ["strace", "-f", "-y", "-s", "4", "-e", f"trace={CHANGING}", "-o", str(trace)]
    done = subprocess.run(
        [*tracer, *command(in_memory, "tiny", "-q")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [event for event in read_strace(trace.read_text()) if event.path.startswith(str(runs))]
    assert losses(events) == []
    published = {event.target for event in events if event.what in ("rename", "exchange")}
    for name in ("checkpoints/step_00000020", "model", "report.json", "metrics.jsonl"):
        assert str(runs / "tiny" / "pretrain" / name) in published
