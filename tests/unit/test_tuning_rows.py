"""The rows of a recipe: found again, never stale; labels, limits and faults told."""

import json
import shutil

import pytest
from training import options
from tuning import finetune, model, recipe, rows_file

from llmkit.data.records.tags import completed
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import finetune as verb
from llmkit.run import plan_finetune
from llmkit.run.rows import prepare_rows, read_and_measure


def prepared(folder, task="cls", **changes):
    loaded = load_recipe(recipe(folder, task, **changes))
    return prepare_rows(loaded, options(folder), make_reporter(quiet=True))


def copy_of_model(folder, labels):
    place = folder / "other"
    shutil.copytree(model("bert"), place)
    config = json.loads((place / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_rows_are_found_again_and_belong_to_their_settings(tmp_path):
    one = prepared(tmp_path)
    assert prepared(tmp_path).folder == one.folder
    assert prepared(tmp_path, finetune__held_out=0.3).folder != one.folder
    assert prepared(tmp_path, finetune__model__context=32).folder != one.folder


def test_a_model_that_knows_the_classes_keeps_its_order_whatever_is_in_the_cache(tmp_path):
    plain = prepared(tmp_path).labels
    turned = tuple(reversed(plain))
    place = copy_of_model(tmp_path, turned)
    assert prepared(tmp_path, finetune__model__name=str(place)).labels == turned
    assert prepared(tmp_path).labels == plain


def test_a_tag_that_the_scheme_has_besides_may_come_in_other_rows():
    assert completed(("O", "B-a", "I-a", "B-b")) == ("O", "B-a", "I-a", "B-b", "I-b")
    assert completed(("O", "B-a")) == ("O", "B-a", "I-a")
    assert completed(("O", "a", "b")) == ("O", "a", "b")
    assert set(completed(("O", "S-a", "B-b", "I-b", "E-b"))) == {
        "O", "S-a", "B-a", "I-a", "E-a", "S-b", "B-b", "I-b", "E-b",
    }  # fmt: skip


def test_a_label_of_other_rows_that_is_not_learned_is_named_with_its_place(tmp_path):
    path = tmp_path / "dev.csv"
    path.write_text("text,label\nred cat,never seen\n")
    with pytest.raises(DataError, match=r"dev\.csv:2: the label 'never seen' is not among") as caught:
        prepared(tmp_path, finetune__validation={"files": str(path)})
    assert "finetune.cls.labels" in caught.value.hint


@pytest.mark.parametrize("name", ["/nowhere/at/all", "runs/none", "./none"])
def test_a_model_that_is_not_there_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(MissingError, match="no folder with a model"):
        prepared(tmp_path, finetune__model__name=name)


def test_a_task_that_writes_another_way_is_told_what_would_fit(tmp_path):
    with pytest.raises(UsageError, match="`seq2seq` needs an encoder-decoder or a causal") as caught:
        prepared(tmp_path, "seq2seq", finetune__model__name=model("bert"))
    assert caught.value.hint == "name such a model"
    with pytest.raises(UsageError, match="`sft` needs a causal") as caught:
        prepared(tmp_path, "sft", finetune__model__name=model("t5"))
    assert "the task seq2seq" in caught.value.hint


def test_going_on_with_pre_training_is_planned_as_that(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the red cat sat on the green mat\n" * 400)
    made = {
        "llmkit": 1,
        "name": "on",
        "finetune": {
            "task": "clm",
            "model": {"name": model("llama"), "context": 32},
            "data": {"files": str(text)},
            "train": {"length": "2 steps", "batch": "4 samples"},
        },
        "machine": {"device": "cpu"},
    }
    plan = plan_finetune(load_recipe(made), options(tmp_path), make_reporter(quiet=True))
    assert (plan.num_steps, plan.rows_per_step, plan.context) == (2, 4, 32)


def test_rows_whose_answers_were_all_cut_off_may_come_first(tmp_path):
    """The longest rows are computed first: that nothing is learned of these says nothing of the others."""
    rows = rows_file(tmp_path, "sft").read_text()
    long = {
        "messages": [{"role": "user", "content": "red cat " * 200}, {"role": "assistant", "content": "no"}]
    }
    path = tmp_path / "mixed.jsonl"
    path.write_text(rows + (json.dumps(long) + "\n") * 40)
    folder = finetune(
        tmp_path, "sft", "mixed", finetune__data={"files": str(path)}, machine__micro_batch=1,
        finetune__train__length="1 steps",
    )  # fmt: skip
    assert (folder / "model").is_dir()


def test_answers_that_melt_into_the_prompt_are_counted_and_told(tmp_path):
    said = [("user", "Where?"), ("assistant", " " * 8 + "There."), ("user", "Far?"), ("assistant", "No.")]
    path = tmp_path / "melting.jsonl"
    rows = [
        [
            {"role": role, "content": f"{text}{n}" if role == "user" else text}
            for role, text in said[0 if n % 4 else 2 :]
        ]
        for n in range(12)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    loaded = load_recipe(recipe(tmp_path, "sft", finetune__data={"files": str(path)}))
    notes = []
    facts = read_and_measure(loaded, options(tmp_path), notes.append).facts
    counts = [facts[part]["num_passed_over"] for part in ("train", "held_out")]
    assert sum(counts) == 9
    assert [note for note in notes if "characters make one token" in note] == [
        "9 answers are not learned: their first characters make one token with the end of the prompt"
    ]
    plain = read_and_measure(load_recipe(recipe(tmp_path, "sft")), options(tmp_path), notes.append).facts
    assert plain["train"]["num_passed_over"] == 0


@pytest.mark.parametrize(("task", "family"), [("clm", "llama"), ("mlm", "bert")])
def test_going_on_with_pre_training_works_shrunk_too_and_for_vocabularies_without_an_end(
    tmp_path, task, family
):
    """BERT's own vocabularies have no end of text."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"the red cat {number} sat on the green mat\n" * 40)
    made = {
        "llmkit": 1,
        "name": "on",
        "finetune": {
            "task": task,
            "model": {"name": model(family), "context": 32},
            "data": {"files": str(tmp_path / "*.txt")},
            "train": {"length": "2 steps", "batch": "4 samples"},
        },
        "machine": {"device": "cpu"},
    }
    loaded = load_recipe(made, smoke=True)
    ended = verb(loaded, options(tmp_path), make_reporter(quiet=True))
    assert (ended.folder / "model" / "config.json").is_file()
