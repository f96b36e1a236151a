"""Losses that are not numbers, from text that breaks them: the run stops and names the rows, or leaves steps out."""

import json
import os
import re
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import masked
import numpy as np
import pytest
from matrix import NUM_STEPS, RECIPE, Run, content
from safetensors.numpy import load_file
from sessions import Point, shared_server
from training import losses, same_bits, weights, write_corpus

from llmkit.report.run_log import read_metrics

BREAKING = {
    **RECIPE,
    "pretrain__objective": masked.BREAKABLE,
    "pretrain__checkpoint": {"every": "1 steps", "keep": 100},
    "pretrain__train__bad_numbers": "skip",
}
STOPPING = {**BREAKING, "pretrain__train__bad_numbers": "stop"}
ONE = ("machine.micro_batch=4", "--no-self-check")
TWO = ("machine.micro_batch=2", "--no-self-check", "--processes", "2")
ON = pytest.mark.parametrize(
    "words",
    [pytest.param(ONE, id="one process"), pytest.param(TWO, id="two processes", marks=pytest.mark.slow)],
)


@pytest.fixture(scope="module")
def place():
    """A folder with text of which some rows break the loss."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="llmkit-test-") as folder:
        corpus = write_corpus(Path(folder) / "corpus")
        (corpus / "bad.txt").write_text("☢" * 20_000)
        yield Path(folder)


@pytest.fixture(scope="module")
def server():
    return shared_server()


@pytest.fixture(scope="module")
def runs(server, place):
    """A function that makes a run, and those that left bad steps out and were not interrupted."""

    def make(name, words=ONE, changes=BREAKING):
        return Run(server, place, name, list(words), changes)

    make("text").tokenize()

    @cache
    def uninterrupted(words=ONE):
        run = make(f"whole-{len(words)}", words)
        ended = run()
        assert ended.code == 0, ended.said
        return run

    return make, uninterrupted


def skipped(run):
    """Step -> steps left out up to there, from what the run has recorded."""
    return {
        record["step"]: record.get("train/skipped", 0)
        for record in read_metrics(run.folder)
        if "train/loss" in record
    }


def bad_steps(run):
    """The steps that were left out, from 1, by their records."""
    counts = {0: 0, **skipped(run)}
    return [step for (_, before), (step, now) in pairwise(counts.items()) if now > before]


def test_steps_left_out_leave_weights_and_moments_as_they_were(runs):
    _, whole = runs
    run = whole(ONE)
    left_out = bad_steps(run)
    assert 2 <= len(left_out) < NUM_STEPS - 2
    assert [step for step, loss in losses(run.folder).items() if loss is None] == left_out
    for step in left_out:
        if step > 1:
            before, after = (content(run.folder / f"checkpoints/step_{s:08d}") for s in (step - 1, step))
            before.pop("state"), after.pop("state")
            assert before == after
    state = json.loads((run.folder / f"checkpoints/step_{NUM_STEPS:08d}/state.json").read_bytes())
    assert state["state"]["skipped"] == len(left_out)
    assert all(np.isfinite(tensor).all() for tensor in weights(run.folder).values())


@ON
def test_killed_and_resumed_it_leaves_out_the_same_steps_to_the_same_bits(runs, words):
    make, whole = runs
    run = make(f"killed-{len(words)}", words)
    first = bad_steps(whole(words))[0]
    for point in (
        Point("SIGKILL", "door", "rename", f"/step_{first:08d}", when="after"),
        Point("SIGKILL", "batch", step=9),
    ):
        assert run(point).code in (-9, 1)
    ended = run()
    assert ended.code == 0, ended.said
    assert bad_steps(run) == bad_steps(whole(words))
    assert same_bits(weights(run.folder), weights(whole(words).folder))
    assert run.record() == whole(words).record()


@pytest.mark.slow
def test_one_process_with_a_bad_loss_makes_both_leave_the_step_out(runs):
    """The rows of a step are the same on one process: so are the steps left out."""
    _, whole = runs
    assert bad_steps(whole(TWO)) == bad_steps(whole(ONE))
    for record in losses(whole(TWO).folder), losses(whole(ONE).folder):
        assert sum(loss is None for loss in record.values()) == len(bad_steps(whole(ONE)))


@ON
def test_stopped_it_names_step_and_rows_and_keeps_the_last_good_state(runs, words):
    make, whole = runs
    run, first = make(f"stopped-{len(words)}", words, STOPPING), bad_steps(whole(words))[0]
    for _ in range(2):  # what is in the data is there the second time too
        ended = run()
        assert ended.code == 1
        found = re.search(
            rf"step {first}: the loss is nan.* not finite; micro-batch (\d+) of it holds", ended.said
        )
        assert found, ended.said
        rows = re.findall(rf"micro-batch {found[1]}: 'text' row [\d,]+: \"(.*)\"", ended.said)
        assert any(set(row) <= {"☢", "…", "\ufffd"} for row in rows), ended.said
        there = run.whole_checkpoints()
        assert there == [f"step_{step:08d}" for step in range(1, first)]
        for name in there:
            assert content(run.folder / "checkpoints" / name) == content(
                whole(words).folder / "checkpoints" / name
            )
    run = make(f"stopped-{len(words)}", words)  # the recipe may change in this
    ended = run()
    assert ended.code == 0, ended.said
    assert same_bits(weights(run.folder), weights(whole(words).folder))


def test_no_more_steps_are_left_out_than_the_recipe_allows_over_all_sessions(runs):
    make, whole = runs
    first, second, *_ = bad_steps(whole(ONE))
    run = make("bounded", ONE, {**BREAKING, "pretrain__train__max_skipped": 1})
    assert run(LLMKIT_KILL_AT=str(first)).code == -9
    for _ in range(2):
        ended = run()
        assert ended.code == 1
        assert (
            "2 steps had losses or gradients that were not finite, and `train.max_skipped` is 1" in ended.said
        )
        newest = run.folder / "checkpoints" / run.whole_checkpoints()[-1]
        assert newest.name == f"step_{second - 1:08d}"
        assert all(np.isfinite(tensor).all() for tensor in load_file(newest / "model.safetensors").values())


def test_the_best_and_every_fourth_survive_rotation_and_crashes(server, in_memory):
    """With a learning rate so high that the model gets worse again."""
    changes = {
        **RECIPE,
        "pretrain__checkpoint": {
            "every": "1 steps",
            "keep": 1,
            "keep_every": "4 steps",
            "keep_best": "eval/loss",
        },
        "pretrain__eval": {"every": "1 steps", "rows": 30},
        "pretrain__train__optim": {"lr": 1.0, "warmup": "1 steps", "schedule": "constant"},
    }
    whole, run = (Run(server, in_memory, name, list(ONE), changes) for name in ("kept", "kept-killed"))
    assert whole().code == 0
    measured = {
        step: loss for step, loss in losses(whole.folder, "eval/loss").items() if 0 < step < NUM_STEPS
    }
    best = min(measured, key=measured.get)
    assert best not in (4, 8, NUM_STEPS - 1, NUM_STEPS), "else this proves nothing"
    for at in (best, best + 1, 9):
        assert run(LLMKIT_KILL_AT=str(at)).code == -9
    assert run().code == 0
    for one in (whole, run):
        assert one.whole_checkpoints() == [f"step_{step:08d}" for step in sorted({best, 4, 8, NUM_STEPS})]
        kept = json.loads((one.folder / "checkpoints/best.json").read_bytes())
        assert (kept["step"], kept["value"]) == (best, measured[best])
