"""Sweeps: the space as typed, what is tried next, what is given up, and going on; trials by a quick stand-in."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tuning import model, recipe

from llmkit.errors import ExitCode, MissingError, RecipeError, RunError, UsageError
from llmkit.recipe import load_recipe
from llmkit.recipe.space import parse_axes
from llmkit.report.console import make_reporter
from llmkit.run import sweep as module
from llmkit.run.folders import Options
from llmkit.run.search import Trial, is_hopeless, ranked, suggest
from llmkit.run.sweep import make_search, sweep

LR = "finetune.train.optim.lr=1e-5..1e-1:log"
FAKE = """
import json, os, sys, time
from math import log10
from pathlib import Path

words = dict(word.split("=", 1) for word in sys.argv[3:] if "=" in word)
runs = Path(sys.argv[sys.argv.index("--runs") + 1])
folder = runs / words["name"] / "finetune"
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
lr = float(words["finetune.train.optim.lr"])
with open(folder / "starts", "a") as file:
    file.write(os.environ.get("OMP_NUM_THREADS", "-") + "\\n")
if lr > float(os.environ.get("FAILS_ABOVE", "1")):
    print("error: out of memory", file=sys.stderr)
    sys.exit(1)
accuracy = 1 - abs(log10(lr) + 3) / 4  # best at 1e-3
with open(folder / "metrics.jsonl", "w") as file:
    for step in (0, 5, 10):
        file.write(json.dumps({"step": step, "eval/accuracy": accuracy * step / 10}) + "\\n")
        file.flush()
        time.sleep(float(os.environ.get("SECONDS", "0")) if step == 5 else 0)
(folder / "report.json").write_text(json.dumps({"final": {"eval/accuracy": accuracy}, "headline": {"seconds": 1.0}}))
"""


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Makes the search of a recipe whose trials a quick script carries out."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(module, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.02)
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps(recipe(tmp_path, "cls", "toy")))

    def make(*words, trials=6, **more):
        return make_search(str(path), words or (LR,), trials=trials, runs=tmp_path / "runs", **more)

    return make


def carry_out(search, folder, **options):
    return sweep(search, Options(runs=folder / "runs", **options), make_reporter(quiet=True))


def found(folder):
    return json.loads((folder / "runs" / "toy" / "sweep" / "sweep.json").read_bytes())["trials"]


# --- the space ------------------------------------------------------------------------------------------------


def test_ranges_and_choices_are_told_from_plain_settings():
    words = ["a.lr=1e-5..1e-3:log", "a.rank=4|8|16", "a.layers=0..6", "a.share=0.0..0.5:0.1", "seed=7"]
    (lr, rank, layers, share), others = parse_axes(words)
    assert (lr.low, lr.high, lr.log, lr.whole) == (1e-5, 1e-3, True, False)
    assert rank.values == ("4", "8", "16")
    assert (layers.low, layers.high, layers.whole, layers.log) == (0, 6, True, False)
    assert (share.step, share.whole) == (0.1, False)
    assert others == ["seed=7"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=7"], "nothing to search"),
        (["a=3..1"], "3 is not below 1"),
        (["a=0..1:log"], "a logarithm needs numbers above 0"),
        (["a=0..4:9"], "steps of 9 do not fit"),
        (["a=1..2..3"], "not a range"),
        (["a=1..x"], "not a range"),
        (["a=1|1"], "a value is empty or there twice"),
        (["a=1|"], "a value is empty or there twice"),
        (["a=1|2", "a=1..2"], "a is searched twice"),
    ],
)
def test_what_is_no_space_is_refused(words, said):
    with pytest.raises(UsageError) as caught:
        parse_axes(words)
    assert said in caught.value.message


# --- what comes next ------------------------------------------------------------------------------------------


def test_settings_are_a_function_of_the_trials_before_and_the_seed():
    axes, _ = parse_axes([LR, "a.rank=4|8|16", "a.n=8..64:8"])
    first = [suggest(axes, [], seed=1, lower=False) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0] != suggest(axes, [], seed=2, lower=False)
    trials = []
    for number in range(1, 25):
        params = suggest(axes, trials, seed=1, lower=False)
        assert 1e-5 <= params["finetune.train.optim.lr"] <= 1e-1
        assert params["a.rank"] in ("4", "8", "16")
        assert params["a.n"] % 8 == 0
        trials.append(Trial(number, params, "done", float(number)))
    assert len({trial.params["finetune.train.optim.lr"] for trial in trials}) > 20


def test_what_is_found_good_is_searched_more_closely():
    """After the random ones, TPE looks near the best: 16 of them are nearer to it than 10 random ones, by median."""
    from math import log10
    from statistics import median

    axes, _ = parse_axes([LR])
    trials = []
    for number in range(1, 27):
        params = suggest(axes, trials, seed=3, lower=True)
        off = abs(log10(params["finetune.train.optim.lr"]) + 3)
        trials.append(Trial(number, params, "done", off))
    values = [trial.value for trial in trials]
    assert median(values[10:]) < median(values[:10]) / 2


def done(number, **curve):
    return Trial(number, {}, "done", 0.0, {int(step[1:]): value for step, value in curve.items()})


def test_what_is_worse_than_half_of_the_others_by_that_step_is_hopeless():
    others = [done(1, s2=0.5, s4=0.6), done(2, s2=0.4, s4=0.9), done(3, s2=0.1, s4=0.9), done(4, s2=0.2)]
    assert not is_hopeless({2: 0.31}, others, lower=False)  # the median of 0.5, 0.4, 0.1, 0.2 is 0.3
    assert is_hopeless({2: 0.29}, others, lower=False)
    assert not is_hopeless({2: 0.31, 3: 0.1}, others, lower=False)  # its best counts
    assert is_hopeless({2: 0.31, 4: 0.5}, others, lower=False)  # by step 4: 0.6, 0.9, 0.9, 0.2
    assert not is_hopeless({2: 0.29}, others, lower=True)
    assert not is_hopeless({2: 0.29}, others[:3], lower=False)  # too few to say
    assert not is_hopeless({}, others, lower=False)


def test_the_best_comes_first_and_what_failed_last():
    trials = [
        Trial(1, {}, "failed"),
        Trial(2, {}, "done", 0.2),
        Trial(3, {}, "pruned", 0.9),
        Trial(4, {}, "done", 0.4),
    ]
    assert [trial.number for trial in ranked(trials, lower=False)] == [4, 2, 3, 1]
    assert [trial.number for trial in ranked(trials, lower=True)] == [2, 4, 3, 1]


# --- whole sweeps ---------------------------------------------------------------------------------------------


def test_a_sweep_finds_the_best_and_writes_its_recipe(search, tmp_path):
    result = carry_out(search(prune=False), tmp_path)
    trials = found(tmp_path)
    values = [trial["value"] for trial in trials]
    assert [trial["state"] for trial in trials] == ["done"] * 6
    assert result.summary["best"]["value"] == max(values)
    best = trials[values.index(max(values))]
    text = (tmp_path / "runs" / "toy" / "sweep" / "best.yaml").read_text()
    assert "name: toy-best" in text
    again = load_recipe(tmp_path / "runs" / "toy" / "sweep" / "best.yaml").recipe
    assert again.finetune.train.optim.lr == best["params"]["finetune.train.optim.lr"]
    assert [row[0] for row in result.table[1:]] == [
        f"trial-{trial['number']:03d}" for trial in sorted(trials, key=lambda one: -one["value"])
    ]
    assert best["curve"] == [[5, max(values) / 2], [10, max(values)]]
    page = (tmp_path / "runs" / "toy" / "sweep" / "report.html").read_text()
    assert "eval/accuracy by log10 of finetune.train.optim.lr" in page
    assert not list((tmp_path / "runs" / "toy").glob("trial-*/finetune/checkpoints"))


def test_the_same_command_goes_on_and_finds_what_one_session_finds(search, tmp_path):
    carry_out(search(trials=6, prune=False), tmp_path)
    whole = found(tmp_path)
    carry_out(search(trials=3, prune=False), tmp_path, fresh=True)
    assert len(found(tmp_path)) == 3
    carry_out(search(trials=6, prune=False), tmp_path)
    assert found(tmp_path) == whole
    starts = [len(path.read_text().split()) for path in (tmp_path / "runs" / "toy").glob("*/finetune/starts")]
    assert starts == [1] * 6  # no trial twice


def test_a_trial_that_was_cut_short_goes_on_with_its_own_settings(search, tmp_path):
    carry_out(search(trials=2), tmp_path)
    path = tmp_path / "runs" / "toy" / "sweep" / "sweep.json"
    record = json.loads(path.read_bytes())
    whole = json.loads(path.read_bytes())
    record["trials"][1] |= {"state": "running", "value": None, "curve": []}
    path.write_text(json.dumps(record))
    carry_out(search(trials=2), tmp_path)
    assert json.loads(path.read_bytes()) == whole


def test_failed_trials_are_failures_and_shown(search, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS_ABOVE", "1e-2")
    result = carry_out(search(trials=8), tmp_path)
    failed = [trial for trial in found(tmp_path) if trial["state"] == "failed"]
    assert 0 < len(failed) < 8
    assert result.summary["failed"] == len(failed)
    assert all(trial["error"] == "error: out of memory" for trial in failed)
    assert [row[1] for row in result.table].count("failed") == len(failed)
    assert "out of memory" in (tmp_path / "runs" / "toy" / "sweep" / "report.html").read_text()


def test_when_none_works_it_stops_after_a_few_and_fails(search, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS_ABOVE", "0")
    with pytest.raises(
        RunError, match="not one of 3 trials was finished; the last said: error: out of memory"
    ):
        carry_out(search(trials=20), tmp_path)


def test_several_at_a_time_share_the_cores(search, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    carry_out(search(trials=4, jobs=2), tmp_path)
    threads = [path.read_text().split() for path in (tmp_path / "runs" / "toy").glob("*/finetune/starts")]
    assert threads == [["2"]] * 4


def test_a_hopeless_trial_is_stopped(search, tmp_path, monkeypatch):
    carry_out(search(trials=4), tmp_path)
    monkeypatch.setenv("SECONDS", "30")  # it would take a minute
    monkeypatch.setattr(module, "is_hopeless", lambda curve, others, lower: bool(curve))
    carry_out(search(trials=5), tmp_path)
    last = found(tmp_path)[-1]
    assert last["state"] == "pruned"
    assert last["curve"] == [[5, last["value"]]]


def test_what_is_stopped_leaves_no_process_and_a_trial_to_go_on_with(search, tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    started = []
    popen = subprocess.Popen

    def note(*words, **more):
        started.append(popen(*words, **more))
        return started[-1]

    def interrupt(seconds):
        if started and (tmp_path / "runs" / "toy" / "trial-001" / "finetune" / "metrics.jsonl").exists():
            raise KeyboardInterrupt
        time.sleep(0.01)

    monkeypatch.setattr(module.subprocess, "Popen", note)
    monkeypatch.setattr(module, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        carry_out(search(trials=5), tmp_path)
    assert [process.returncode for process in started] == [-signal.SIGTERM]
    assert [trial["state"] for trial in found(tmp_path)] == ["running"]


def test_another_search_in_the_same_place_is_refused(search, tmp_path):
    carry_out(search(trials=1), tmp_path)
    with pytest.raises(UsageError, match="the search has changed since it began: space") as caught:
        carry_out(search("finetune.train.optim.lr=1e-5..1e-2:log", trials=1), tmp_path)
    assert "--fresh" in caught.value.hint


def test_an_edited_recipe_is_another_search(search, tmp_path):
    carry_out(search(trials=1), tmp_path)
    path = tmp_path / "toy.yaml"
    before = path.read_text()
    edited = json.loads(before)
    edited["finetune"]["train"]["length"] = "7 steps"
    path.write_text(json.dumps(edited))
    with pytest.raises(UsageError, match="has changed since it began: settings of the recipe") as caught:
        carry_out(search(trials=1), tmp_path)
    assert "--fresh" in caught.value.hint
    path.write_text(before)
    carry_out(search(trials=1), tmp_path)


def test_other_rows_in_the_same_file_are_another_search(search, tmp_path):
    carry_out(search(trials=1), tmp_path)
    rows = Path(json.loads((tmp_path / "toy.yaml").read_text())["finetune"]["data"]["files"])
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[-1] + "\n")
    with pytest.raises(UsageError, match="has changed since it began: files of rows"):
        carry_out(search(trials=1), tmp_path)


@pytest.mark.parametrize(
    ("code", "state"),
    [(1, "failed"), (2, "failed"), (-9, "failed"), (75, "pruned"), (130, "pruned"), (-15, "pruned")],
)
def test_a_trial_that_fails_while_it_stops_has_failed(search, tmp_path, code, state):
    work = module._Sweep(search(), Options(runs=tmp_path), make_reporter(quiet=True), tmp_path / "toy")
    trial = Trial(1, {}, "running", curve={5: 0.5})
    (tmp_path / "toy" / "sweep").mkdir(parents=True)
    work._log(trial).write_text("error: disk full\n")
    process = SimpleNamespace(returncode=code)
    work._judge(module._Running(trial, process, None, 0, given_up=True))
    assert (trial.state, trial.value, trial.error) == (
        (state, None, "error: disk full") if state == "failed" else (state, 0.5, trial.error)
    )


# --- what is refused before anything runs ---------------------------------------------------------------------


def test_every_end_of_the_space_is_tried_on_the_recipe_first(search):
    for word, said in (("finetune.adapter.rnak=4|8", "rank"), ("finetune.adapter.dropout=0.1..1.5", "1.5")):
        with pytest.raises(RecipeError) as caught:
            search(word)
        assert said in caught.value.problems[0]


def test_a_metric_that_the_task_has_not_is_refused(search):
    with pytest.raises(UsageError, match="--metric eval/bleu: not measured of 'cls', though of others"):
        search(metric="eval/bleu")
    assert search().metric == "eval/accuracy"
    assert search(metric="eval/loss").lower


def test_without_optuna_it_says_how_to_get_it(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingError) as caught:
        search()
    assert caught.value.hint == 'pip install "llmkit[sweep]"'
    assert caught.value.exit_code == ExitCode.MISSING


def test_only_fine_tuning_searched_starts_all_trials_from_the_one_model_that_was_pretrained(tmp_path):
    made = recipe(tmp_path, "cls", "toy")
    made["finetune"].pop("model")
    made |= {"tokenize": {}, "pretrain": {"data": {"files": "x.txt"}, "train": {"length": "5 steps"}}}
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(made))
    runs = tmp_path / "runs"
    one = make_search(str(path), [LR], trials=1, runs=runs)
    assert (one.verb, one.section) == ("finetune", "finetune")
    assert one.words == (f"finetune.model.name={runs / 'toy' / 'pretrain' / 'model'}",)
    other = make_search(str(path), ["pretrain.train.optim.lr=1e-5..1e-3:log"], trials=1, runs=runs)
    assert (other.verb, other.section, other.words) == ("run", "finetune", ())


@pytest.mark.slow
def test_real_trials_are_runs_like_any_other(tmp_path, monkeypatch):
    path = tmp_path / "toy.yaml"
    path.write_text(
        json.dumps(recipe(tmp_path, "cls", "toy", finetune__model={"name": kept_model(tmp_path)}))
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = make_search(str(path), [LR, "finetune.adapter.rank=2|4"], trials=2, jobs=2, runs=tmp_path / "runs")
    result = carry_out(one, tmp_path)
    assert [trial["state"] for trial in found(tmp_path)] == ["done", "done"]
    best = tmp_path / "runs" / "toy" / result.summary["best"]["name"] / "finetune"
    report = json.loads((best / "report.json").read_bytes())
    assert report["final"]["eval/accuracy"] == result.summary["best"]["value"]
    assert (best / "model" / "model.safetensors").exists()


def kept_model(folder):
    """A model whose folder is there for other processes too."""
    return shutil.copytree(model("bert"), folder / "base").as_posix()
