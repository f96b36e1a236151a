"""A run that no longer becomes better ends, at the same step however often it is interrupted; its best is exported."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from training import same_bits
from training import weights as exported
from tuning import finetune

from llmkit.errors import UsageError
from llmkit.recipe.schema import Finetune
from llmkit.registry import MEASURED, lower_is_better
from llmkit.train.build import _rows_measured
from llmkit.train.early import Patience, best_metric
from llmkit.train.state import TrainState

STOPS = {
    "finetune__stop_early": {"metric": "eval/accuracy", "patience": 2},
    "finetune__train__length": "40 steps",
    "finetune__train__optim__lr": 1e-5,
    "finetune__checkpoint": {"every": "3 steps", "keep": 10},
    "finetune__eval": {"every": "2 steps"},
}
"""So slow that the accuracy stays as it was: the first evaluation after a step is the best, and two more are not."""


def section(**changes):
    rows = {"files": "rows.csv"}
    return Finetune.model_validate({"task": "cls", "model": {"name": "m"}, "data": rows, **changes})


def evaluations(folder, name="eval/accuracy"):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record[name]) for record in records if name in record]


def judged(patience, values):
    """The states after evaluations at the steps 10, 20, ... that found these values."""
    states, state = [], TrainState()
    for number, value in enumerate(values, 1):
        state = patience.after(
            TrainState(number * 10, 0, 0, 0, state.judged, state.best, state.waited), value
        )
        states.append(state)
    return states


def found(name, *values):
    return [{name: value} for value in values]


def test_it_waits_for_so_many_evaluations_in_a_row_without_a_better_one():
    patience = Patience("eval/loss", 2)
    states = judged(patience, found("eval/loss", 1.0, 1.1, 0.9, 0.9, 0.95))
    assert [state.waited for state in states] == [0, 1, 0, 1, 2]
    assert [patience.is_out(state) for state in states] == [False, False, False, False, True]
    assert states[-1].best == 0.9


def test_more_is_better_of_an_accuracy_and_what_is_not_finite_never_is():
    patience = Patience("eval/accuracy", 3)
    states = judged(patience, found("eval/accuracy", math.nan, 0.5, 0.6, math.nan, math.inf, 0.6))
    assert [state.waited for state in states] == [1, 0, 0, 1, 2, 3]


def test_a_gain_must_be_larger_than_min_delta():
    patience = Patience("eval/f1", 9, min_delta=0.1)
    states = judged(patience, found("eval/f1", 0.5, 0.58, 0.65, 0.7))
    assert [(state.best, state.waited) for state in states] == [(0.5, 0), (0.5, 1), (0.65, 0), (0.65, 1)]


def test_an_evaluation_that_a_resume_repeats_counts_once_and_that_of_step_0_never():
    patience = Patience("eval/loss", 1)
    state = patience.after(TrainState(step=5, judged=5, best=1.0, waited=0), {"eval/loss": 2.0})
    assert state.waited == 0
    assert patience.after(TrainState(), {"eval/loss": 1.0}) == TrainState()


def test_it_stops_and_exports_the_best(tmp_path):
    run = finetune(tmp_path, "cls", **STOPS)
    assert [step for step, _ in evaluations(run)] == [0, 2, 4, 6]
    best = load_file(run / "checkpoints" / "step_00000002" / "model.safetensors")
    last = load_file(run / "checkpoints" / "step_00000006" / "model.safetensors")
    model = load_file(run / "model" / "model.safetensors")
    assert all((best[name] == model[name]).all() for name in model)
    assert not all((last[name] == model[name]).all() for name in model)
    report = json.loads((run / "report.json").read_bytes())
    assert report["final"]["eval/accuracy"] == dict(evaluations(run))[2]
    assert json.loads((run / "model" / "manifest.json").read_bytes())["step"] == 2


@pytest.mark.parametrize("kept", [3, 6])
def test_resumed_it_stops_at_the_same_step_with_the_same_bits(tmp_path, kept):
    whole = finetune(tmp_path, "cls", **STOPS)
    before, seen = exported(whole), evaluations(whole)
    (whole / "model" / "manifest.json").unlink()
    for path in sorted((whole / "checkpoints").glob("step_*")):
        if int(path.name[5:]) > kept:
            shutil.rmtree(path)
    again = finetune(tmp_path, "cls", **STOPS)
    assert evaluations(again) == seen
    assert same_bits(before, exported(again))


def test_a_run_that_is_not_stopped_exports_its_best_too(tmp_path):
    patient = {
        **STOPS,
        "finetune__stop_early": {"metric": "eval/loss", "patience": 4},
        "finetune__train__length": "6 steps",
        "finetune__train__optim__lr": 1e-3,
    }
    run = finetune(tmp_path, "cls", **patient)
    losses = evaluations(run, "eval/loss")
    assert [step for step, _ in losses] == [0, 2, 4, 6]
    best = min(losses[1:], key=lambda one: one[1])
    assert json.loads((run / "model" / "manifest.json").read_bytes())["step"] == best[0]
    assert json.loads((run / "report.json").read_bytes())["final"]["eval/loss"] == best[1]


def test_the_metric_is_the_one_to_keep_or_else_the_tasks_own():
    assert best_metric(section(stop_early={})) == "eval/accuracy"
    assert best_metric(section(stop_early={}, checkpoint={"keep_best": "eval/loss"})) == "eval/loss"
    assert best_metric(section(checkpoint={"keep_best": "eval/loss"})) == "eval/loss"
    assert best_metric(section()) is None
    with pytest.raises(
        UsageError, match=r"stop_early goes by eval/loss, and checkpoint\.keep_best by eval/f1"
    ):
        best_metric(section(stop_early={"metric": "eval/loss"}, checkpoint={"keep_best": "eval/f1"}))


def test_without_evaluations_nothing_could_stop_it():
    assert Patience.of(section()) is None
    with pytest.raises(UsageError, match=r"eval\.every` is `never"):
        Patience.of(section(stop_early={}, eval={"every": "never"}))


def test_of_every_metric_it_is_known_which_way_is_better():
    falling = {name for name in MEASURED if lower_is_better(name)}
    assert falling == {
        f"eval/{name}" for name in ("loss", "perplexity", "bits_per_byte", "detector_loss", "mse", "ece")
    }


@pytest.mark.parametrize(("asked", "counted"), [(16, None), (17, None), (15, 15), (None, None)])
def test_an_evaluation_of_all_rows_is_known_as_one_so_that_the_last_one_counts_with_it(asked, counted):
    plan = SimpleNamespace(rows={"held_out": {"num_rows": 16}})
    assert _rows_measured(section(eval={"rows": asked}), plan) == counted


def test_a_task_measures_all_rows_unless_it_is_told_otherwise():
    assert section(eval={"every": "5%"}).eval.rows is None
    assert section(eval={"every": "5%", "rows": 8}).eval.rows == 8
