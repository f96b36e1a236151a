"""`llmkit eval` on models that no run here trained: the documented loop, names, what is refused early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import tuning
from training import options

from llmkit.cli import main
from llmkit.data.tokenizers import load_tokenizer
from llmkit.errors import UsageError
from llmkit.evaluate.model import load_model
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Eval
from llmkit.report.console import make_reporter
from llmkit.run import evaluate
from llmkit.run.folders import report_of
from llmkit.run.foreign import home_of_foreign, model_name
from llmkit.run.measure.asked import Subject
from llmkit.run.measure.known import check_asked

TEXT = " ".join(
    ["the red cat lives in Oslo", "and walks with a dog", "the white bird lives in New York"] * 20
)


@pytest.fixture
def place(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tuning.model("llama"), tmp_path / name / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def loop(folder: Path, context: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' documentation, spelt out: the mean loss and the number of tokens."""
    model, tokenizer = load_model(folder), load_tokenizer(str(folder))
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        num = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * num, count + num, end
        if end == ids.shape[1]:
            break
    return total / count, count


def test_one_text_file_has_the_perplexity_of_the_documented_loop(place):
    section = {"data": {"files": str(place / "text.txt")}, "context": 32, "stride": 8}
    made = load_recipe({"llmkit": 1, "name": "m", "eval": section})
    found = evaluate(str(place / "one" / "model"), made, options(place), make_reporter(quiet=True))
    loss, count = loop(place / "one" / "model", 32, 8)
    assert found.summary["metrics"]["num_targets"] == count
    assert found.summary["metrics"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert "without the mark of the end" in found.summary["settings"]["windows"]


def test_each_model_has_its_own_name_and_folder_and_its_report_is_told(place, capsys):
    words = [str(place / name / "model") for name in ("one", "two")]
    runs = ["--runs", str(place / "runs")]
    assert main(["eval", *words, "--compare", "--data", str(place / "text.txt"), "--json", *runs]) == 0
    out, err = capsys.readouterr()
    reports = [Path(one["report"]) for one in json.loads(out)["results"]]
    assert [report_of(path.parent)["name"] for path in reports] == ["one", "two"]
    assert [path.parent.parent.name for path in reports] == ["one", "two"]
    assert all(f"report: {path}" in err for path in reports)
    assert main(["runs", *runs]) == 0
    assert "next: " in capsys.readouterr().err


def test_models_of_one_name_have_homes_that_tell_them_apart(tmp_path):
    runs = tmp_path / "runs"
    first, second = tmp_path / "a" / "bert" / "model", tmp_path / "b" / "bert" / "model"
    assert model_name(str(first)) == "bert"
    assert home_of_foreign(first, runs) == runs / "bert"
    stage = runs / "bert" / "eval-1"
    stage.mkdir(parents=True)
    (stage / "report.json").write_text(json.dumps({"model": {"folder": str(first)}}))
    assert home_of_foreign(first, runs) == runs / "bert"
    assert home_of_foreign(second, runs) == runs / "b-bert"
    (runs / "demo" / "pretrain").mkdir(parents=True)
    assert home_of_foreign(tmp_path / "c" / "demo", runs) == runs / "c-demo"


@pytest.mark.parametrize(
    ("section", "way", "said", "hint"),
    [
        (
            {"gate": {"fail_under": {"acuracy": 0.5}}, "task": "cls"},
            "labelled",
            "no figure of cls",
            "`accuracy`",
        ),
        ({"metrics": "bleu", "task": "cls"}, "labelled", "does not fit cls", "macro_f1"),
        ({"gate": {"fail_under": {"acc": 0.5}}}, "harness", "no figure of harness", "my_task/acc"),
        ({"gate": {"fail_under": {"accuracy": 90}}}, "choice", "1 at most", "did you mean 0.9 or 90%?"),
        ({"gate": {"fail_under": {"recall_at_20": 90}}}, "retrieval", "1 at most", "0.9 or 90%"),
        ({"metrics": "accuracy"}, "text", "does not fit text", "char_perplexity"),
    ],
)
def test_names_and_limits_are_refused_before_anything_is_measured(section, way, said, hint):
    made = load_recipe({"llmkit": 1, "eval": section}).recipe.eval
    with pytest.raises(UsageError, match=said) as error:
        check_asked([Subject("m", Path(tuning.model("llama")))], made, way)
    assert hint in error.value.hint


def test_figures_that_can_be_are_let_through():
    subject = [Subject("m", Path("m"))]
    for way, task, limits in (
        ("labelled", "cls", {"macro_precision": 0.5, "exact_match": 1, "loss": 3}),
        ("labelled", "qa", {"f1": 90, "has_answer_exact_match": 80}),
        ("labelled", "regression", {"r2": 0.5, "mae": 7}),
        ("generation", "generation", {"bleu": 30, "exact_match": 50, "distinct_1": 0.5}),
        ("retrieval", "retrieval", {"recall_at_20": 0.5, "f1": 40}),
        ("harness", "auto", {"my_task/acc": 0.5}),
        ("speed", "auto", {"latency_ms_p95": 50}),
    ):
        made = {"llmkit": 1, "eval": {"task": task, "gate": {"fail_under": limits}}}
        check_asked(subject, load_recipe(made).recipe.eval or Eval(), way)


def test_a_drop_needs_both_of_its_options(place, capsys):
    words = ["eval", str(place / "one" / "model"), "--data", str(place / "text.txt")]
    assert main([*words, "--max-drop", "2%"]) == 2
    assert "--against RUN" in capsys.readouterr().err
    assert main([*words, "--against", str(place / "two" / "model")]) == 2
    assert "--max-drop" in capsys.readouterr().err
    assert main(["eval", words[1], "--harness", "x", "eval.rows=3"]) == 2
    assert "eval.harness.limit=3" in capsys.readouterr().err


def test_rows_are_read_once_aloud_and_settings_of_the_data_reach_questions(place, capsys):
    questions = place / "q.jsonl"
    questions.write_text(
        '{"query": "the red cat lives in", "choices": ["Oslo", "Rome"], "gold": 0}\n{"query": ""}\n'
    )
    words = ["eval", str(place / "one" / "model"), "--task", "choice", "--data", str(questions)]
    runs = ["--runs", str(place / "runs")]
    assert main([*words, "eval.data.on_error=skip", *runs]) == 0
    assert "1 item: too few" in capsys.readouterr().err
