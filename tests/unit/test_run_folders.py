"""Where things are and what they are called: models by any name, evaluations apart, tokenizers by what made them."""

import json

import pytest
from training import options, pretrain, recipe

from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine
from llmkit.errors import MissingError
from llmkit.recipe import load_recipe
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Sampling, Source
from llmkit.report.console import make_reporter
from llmkit.run import evaluate, find_model, generate, tokenize
from llmkit.train.checkpoint import saved_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pretrain(folder)
    return folder


@pytest.mark.parametrize("word", ["tiny", "runs/tiny", "runs/tiny/pretrain", "runs/tiny/pretrain/model"])
def test_a_model_is_found_by_any_of_its_names(trained, monkeypatch, word):
    monkeypatch.chdir(trained)
    assert find_model(word, trained / "runs").resolve() == trained / "runs/tiny/pretrain/model"


def test_a_missing_model_names_those_there_are(trained):
    with pytest.raises(MissingError) as caught:
        find_model("tyni", trained / "runs")
    assert "tiny" in caught.value.hint


def test_other_text_is_measured_apart_from_what_was_held_out(trained):
    model = str(trained / "runs/tiny/pretrain/model")
    quiet = make_reporter(quiet=True)
    held_out = evaluate(model, None, options(trained), quiet)
    assert held_out.folder == trained / "runs/tiny/eval"
    text = trained / "other.txt"
    text.write_text("def other(self):\n    return self.other\n" * 40)
    made = {"llmkit": 1, "name": "anything", "eval": {"data": {"files": str(text)}}}
    other = evaluate(model, load_recipe(made), options(trained), quiet)
    assert other.folder.parent == trained / "runs/tiny"
    assert other.folder.name.startswith("eval-")
    report = json.loads((held_out.folder / "report.json").read_text())
    assert report["final"]["eval/loss"] == pytest.approx(held_out.summary["metrics"]["loss"])
    assert other.summary["metrics"]["loss"] != held_out.summary["metrics"]["loss"]


def test_a_tokenizer_is_made_once_and_found_by_what_made_it(tmp_path):
    quiet = make_reporter(quiet=True)
    first = tokenize(load_recipe(recipe(tmp_path)), options(tmp_path), quiet).summary["tokenizer"]
    again = tokenize(load_recipe(recipe(tmp_path, "another")), options(tmp_path), quiet).summary["tokenizer"]
    assert (first["found"], again["found"]) == (False, True)
    smaller = recipe(tmp_path, tokenize__vocab_size=300)
    changed = tokenize(load_recipe(smaller), options(tmp_path), quiet).summary["tokenizer"]
    assert (changed["found"], changed["vocab_size"]) == (False, 300)
    assert len(list((tmp_path / "runs/.cache/tokenizers").glob("[0-9a-f]*"))) == 2


def test_samples_of_each_prompt_come_together_and_a_long_one_is_told(trained, capsys):
    written = generate(
        "tiny",
        ["def a", "x " * 100],
        Sampling(max_new_tokens=4),
        samples=2,
        seed=1,
        runs=trained / "runs",
        reporter=make_reporter(),
    )
    assert [one["prompt"] for one in written] == ["def a", "def a", "x " * 100, "x " * 100]
    assert "longer than the model reads" in capsys.readouterr().err


def test_the_plan_guesses_that_packed_files_hold_a_few_times_their_size(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.txt.gz").write_bytes(b"x" * 100)
    sources = [Source(files=[str(tmp_path / name)]) for name in ("a.txt", "b.txt.gz")]
    text = Corpus(sources, Prepare(), 0.1, tmp_path, tmp_path / "cache", Engine())
    assert text.sizes() == [("a", 100), ("b", 100)]
    assert text.expected_bytes() == 400


def test_a_small_source_is_read_no_more_often_than_it_may_be(tmp_path):
    (tmp_path / "few.txt").write_text("one line of a small source\n" * 60)
    (tmp_path / "many.txt").write_text("another line of a large source, and more of it\n" * 2000)
    data = [
        {
            "name": "few",
            "files": str(tmp_path / "few.txt"),
            "documents": "line",
            "weight": 0.9,
            "max_epochs": 2,
        },
        {"name": "many", "files": str(tmp_path / "many.txt"), "documents": "line", "weight": 0.1},
    ]
    folder = pretrain(tmp_path, pretrain__data=data, pretrain__held_out=0)
    few, many = saved_record(folder)["identity"]["weights"]
    sources = json.loads((folder / "data.json").read_text())["sources"]
    rows = (sources[0]["num_tokens"] - 1) // 32
    assert few / (few + many) == pytest.approx(2 * rows / (20 * 8))
    assert few / (few + many) < 0.9
