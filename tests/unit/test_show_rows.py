"""`llmkit show`: rows as the model gets them; without a recipe, with one, and from a run."""

import json

import pytest
from training import options
from tuning import TASKS, finetune, model_of, recipe, rows_file

from llmkit.cli import main
from llmkit.errors import UsageError
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run.show import show


def shown(folder, task, **more):
    loaded = load_recipe(recipe(folder, task))
    return show(loaded, options(folder), make_reporter(quiet=True), sample=3, **more)


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_without_a_recipe_what_is_learned_of_chats_is_shown(tmp_path, capsys):
    data = rows_file(tmp_path, "sft")
    words = [
        "--task",
        "sft",
        "--model",
        model_of("sft"),
        "--data",
        str(data),
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert main(["show", *words, "--sample", "2"]) == 0
    rows = lines(capsys)
    assert len(rows) == 2
    for row in rows:
        said = "".join(piece for piece, learned in zip(row["pieces"], row["learned"], strict=True) if learned)
        line = data.read_text().splitlines()[int(row["place"].split(":")[-1]) - 1]
        answers = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        assert said == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert row["num_targets"] == sum(row["learned"])
    assert not (tmp_path / "runs" / "chats-sft").exists()


def test_a_run_shows_the_rows_that_it_learned_from(tmp_path, capsys):
    run = finetune(tmp_path, "sft")
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["show", "sft", "--sample", "1", *runs]) == 0
    [by_name] = lines(capsys)
    assert main(["show", str(run), "--sample", "1", *runs]) == 0
    assert lines(capsys) == [by_name]
    assert main(["show", str(run), "--sample", "1", "--seed", "5", *runs]) == 0
    assert lines(capsys) != [by_name]
    assert main(["show", str(run), "--sample", "100", "--held-out", *runs]) == 0
    held_out = {row["place"] for row in lines(capsys)}
    assert len(held_out) == 16
    assert by_name["place"] not in held_out


def test_a_preference_is_two_texts(tmp_path):
    rows = shown(tmp_path, "dpo")
    assert [row.facts["text"] for row in rows] == ["chosen", "rejected"] * 3
    chosen, rejected = rows[:2]
    assert chosen.place == rejected.place
    prompts = [[piece.id for piece in row.pieces if not piece.learned] for row in (chosen, rejected)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_shown(task, tmp_path):
    rows = shown(tmp_path, task)
    assert rows
    for row in rows:
        assert row.pieces
        assert ":" in row.place
        json.dumps(dict(row.facts))
    facts = rows[0].facts
    if task == "cls":
        assert facts["label"] in ("red", "green", "blue", "white", "black")
        assert not any(piece.learned for piece in rows[0].pieces)
    if task == "tag":
        words = [tag for tag in facts["tags"] if tag is not None]
        assert len(words) == sum(piece.learned for piece in rows[0].pieces)
        assert {"O", "B-animal"} <= set(words)


def test_text_has_no_rows_to_show(tmp_path):
    made = {
        "llmkit": 1,
        "finetune": {"task": "clm", "model": {"name": "m"}, "data": {"files": "a.txt"}},
    }
    with pytest.raises(UsageError, match="no rows to show"):
        show(load_recipe(made), options(tmp_path), make_reporter(quiet=True), sample=1)
