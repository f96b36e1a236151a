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
from llmkit.run.folders import anchored, placed
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


def _paths(recipe):
    """What a recipe begins with or learns from, by its section."""
    tuned, begun = recipe.finetune, recipe.pretrain
    return [tuned.adapter.start, tuned.distil.teacher, begun.model.embeddings, begun.distil.teacher]


def test_a_teacher_an_adapter_and_word_vectors_are_found_from_the_recipe_too(tmp_path, monkeypatch):
    """From the current folder if something is there, else from the recipe's; what is nowhere may be on the Hub."""
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home / "teacher", home / "tuned/finetune/adapter", away):
        folder.mkdir(parents=True)
    (home / "tuned/finetune/adapter/adapter_config.json").write_text("{}")
    (home / "vectors.txt").write_text("")
    made = {
        "llmkit": 1,
        "tokenize": {"vocab_size": 300},
        "pretrain": {
            "objective": "mlm",
            "model": {"embeddings": "vectors.txt"},
            "data": {"files": "*.txt"},
            "train": {"length": "1 epochs", "batch": "8 samples"},
            "distil": {"teacher": "owner/name"},
        },
        "finetune": {
            "task": "sft",
            "data": {"files": "chats.jsonl"},
            "adapter": {"start": "tuned"},
            "distil": {"teacher": "teacher"},
        },
    }
    (home / "my.json").write_text(json.dumps(made))
    monkeypatch.chdir(away)
    loaded = load_recipe(home / "my.json")
    wanted = [
        str(home / "tuned/finetune/adapter"),
        str(home / "teacher"),
        str(home / "vectors.txt"),
        "owner/name",
    ]
    assert _paths(placed(loaded).recipe) == wanted
    assert _paths(anchored(loaded).recipe) == wanted
    (away / "teacher").mkdir()
    (away / "vectors.txt").write_text("")
    here = [wanted[0], "teacher", "vectors.txt", "owner/name"]
    assert _paths(placed(loaded).recipe) == here
    assert _paths(anchored(loaded).recipe) == [
        wanted[0],
        str(away / "teacher"),
        str(away / "vectors.txt"),
        "owner/name",
    ]
    again = placed(loaded)
    assert placed(again) is again


@pytest.mark.slow
def test_an_adapter_goes_on_from_a_recipe_in_another_folder(tmp_path, monkeypatch):
    from tuning import finetune
    from tuning import recipe as tuning_recipe

    pytest.importorskip("peft")
    lora = {"method": "lora", "rank": 2, "merge": False}
    first = finetune(tmp_path, "sft", "first", finetune__adapter=lora, finetune__train__length="2 steps")
    again = tuning_recipe(
        tmp_path,
        "sft",
        "again",
        finetune__adapter={**lora, "start": "runs/first"},
        finetune__train={"length": "2 steps", "batch": "12 samples", "optim": {"lr": 1e-9}},
    )
    path = tmp_path / "again.json"
    path.write_text(json.dumps(again))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    from llmkit.run import finetune as verb

    made = verb(load_recipe(path), options(tmp_path), make_reporter(quiet=True)).folder
    from safetensors.torch import load_file

    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, made))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
    assert str(first / "adapter") in (made / "resolved.yaml").read_text()
