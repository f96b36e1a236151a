"""`llmkit pretrain` with `architecture: ngram`: counted by the same command, measured by the same evaluation."""

import json
import math

import numpy as np
import pytest
from training import STEPS, losses, options, recipe, weights

from llmkit.data.shards import TokenShards
from llmkit.errors import InterruptedRunError, RunError, UsageError
from llmkit.evaluate.model import load_model
from llmkit.launch.signals import NOTED
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import evaluate, generate, plan, pretrain, run_all
from llmkit.run.folders import report_of


def ngram(folder, name="counted", **changes):
    model = {"architecture": "ngram", "config": {"order": 3}, "context": 32}
    return load_recipe(recipe(folder, name, **{"pretrain__model": model, **changes}))


def count(folder, name="counted", *, fresh=False, **changes):
    quiet = make_reporter(quiet=True)
    return pretrain(ngram(folder, name, **changes), options(folder, fresh=fresh), quiet).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ngram")


@pytest.fixture(scope="module")
def counted(folder):
    return count(folder, pretrain__train={"length": "1 epochs", "batch": "8 samples"})


def shards_of(run):
    card = json.loads((run / "data.json").read_text())
    cache = run.parents[1] / ".cache" / "shards"
    return [TokenShards.open(cache / source["address"]) for source in card["sources"]]


def test_the_run_folder_is_as_of_any_run(counted):
    assert {"plan.json", "metrics.jsonl", "report.json", "report.html", "model", "samples.jsonl"} <= {
        path.name for path in counted.iterdir()
    }
    report = report_of(counted)
    model = load_model(counted / "model")
    assert report["status"] == "done"
    assert report["model"] == {"model_type": "llmkit-ngram", "num_parameters": model.num_parameters()}
    assert report["plan"]["num_parameters"] == model.num_parameters()
    assert report["headline"]["eval_loss"] == losses(counted, "eval/loss")[report["headline"]["num_steps"]]
    assert report["headline"]["tokens_per_s"] > 0
    assert model.config.order == 3
    assert not (counted / "checkpoints").exists()


def test_its_loss_is_that_of_the_probabilities(counted):
    """By hand, token for token in rows of 32, through the model's own forward."""
    import torch

    [shards] = shards_of(counted)
    stream = shards.split("held_out")
    ids = torch.from_numpy(stream.read(0, stream.num_tokens).astype(np.int64))
    model = load_model(counted / "model")
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        row = ids[start : start + 33]
        log_p = model(row[None, :-1]).logits[0].double()
        nats -= float(log_p.gather(1, row[1:, None]).sum())
    final = report_of(counted)["final"]
    assert final["eval/num_targets"] == len(ids) - 1
    assert final["eval/loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    per_byte = stream.num_bytes / stream.num_tokens
    assert final["eval/bits_per_byte"] == pytest.approx(final["eval/loss"] / math.log(2) / per_byte, rel=1e-9)


def test_it_learns_more_than_how_common_tokens_are(counted):
    report = report_of(counted)
    assert report["final"]["eval/loss"] < report["references"]["guessing by token frequency (unigram)"] - 1


def test_eval_and_generate_take_the_run(counted, folder):
    quiet = make_reporter(quiet=True)
    found = evaluate(str(counted.parent), None, options(folder), quiet)
    assert found.folder == counted.parent / "eval"
    assert found.summary["metrics"]["loss"] == pytest.approx(
        report_of(counted)["final"]["eval/loss"], rel=1e-9
    )
    sampling = ngram(folder).recipe.pretrain.sampling
    kwargs = {"samples": 2, "seed": 1, "runs": folder / "runs", "reporter": quiet}
    first = generate("counted", ["def ", "im"], sampling, **kwargs)
    assert len(first) == 4
    assert first == generate("counted", ["def ", "im"], sampling, **kwargs)
    assert all(one["text"] for one in first)


def test_counting_again_gives_the_same_bits_and_what_is_done_is_found(counted, folder):
    before = weights(counted)
    stamp = (counted / "model" / "model.safetensors").stat().st_mtime_ns
    train = {"length": "1 epochs", "batch": "8 samples"}
    count(folder, pretrain__train=train)
    assert (counted / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    again = weights(count(folder, "again", pretrain__train=train))
    assert before.keys() == again.keys()
    assert all(before[name].tobytes() == again[name].tobytes() for name in before)
    with pytest.raises(RunError, match="seed"):
        count(folder, pretrain__train=train, seed=8)


def test_under_an_epoch_it_counts_the_rows_that_a_network_would_read(counted, folder):
    """20 steps of 8 rows: fewer tokens, fewer n-grams, and no more than the rows have."""
    short = count(folder, "short")
    plan_short, plan_all = (json.loads((run / "plan.json").read_text()) for run in (short, counted))
    assert plan_short["num_steps"] == STEPS
    assert plan_short["num_parameters"] < plan_all["num_parameters"]
    tokens = report_of(short)["headline"]["num_tokens"]
    # A row has 32 tokens of its own, and each run of neighbours one more: its last target.
    assert STEPS * 8 * 32 < tokens <= STEPS * 8 * 33
    assert losses(short, "eval/loss")[STEPS] > report_of(counted)["final"]["eval/loss"]


def test_documents_apart(counted, folder):
    """No n-gram reaches across the end of a document: fewer pairs that begin with it."""
    train = {"length": "1 epochs", "batch": "8 samples"}
    apart = count(folder, "apart", pretrain__isolate_documents=True, pretrain__train=train)
    eos = load_model(apart / "model").config.eos_token_id
    vocab_size = load_model(apart / "model").config.vocab_size

    def after_the_end(run):
        keys = weights(run)["orders.0.keys_G"]
        return int((keys // vocab_size == eos).sum())

    assert after_the_end(apart) == 0 < after_the_end(counted)


def test_stopped_it_says_so_and_begins_again(folder, monkeypatch):
    """The signal came before: counting looks for it, and leaves nothing that looks done."""
    monkeypatch.setattr("llmkit.launch.signals.NOTED", [15])
    with pytest.raises(InterruptedRunError, match="SIGTERM while counting"):
        count(folder, "stopped")
    NOTED.clear()
    monkeypatch.undo()
    place = folder / "runs" / "stopped" / "pretrain"
    assert report_of(place)["status"] == "interrupted"
    assert report_of(count(folder, "stopped"))["status"] == "done"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrain__model": {"architecture": "ngram", "config": {"order": 0}}}, "order is 0"),
        ({"pretrain__model": {"architecture": "ngram", "config": {"order": 11}}}, "order is 11"),
        (
            {"pretrain__model": {"architecture": "ngram", "config": {"hidden_size": 8}}},
            "no field 'hidden_size'",
        ),
    ],
)
def test_what_it_cannot_be_is_refused_in_the_plan(folder, changes, words):
    with pytest.raises(UsageError, match=words):
        plan(ngram(folder, "refused", **changes), options(folder))


def test_what_was_counted_is_not_trained_further(folder, counted):
    model = {"name": str(counted / "model"), "context": 32}
    with pytest.raises(UsageError, match="cannot be trained any further"):
        plan(ngram(folder, "further", pretrain__model=model), options(folder))
    written = {"config": {"model_type": "llmkit-ngram", "order": 2}, "context": 32}
    assert plan(ngram(folder, "written", pretrain__model=written), options(folder)).flops_per_token == 0


def test_the_plan_counts_no_flops_and_says_what_means_nothing(folder):
    found = plan(ngram(folder, machine={"device": "auto"}), options(folder, processes=4))
    assert (found.device, found.world_size, found.flops_per_token, found.checkpoint_bytes) == ("cpu", 1, 0, 0)
    assert any("train.optim" in note for note in found.notes)
    unlimited = plan(ngram(folder, pretrain__train={"length": "1h"}), options(folder))
    assert unlimited.num_steps * unlimited.rows_per_step >= unlimited.num_rows_per_epoch
    assert not unlimited.deferred


def test_variants_are_run_in_turn_and_compared(folder):
    """A counted and a trained one: each a whole run; done ones are skipped; the table in order of bits per byte."""
    variants = {
        "net": {"seed": 5},
        "counted": {
            "pretrain": {"model": {"architecture": "ngram", "config": {"order": 2}, "dropout": None}}
        },
    }
    loaded = load_recipe({**recipe(folder, "two"), "variants": variants})
    quiet = make_reporter(quiet=True)
    result = run_all(loaded, options(folder), quiet)
    home = folder / "runs" / "two"
    assert result.folder == home
    reports = {name: report_of(home / name / "pretrain") for name in variants}
    assert {name: report["name"] for name, report in reports.items()} == {
        "net": "two/net",
        "counted": "two/counted",
    }
    rows = result.summary["variants"]
    assert [row["bits_per_byte"] for row in rows] == sorted(
        report["final"]["eval/bits_per_byte"] for report in reports.values()
    )
    assert len(result.table) == 3
    assert {path.name for path in home.iterdir()} >= {"net", "counted", "report.json", "report.html"}
    assert (home / "net" / "eval" / "report.json").exists()
    stamps = {name: (home / name / "pretrain" / "report.json").stat().st_mtime_ns for name in variants}
    assert run_all(loaded, options(folder), quiet).table == result.table
    assert stamps == {
        name: (home / name / "pretrain" / "report.json").stat().st_mtime_ns for name in variants
    }
    found = evaluate("two/net", None, options(folder), quiet)
    assert found.folder == home / "net" / "eval"
    assert found.summary["metrics"]["loss"] == pytest.approx(reports["net"]["final"]["eval/loss"], rel=1e-6)
