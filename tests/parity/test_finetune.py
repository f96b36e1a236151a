"""Every registered task: any number of processes or micro-batches learns the same; a written recipe says it all."""

import json

import pytest
from sessions import shared_server
from training import losses, same_bits, weights
from tuning import EACH, EACH_LOSS, folder_of, model_of, rows_file, words

from llmkit.report.run_log import read_metrics

SAME = {"finetune__model__dropout": 0.0, "finetune__train__optim": {"lr": 1e-3, "eps": 1e-5}}
"""Without dropout, for its masks go by the micro-batches, and these by the processes; and where a gradient is 0 but for
rounding, as of biases that a softmax does not see, Adam must not make that as large as any other."""

LOOSE = dict.fromkeys(("eval/pearson", "eval/r2"), 1e-3)
"""Of predictions that hardly differ, a correlation shows their rounding."""


def run(folder, *given):
    ended = shared_server().run(list(given))
    assert ended.code == 0, ended.said
    return folder


def trained(folder, task, name, *more, **changes):
    run(folder, *words(folder, task, name, "--no-self-check", *more, **{**SAME, **changes}))
    return folder_of(folder, name)


def measured(folder):
    """Every figure of an evaluation, by step and name."""
    return {
        (record["step"], name): value
        for record in read_metrics(folder)
        for name, value in record.items()
        if name.startswith("eval/")
    }


def compare(one, other):
    """Losses, weights and metrics of two runs are the same but for rounding."""
    assert losses(other) == pytest.approx(losses(one), abs=2e-5)
    mine, its = measured(one), measured(other)
    assert mine.keys() == its.keys()
    assert any(name not in ("eval/loss", "eval/num_targets") for _, name in mine)
    for (step, name), value in mine.items():
        assert its[step, name] == pytest.approx(value, rel=2e-6, abs=LOOSE.get(name, 2e-5)), (step, name)
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys()
    assert max(abs(mine[name] - its[name]).max() for name in mine) < 2e-5


@pytest.mark.parametrize("task", EACH_LOSS)
def test_two_processes_and_any_micro_batches_learn_what_one_process_learns(tmp_path, task):
    one = trained(tmp_path, task, "one")
    large = trained(tmp_path, task, "large", "machine.micro_batch=8")
    steps = [json.loads((folder / "plan.json").read_text())["micro_batch_tokens"] for folder in (one, large)]
    assert steps[0] < steps[1]
    compare(one, large)
    two = trained(tmp_path, task, "two", "--processes", "2")
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    compare(one, two)


@pytest.mark.parametrize("task", EACH)
def test_without_a_recipe_one_is_written_that_gives_the_same_bits(tmp_path, task):
    data = rows_file(tmp_path, task)
    options = ["--task", task, "--model", model_of(task), "--data", str(data), "--name", "bare"]
    run(tmp_path, "finetune", *options, "--runs", str(tmp_path / "runs"))
    bare = folder_of(tmp_path, "bare")
    for written in ("recipe.yaml", "resolved.yaml") if task == "cls" else ("recipe.yaml",):
        place = tmp_path / written
        run(tmp_path, "finetune", str(bare / written), "--runs", str(place / "runs"))
        again = folder_of(place, "bare")
        assert same_bits(weights(again), weights(bare))
        assert measured(again) == measured(bare)
