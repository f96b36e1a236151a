"""Back-translation through own runs: made once and kept, the same after a stop, and picked by the seed of a row."""

import json
from pathlib import Path

import numpy as np
import pytest
from training import losses, options, same_bits, weights
from tuning import finetune, recipe, rows_file

from llmkit.data.augment import Augmented
from llmkit.data.augment.paraphrases import FILE, Paraphrases, as_lines
from llmkit.errors import MissingError, UsageError
from llmkit.recipe import load_recipe
from llmkit.recipe.tasks import Augment
from llmkit.report.console import make_reporter
from llmkit.run import back_translate
from llmkit.run.folders import find_model
from llmkit.run.rows import prepare_rows
from llmkit.run.tasks import predict


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two tiny runs that write a text for a text."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("there", 1), ("back", 2)):
        finetune(
            folder, "seq2seq", name, seed=seed, finetune__train__length="30 steps",
            finetune__seq2seq={"prefix": f"{name}: ", "max_target": 12, "num_beams": 1, "write": False},
            finetune__checkpoint__every="never", finetune__eval__every="never",
        )  # fmt: skip
    return folder


def changed_recipe(folder, **more):
    step = {"method": "back_translate", "through": ["there", "back"], "rows": 0.5, **more}
    return load_recipe(recipe(folder, "cls", "changed", finetune__augment=[step]))


def made(folder, loaded):
    rows = prepare_rows(loaded, options(folder), make_reporter(quiet=True)).folder
    (kept,) = back_translate.paraphrase(
        loaded.recipe.finetune, rows, options(folder), make_reporter(quiet=True)
    )
    return kept


def lines_of(kept):
    return [json.loads(line) for line in (kept / FILE).read_text("utf-8").splitlines()]


def test_every_text_to_learn_is_translated_there_and_back_and_kept(place, monkeypatch):
    monkeypatch.setattr(back_translate, "_fills_up", lambda run, text: False)
    loaded = changed_recipe(place)
    kept = made(place, loaded)
    lines = lines_of(kept)
    assert sum(one["paraphrase"] is not None for one in lines) > 10
    learned = {line["text"] for line in map(json.loads, (rows_of(place, loaded) / "train.jsonl").open())}
    assert {one["text"] for one in lines} == learned
    for one in lines[:3]:
        there = predict("there", [{"source": one["text"]}], runs=place / "runs")[0]["text"]
        back = predict("back", [{"source": there}], runs=place / "runs")[0]["text"]
        assert one["paraphrase"] == (back if back.strip() and back != one["text"] else None)
    monkeypatch.setattr(back_translate, "load_core", None)
    assert made(place, loaded) == kept, "nothing is translated again"


def rows_of(place, loaded):
    return prepare_rows(loaded, options(place), make_reporter(quiet=True)).folder


@pytest.mark.slow
def test_after_a_stop_the_rest_is_translated_and_the_file_is_the_same(place, monkeypatch):
    monkeypatch.setattr(back_translate, "PART", 10)
    loaded = changed_recipe(place)
    whole = made(place, loaded)
    before = (whole / FILE).read_bytes()
    whole.rename(whole.with_name("aside"))
    real, calls = back_translate._there_and_back, []

    def stopped(cores, texts):
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(cores, texts)

    monkeypatch.setattr(back_translate, "_there_and_back", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(place, loaded)
    parts = whole.with_name(f"{whole.name}.parts")
    assert len(list(parts.iterdir())) == 2
    assert made(place, loaded) == whole
    assert len(calls) == 3 + len(before.splitlines()) // 10 + bool(len(before.splitlines()) % 10) - 2
    assert (whole / FILE).read_bytes() == before
    assert not parts.exists()


def test_another_model_or_way_of_writing_has_another_place(place, monkeypatch):
    loaded = changed_recipe(place)
    rows, runs = rows_of(place, loaded), back_translate.translators(*step_of(loaded), place / "runs")
    own = back_translate._address("cls", runs, rows)
    assert back_translate._address("cls", runs[::-1], rows) != own
    monkeypatch.setattr(back_translate, "teacher_weights", lambda name: "others")
    assert back_translate._address("cls", runs, rows) != own


def step_of(loaded):
    return tuple(loaded.recipe.finetune.augment)


def test_what_says_nothing_new_is_counted_and_stays():
    assert back_translate._judged("a cat", " a cat ", False) == (None, "as it was")
    assert back_translate._judged("a cat", " ", False) == (None, "empty")
    assert back_translate._judged("a cat", "one cat", True) == (None, "too long")
    assert back_translate._judged("a cat", "one cat", False) == ("one cat", "")
    told = back_translate._told({"texts": 10, "as it was": 2, "empty": 1, "too long": 0})
    assert told == (
        "back-translation: 7 of 10 texts are said otherwise; these stay: 2 came back as they were, "
        "1 came back empty"
    )


def test_a_share_of_rows_takes_its_paraphrase_by_the_rows_seed(tmp_path):
    (tmp_path / FILE).write_bytes(as_lines(["a", "b"], [("A", ""), (None, "empty")]))
    known = Paraphrases(tmp_path)
    step = Augment(method="back_translate", through=["x", "y"], rows=0.3)

    class Nothing:
        mask_token_id, all_special_ids = None, ()

    def encode(row):
        return {"input_ids": row["text"]}

    steps = [step, Augment(method="swap", rows=1.0)]
    augmented = Augmented(
        encode, steps, task="cls", tokenizer=Nothing(), language="en", paraphrases=[known.of]
    )
    found = [augmented({"text": "a", "seed": seed})["input_ids"] for seed in range(1000)]
    assert found == [augmented({"text": "a", "seed": seed})["input_ids"] for seed in range(1000)]
    picked = [np.random.default_rng([seed, 0]).random() < 0.3 for seed in range(1000)]
    assert found == ["A" if one else "a" for one in picked]
    assert {augmented({"text": "b", "seed": seed})["input_ids"] for seed in range(50)} == {"b"}


def test_runs_that_do_not_translate_are_refused(place):
    finetune(place, "cls", "judges", finetune__train__length="1 steps", finetune__eval__every="never")
    with pytest.raises(UsageError, match="judges, which is trained for cls"):
        made(place, changed_recipe(place, through=["there", "judges"]))
    with pytest.raises(MissingError):
        made(place, changed_recipe(place, through=["there", "nowhere"]))


@pytest.mark.slow
def test_a_run_learns_from_paraphrases_the_same_each_time(place, monkeypatch):
    monkeypatch.setattr(back_translate, "_fills_up", lambda run, text: False)
    short = {"finetune__train__length": "2 steps", "finetune__model__dropout": 0.0}
    steps = [{"method": "back_translate", "through": ["there", "back"], "rows": 1.0}]
    plain = finetune(place, "cls", "plain", **short)
    one = finetune(place, "cls", "one", **short, finetune__augment=steps)
    two = finetune(place, "cls", "two", **short, finetune__augment=steps, machine__loader_workers=1)
    assert losses(plain)[1] != losses(one)[1]
    assert losses(plain, "eval/loss")[0] == losses(one, "eval/loss")[0]
    assert same_bits(weights(one), weights(two))
    assert Path(find_model("one", place / "runs")).is_dir()
    assert rows_file(place, "cls").is_file()
