"""Every kind of run is killed at many moments and goes on to the same bits; see `matrix.py`."""

import os
from pathlib import Path

import masked
import pytest
from matrix import FIGURES, RECIPE, Cell, Run, cells, drift, leave_figures, run_cell, uninterrupted
from sessions import shared_server

pytestmark = pytest.mark.timeout(1200)  # a cell takes a minute where nothing else runs

PAIRS = sorted({(c.objective, c.dropout, c.accumulation, c.processes) for c in cells()})


@pytest.fixture(scope="module")
def server():
    return shared_server()


def prove(server, folder, cell, whole):
    trials = run_cell(server, folder, cell, whole)
    if FIGURES in os.environ:
        leave_figures(Path(os.environ[FIGURES]), trials)
    failed = [trial for trial in trials if not (trial.survived and trial.bitwise)]
    assert not failed, "\n".join(f"{trial.moment}: {trial.why}" for trial in failed)


def test_killed_at_ten_moments_a_run_with_random_masks_goes_on_to_the_same_bits(server, in_memory):
    cell = Cell(masked.NAME, dropout=True, accumulation=3, workers=0, processes=1)
    prove(server, in_memory, cell, uninterrupted(server, in_memory, cell))


def test_so_does_one_of_two_processes(server, in_memory):
    cell = Cell(masked.NAME, dropout=True, accumulation=3, workers=0, processes=2)
    prove(server, in_memory, cell, uninterrupted(server, in_memory, cell))


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "dropout", "accumulation", "processes"), PAIRS)
def test_the_matrix(server, in_memory, objective, dropout, accumulation, processes):
    """With loader processes a run is compared with the one that has none."""
    without, with_two = (Cell(objective, dropout, accumulation, workers, processes) for workers in (0, 2))
    whole = uninterrupted(server, in_memory, without)
    assert whole.helpers() == 0
    prove(server, in_memory, without, whole)
    prove(server, in_memory, with_two, whole)


def elastic(server, folder, sessions, dropout):
    """A run that goes on with other words each time, killed in between, and how far it is from a whole one."""
    changes = {**RECIPE, "pretrain__model__dropout": dropout}
    whole = Run(server, folder, "whole", sessions[0], changes)
    whole.tokenize()
    assert whole().code == 0
    for number, words in enumerate(sessions, start=1):
        run = Run(server, folder, "elastic", [*words, "--no-self-check"], changes)
        last = number == len(sessions)
        ended = run() if last else run(LLMKIT_KILL_AT=str(4 * number))
        assert (ended.code == 0) == last, ended.said
        assert number == 1 or "from step_" in ended.said, ended.said
    return drift(run, whole)


def on(processes, micro_batch):
    words = [f"machine.micro_batch={micro_batch}"]
    return [*words, "--processes", str(processes)] if processes > 1 else words


ROUNDING = 1e-5
"""Losses in nats and weights, after steps that sum the same numbers in another order."""


def test_on_another_number_of_processes_and_micro_batches_only_rounding_differs(server, in_memory):
    found = elastic(server, in_memory, [on(1, 12), on(2, 2), on(1, 4)], dropout=0.0)
    assert found.rows
    assert 0 < max(found.loss, found.weights) < ROUNDING


@pytest.mark.slow
def test_likewise_with_dropout_as_long_as_the_micro_batches_stay(server, in_memory):
    found = elastic(server, in_memory, [on(1, 2), on(2, 2), on(1, 2)], dropout=0.1)
    assert found.rows
    assert max(found.loss, found.weights) < ROUNDING


@pytest.mark.slow
def test_with_dropout_and_other_micro_batches_it_is_another_run_of_the_same_rows(server, in_memory):
    """What is not promised: dropout draws its masks for a whole micro-batch."""
    found = elastic(server, in_memory, [on(1, 2), on(1, 4), on(1, 2)], dropout=0.1)
    assert found.rows
    assert found.weights > ROUNDING
