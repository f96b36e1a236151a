"""Every registered objective: killed it goes on to the same bits, and two processes learn what one does."""

import objectives
import pytest
from matrix import Run
from sessions import Point, shared_server
from training import losses, same_bits, weights

from llmkit import registry

SHORT = {
    "pretrain__train__length": "6 steps",
    "pretrain__train__batch": "12 samples",
    "pretrain__checkpoint": {"every": "2 steps", "keep": 10},
    "pretrain__eval": {"every": "3 steps", "rows": 20},
    "pretrain__prompts": [],
}


def run_of(folder, objective, name, *words, **more):
    changes = {**objectives.changes(objective), **SHORT, **more}
    return Run(shared_server(), folder, name, [*words, "machine.micro_batch=6"], changes)


def finished(run):
    ended = run()
    assert ended.code == 0, ended.said
    return run.folder


@pytest.fixture(params=list(registry.OBJECTIVES))
def whole(request, in_memory):
    """An objective, and a run of it with dropout that nothing happens to."""
    run = run_of(in_memory, request.param, "whole")
    run.tokenize()
    return request.param, finished(run)


def test_killed_and_resumed_it_ends_with_the_same_bits(whole, in_memory):
    objective, expected = whole
    run = run_of(in_memory, objective, "killed")
    ended = run(Point("SIGKILL", "update", step=3))
    assert ended.code == -9, ended.said
    assert run.whole_checkpoints() == ["step_00000002"]
    ended = run()
    assert ended.code == 0, ended.said
    assert "from step_00000002" in ended.said
    assert same_bits(weights(run.folder), weights(expected))
    for key in ("train/loss", "eval/loss"):
        assert losses(run.folder, key) == losses(expected, key)


@pytest.mark.slow
def test_two_processes_equal_one(whole, in_memory):
    """Dropout is the same on any number of processes; what is random about rows is too."""
    objective, expected = whole
    two = finished(run_of(in_memory, objective, "two", "--processes", "2"))
    for key in ("train/loss", "eval/loss"):
        one, other = losses(expected, key), losses(two, key)
        assert one.keys() == other.keys()
        assert max(abs(one[step] - other[step]) for step in one) < 1e-5
