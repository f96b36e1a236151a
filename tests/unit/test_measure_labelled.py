"""Models measured on labelled rows: figures of training, of any rows, of several processes; and what can be wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tuning
from training import options

from llmkit.errors import DataError, UsageError
from llmkit.evaluate.noise import Damage
from llmkit.evaluate.sharing import Share
from llmkit.objectives.detail import Details
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Eval
from llmkit.report.console import make_reporter
from llmkit.report.run_log import read_metrics
from llmkit.run.evaluate import find_subject
from llmkit.run.measure.asked import Asked
from llmkit.run.measure.labelled import measure
from llmkit.run.measure.labels import train_rows
from llmkit.run.tasks import load_core

QUICK = ("cls", "tag")
"""The tasks whose runs every test run makes; the others are left to the slow tests."""
EACH = [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in tuning.TASKS]
CHANGES = {
    "qa": {"finetune__model__context": 32, "finetune__qa": {"stride": 8}},
    "tag": {"finetune__model__context": 16, "finetune__tag": {"overlap": 4}},
}
"""Short contexts: texts are read in windows."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("labelled")


@pytest.fixture(scope="module")
def runs(place):
    made = {}

    def of(task):
        if task not in made:
            more = {"finetune__train__length": "2 steps", "finetune__eval__every": "never"}
            made[task] = tuning.finetune(
                place, task, finetune__checkpoint__every="never", **more, **CHANGES.get(task, {})
            )
        return made[task]

    return of


def asked(place, share=None, held_out_by=None, **section):
    said = load_recipe({"llmkit": 1, "eval": section}).recipe.eval if section else Eval()
    more = {} if share is None else {"share": share}
    reporter = make_reporter(quiet=True)
    return Asked(said, place, "en", 7, "cpu", options(place), reporter, held_out_by=held_out_by, **more)


def subject(word, place):
    return find_subject(str(word), options(place), make_reporter(quiet=True))


def of(word, place, **section):
    return measure(subject(word, place), asked(place, **section))


@pytest.mark.parametrize("task", EACH)
def test_figures_are_those_of_training_to_the_last_bit(runs, place, task):
    final = json.loads((runs(task) / "report.json").read_text())["final"]
    found = of(runs(task), place)
    assert {f"eval/{name}": value for name, value in found.figures.items()} == final
    assert found.settings["held_out"]
    assert [line["place"] for line in found.predictions]


@pytest.mark.parametrize("task", EACH)
def test_figures_of_some_items_are_those_of_their_rows_alone(runs, place, task):
    one = subject(runs(task), place)
    found = measure(one, asked(place))
    number = len(found.items.keys)
    whole = found.items.figures(np.arange(number))
    assert whole == pytest.approx({name: found.figures[name] for name in whole}, rel=1e-6, abs=1e-9)
    assert {"num_targets"} >= set(found.figures) - set(whole)
    chosen = np.arange(0, number, 2)
    rows = [json.loads(line) for line in held_out_lines(one, place)]
    places = {found.predictions[item]["place"] for item in chosen}
    core, _ = load_core(one.task)
    some = [row for row in rows if row["place"] in places]
    if task == "embed":  # whose items are compared with the documents of all
        ranks = [found.predictions[item]["score"] for item in chosen]
        assert found.items.figures(chosen)["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
        return
    assert isinstance(core.objective, Details)
    alone = measured_alone(core, some)
    # Of predictions that hardly differ, a correlation shows their rounding.
    assert found.items.figures(chosen) == pytest.approx({n: alone[n] for n in whole}, rel=1e-3, abs=1e-6)


def held_out_lines(one, place):
    address = one.task.facts["address"]
    return (place / "runs" / ".cache" / "rows" / address / "held_out.jsonl").read_text().splitlines()


def measured_alone(core, rows):
    from llmkit.data.samples import Measured, RowsHeld
    from llmkit.evaluate.task import evaluate_task
    from llmkit.objectives.base import size_of

    lengths = [size_of(core.objective, core.objective.encode({**row, "seed": 0})) for row in rows]
    places = [row["place"] for row in rows]
    groups = [places.index(place) for place in places]
    held = RowsHeld(Measured(rows, lengths, [1] * len(rows), [0] * len(rows), groups))
    return evaluate_task(core, held, device="cpu", tokens=64)


@pytest.mark.parametrize("task", EACH)
def test_two_processes_find_what_one_finds_to_the_last_bit(runs, place, task):
    class HalfwayError(Exception):
        pass

    first = {}

    def leave(found):
        first.update(found)
        raise HalfwayError

    def meet(found):
        assert not set(first) & set(found)
        return dict(sorted({**found, **first}.items()))

    one = subject(runs(task), place)
    alone = measure(one, asked(place))
    with pytest.raises(HalfwayError):
        measure(one, asked(place, Share(0, 2, leave)))
    both = measure(one, asked(place, Share(1, 2, meet)))
    assert len(first) > 0
    assert both.figures == alone.figures
    assert (both.predictions, both.tables, both.warnings) == (
        alone.predictions,
        alone.tables,
        alone.warnings,
    )
    everything = np.arange(len(alone.items.keys))
    assert both.items.figures(everything) == alone.items.figures(everything)


def reviews(place, rows, name="others.csv", header="text,label"):
    path = place / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def test_tables_and_lines_of_classes_by_hand(runs, place):
    found = of(runs("cls"), place)
    lines = found.predictions
    right = [line["target"] == line["prediction"] for line in lines]
    assert list(found.items.right) == right
    assert found.figures["accuracy"] == pytest.approx(np.mean(right))
    assert all(line["score"] == max(line["probabilities"].values()) for line in lines)
    nll = [-np.log(line["probabilities"][line["target"]]) for line in lines]
    assert [line["loss"] for line in lines] == pytest.approx(nll, rel=1e-5)
    errors = found.tables["errors"]
    assert len(errors) == len(right) - sum(right)
    assert [one["score"] for one in errors] == sorted((one["score"] for one in errors), reverse=True)
    confusion = found.tables["confusion"]
    for number, label in enumerate(confusion["labels"]):
        assert sum(confusion["counts"][number]) == sum(line["target"] == label for line in lines)
    classes = {line["label"]: line for line in found.tables["classes"]}
    assert sum(line["support"] for line in classes.values()) == len(lines)


def test_labels_that_the_model_does_not_know_are_named(runs, place):
    data = reviews(place, ["a red cat,red", "a cat,grren", "a dog,grren", "a bird,42"])
    with pytest.raises(DataError) as caught:
        of(runs("cls"), place, data={"files": data})
    assert "others.csv:3: the model has no label 'grren'; of 4 rows" in caught.value.message
    assert "'grren' (2 rows), '42' (1 rows)" in caught.value.message
    assert "'green' for 'grren'" in caught.value.hint


def test_a_file_without_labels_says_how_to_name_its_columns(runs, place):
    data = place / "unlabelled.jsonl"
    data.write_text('{"review": "a red cat"}\n' * 2)
    with pytest.raises(DataError) as caught:
        of(runs("cls"), place, labelled={"files": str(data)})
    assert "review" in caught.value.message
    assert "columns: {" in caught.value.hint
    assert "eval.labelled.columns.ROLE=NAME" in caught.value.hint
    guessed = reviews(place, ["a red cat,5", "a blue dog,6"], "guessed.csv", header="review,number")
    with pytest.raises(DataError, match="no label '5'") as caught:
        of(runs("cls"), place, labelled={"files": guessed})
    assert "eval.labelled.columns.label=NAME" in caught.value.hint


def test_rows_of_their_own_columns_are_measured(runs, place):
    data = reviews(place, ["a red cat,red", "a blue dog,blue", "a blue cat,red"], header="review,colour")
    columns = {"text": "review", "label": "colour"}
    found = of(runs("cls"), place, labelled={"files": data, "columns": columns})
    assert (found.settings["held_out"], len(found.predictions)) == (False, 3)
    assert found.warnings[0].startswith("every row was said to be ")


def test_rows_that_the_model_learned_from_are_told(runs, place):
    file = load_recipe(runs("cls") / "resolved.yaml").recipe.finetune.data.files[0]
    found = of(runs("cls"), place, data={"files": file})
    learned = len(train_rows(subject(runs("cls"), place).task, options(place).runs))
    assert 0 < learned < len(found.predictions)
    said = f"{learned:,} of the {len(found.predictions):,} rows are among those that the model learned from"
    assert said in found.warnings
    other = reviews(place, ["a wholly other text,red", "and one more,blue"], "unseen.csv")
    assert not any("learned from" in text for text in of(runs("cls"), place, data={"files": other}).warnings)


def test_how_broken_rows_are_left_out_is_said_in_words_that_work(runs, place):
    data = {"files": reviews(place, ["a red cat,red", ",red"], "empty.csv")}
    with pytest.raises(DataError) as caught:
        of(runs("cls"), place, data=data)
    assert "`eval.data.on_error=skip`" in caught.value.hint
    with pytest.raises(DataError) as caught:
        of(runs("cls"), place, labelled=data)
    assert "`eval.labelled.on_error=skip`" in caught.value.hint


def test_rows_that_the_reader_skips_are_told(runs, place):
    data = reviews(place, ["a red cat,red", "a cat", "a blue dog,blue", ",red"], "broken.csv")
    found = of(runs("cls"), place, data={"files": data, "on_error": "skip"})
    assert len(found.predictions) == 2
    [said] = [text for text in found.warnings if "skipped" in text]
    assert said.startswith("2 rows were skipped, beside 2 rows that were read: ")
    assert said.endswith("broken.csv:3")
    whole = reviews(place, ["a red cat,red", "a blue dog,blue"], "whole.csv")
    found = of(runs("cls"), place, data={"files": whole, "on_error": "skip"})
    assert not any("skipped" in text for text in found.warnings)


def test_nothing_was_held_out(place):
    folder = tuning.finetune(
        place,
        "cls",
        "whole",
        finetune__held_out=0,
        finetune__train__length="1 steps",
        finetune__eval__every="never",
    )
    with pytest.raises(DataError, match="held out no row") as caught:
        of(folder, place)
    assert "--data FILES" in caught.value.hint


def test_text_that_the_tokenizer_does_not_know_is_told(runs, place):
    data = reviews(place, ["猫 狗 鸟,red", "a red cat,blue"], "unknown.csv")
    found = of(runs("cls"), place, data={"files": data})
    assert any("are unknown to the tokenizer" in text and "unknown.csv:2" in text for text in found.warnings)


@pytest.mark.parametrize(
    "task", [task if task in ("cls", "tag") else EACH[n] for n, task in enumerate(tuning.TASKS)]
)
def test_a_model_without_its_run_gives_the_same_figures(runs, place, task):
    if task == "dpo":
        pytest.skip("without the model that it was at first, pairs are compared otherwise")
    file = tuning.rows_file(place, task, f"foreign-{tuning.FILES[task]}", 20)
    known = of(runs(task), place, data={"files": str(file)})
    alone = place / f"alone-{task}"
    shutil.copytree(runs(task) / "model", alone, dirs_exist_ok=True)
    found = of(alone, place, task=task, data={"files": str(file)})
    assert found.task == task
    # Read in longer windows, or not packed: to rounding, where the texts are not cut.
    if task in CHANGES:
        assert set(known.figures) == set(found.figures)
        return
    names = set(known.figures) & set(found.figures)
    assert "loss" in names
    near = pytest.approx({name: known.figures[name] for name in names}, rel=1e-4, abs=1e-6)
    assert {name: found.figures[name] for name in names} == near


def test_classes_without_names(runs, place):
    alone = Path(shutil.copytree(runs("cls") / "model", place / "unnamed"))
    config = json.loads((alone / "config.json").read_text())
    named = config["id2label"]
    config["id2label"] = {number: f"LABEL_{number}" for number in named}
    config["label2id"] = {f"LABEL_{number}": int(number) for number in named}
    (alone / "config.json").write_text(json.dumps(config))
    texts = {"a red cat": "red", "a blue dog": "blue", "a white bird": "white"}
    by_name = reviews(place, [f"{text},{label}" for text, label in texts.items()], "names.csv")
    with pytest.raises(UsageError, match="does not say what its 5 classes are called") as caught:
        of(alone, place, task="cls", data={"files": by_name})
    assert "id2label" in caught.value.hint
    numbers = {name: number for number, name in named.items()}
    by_number = reviews(place, [f"{text},{numbers[label]}" for text, label in texts.items()], "numbers.csv")
    found = of(alone, place, task="cls", data={"files": by_number})
    wanted = of(runs("cls"), place, data={"files": by_name})
    assert found.figures == wanted.figures


def test_a_model_without_head_or_data_is_refused(runs, place):
    with pytest.raises(UsageError, match="nothing says what the rows are for"):
        of(tuning.model("bert"), place, labelled={"files": "x.csv"})
    with pytest.raises(UsageError, match="nothing was held out to measure it on"):
        of(tuning.model("bert"), place, task="cls")
    data = reviews(place, ["a cat,0", "a dog,1"], "two.csv")
    with pytest.raises(UsageError, match="has no head for cls"):
        of(tuning.model("bert"), place, task="cls", data={"files": data})
    with pytest.raises(UsageError, match="`sft` needs"):
        of(tuning.model("bert"), place, task="sft", data={"files": data})


def test_another_model_is_measured_on_the_same_rows(runs, place):
    """The baseline reads whole sentences, this one windows of 16 tokens: rows and keys are the same."""
    first = tuning.finetune(
        place, "tag", "long", finetune__train__length="1 steps", finetune__eval__every="never"
    )
    baseline, other = subject(first, place), subject(runs("tag"), place)
    one = measure(baseline, asked(place))
    two = measure(other, asked(place, held_out_by=baseline))
    assert (one.data, one.items.keys) == (two.data, two.items.keys)
    assert [line["target"] for line in one.predictions] == [line["target"] for line in two.predictions]
    assert not two.settings["held_out"]
    assert any("held out by another run" in text for text in two.warnings)
    own = measure(other, asked(place))
    assert {line["place"]: line["prediction"] for line in own.predictions}.keys() == {
        line["place"] for line in two.predictions
    }


def test_damaged_copies_stand_beside_the_plain_figures(runs, place):
    found = of(runs("cls"), place, noise={"typos": "20%", "seeds": 2})
    table = found.tables["noise"]
    assert [line["seed"] for line in table] == [None, 0, 1, "mean", "deviation"]
    assert table[0]["metrics"] == found.figures
    losses = [line["metrics"]["loss"] for line in table[:3]]
    assert len(set(losses)) == 3
    assert table[3]["metrics"]["loss"] == pytest.approx(np.mean(losses[1:]))
    assert table[4]["metrics"]["loss"] == pytest.approx(np.std(losses[1:], ddof=1))
    assert of(runs("cls"), place, noise={"typos": "20%", "seeds": 2}).tables["noise"] == table


ROWS = {
    "cls": {"text": "a small red cat " * 40, "label": "red"},
    "tag": {"tokens": ["the", "cat", "x"] * 40, "tags": ["O", "B-animal", "O"] * 40},
    "qa": {"question": "where is the cat? " * 40, "context": "in Oslo " * 40, "answers": []},
    "seq2seq": {"source": "ein kleiner Hund " * 40, "target": "a small dog " * 40},
    "sft": {
        "messages": [
            {"role": "user", "content": "hello there " * 40},
            {"role": "assistant", "content": "hi " * 40},
        ]
    },
    "embed": {"anchor": "what is this? " * 40, "positive": "that is it " * 40},
}
DAMAGED = {
    "cls": "text",
    "tag": "tokens",
    "qa": "question",
    "seq2seq": "source",
    "sft": "messages",
    "embed": "anchor",
}


@pytest.mark.parametrize("task", ROWS)
def test_damage_is_a_function_of_seed_copy_and_row_and_leaves_answers_alone(task):
    rows = [ROWS[task]] * 2
    damage = Damage(task, rows, share=0.1, seed=3)
    first, second = damage.rows(0)
    key = DAMAGED[task]
    assert first[key] != second[key] != rows[0][key]  # equal rows are damaged otherwise
    assert damage.rows(0) == [first, second] == Damage(task, rows, share=0.1, seed=3).rows(0)
    assert damage.rows(1)[0] != first != Damage(task, rows, share=0.1, seed=4).rows(0)[0]
    assert {name: value for name, value in first.items() if name != key} == {
        name: value for name, value in rows[0].items() if name != key
    }
    if task == "tag":
        assert len(first["tokens"]) == 120
        assert all(first["tokens"])
    if task == "sft":
        assert first["messages"][1] == rows[0]["messages"][1]


def test_as_many_characters_are_damaged_as_was_said():
    damage = Damage("cls", [ROWS["cls"]], share=0.1, seed=1)
    made = damage.text("abcdefghij" * 1000, np.random.default_rng(0))
    same = sum(one == other for one, other in zip(made[:20], "abcdefghij" * 2, strict=True))
    changed = 10_000 - sum(made.count("abcdefghij"[n : n + 3]) for n in range(8))
    assert 0.05 < 1 - made.count("abcdefghij") / 1000 < 1
    assert abs(len(made) - 10_000) < 150  # as many are dropped as doubled
    assert (same, changed) != (20, 0)


def test_han_characters_become_other_han_characters():
    text = "我喜欢这只小猫因为它很可爱" * 30
    damage = Damage("cls", [{"text": text, "label": "x"}], share=0.2, seed=1)
    made = damage.rows(0)[0]["text"]
    assert made != text
    assert set(made) <= set(text)


def final_of(folder):
    return json.loads((folder / "report.json").read_text())["final"]


@pytest.mark.parametrize("task", ["cls", pytest.param("sft", marks=pytest.mark.slow)])
def test_an_adapter_that_was_not_merged_is_measured_with_its_base(place, task):
    more = {"finetune__train__length": "4 steps", "finetune__eval__every": "never"}
    adapter = {"method": "lora", "merge": False}
    run = tuning.finetune(place, task, f"alone-{task}", finetune__adapter=adapter, **more)
    assert not (run / "model").exists()
    found = of(run, place)
    assert found.model == str(run / "adapter")
    for name, value in final_of(run).items():
        assert found.figures[name.removeprefix("eval/")] == pytest.approx(value, abs=1e-6), name


def test_a_checkpoint_of_a_task_is_measured_as_its_model(place):
    more = {"finetune__train__length": "4 steps", "finetune__eval__every": "2 steps"}
    run = tuning.finetune(place, "cls", "saved", finetune__checkpoint__every="2 steps", **more)
    recorded = {record["step"]: record["eval/loss"] for record in read_metrics(run) if "eval/loss" in record}
    for step in (2, 4):
        found = of(run / "checkpoints" / f"step_{step:08d}", place)
        assert found.task == "cls"
        assert found.figures["loss"] == recorded[step]
