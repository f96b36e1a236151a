"""Every shipped recipe does all that it holds, shrunk to seconds, on this machine's processor."""

import json
import math

import pytest
import tuning
from training import options, write_corpus

from llmkit.recipe import load_recipe
from llmkit.recipe.locate import packaged_names
from llmkit.registry import goal_of
from llmkit.report.console import make_reporter
from llmkit.run import run_all

ELSEWHERE = {
    "clean-web": "its text is a crawl that no test has; tests/unit/test_data_planted.py runs its steps",
    "baselines": "several runs; tests/unit/test_variants.py and the slow tests have them",
    "distil": "it needs a teacher; see test_a_student_of_the_quickstart",
    "rag": "it trains nothing; see test_questions_are_answered_from_what_was_found",
}
TUNES = [
    name
    for name in packaged_names()
    if (recipe := load_recipe(name).recipe).finetune is not None and recipe.pretrain is None
]
"""Recipes that go on from a model, on rows that no test has: they get others."""
SMALL = [
    "machine.device=cpu",
    "machine.precision=fp32",
    "machine.compile=false",
    "pretrain.train.length=6 steps",
]


def smoke(name, folder, *words):
    sources = load_recipe(name).recipe.pretrain.data or ()  # else those of `tokenize`
    for number, source in enumerate(sources):
        if source.files != ["stdlib:"]:
            corpus = write_corpus(folder / f"corpus-{number}")
            words = (*words, f"pretrain.data.{number}.files={corpus}")
    loaded = load_recipe(name, overrides=[*SMALL, *words], smoke=True)
    result = run_all(loaded, options(folder), make_reporter(quiet=True))
    return loaded.recipe, result


SLOW = ("life", "electra", "roberta", "bart", "glm", "fim")
"""Half a minute each; what they train is trained smaller elsewhere."""
SHIPPED = sorted(set(packaged_names()) - set(ELSEWHERE) - set(TUNES))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SHIPPED]
)
def test_a_shipped_recipe_runs(name, tmp_path):
    recipe, _ = smoke(name, tmp_path)
    folder = tmp_path / "runs" / recipe.name / "pretrain"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "done"
    known = goal_of(recipe.pretrain.objective).metrics
    figures = {metric: report["final"].get(f"eval/{metric}") for metric in known}
    if figures.get("pair_accuracy", 0) is None:
        del figures["pair_accuracy"]  # shrunk, the held-out text may be a single document
    assert all(value is not None and math.isfinite(value) for value in figures.values()), figures
    assert (folder / "model" / "config.json").is_file()
    assert "unigram" in json.dumps(report["references"])


@pytest.mark.parametrize("name", TUNES)
def test_a_shipped_recipe_that_tunes_runs(name, tmp_path):
    section = load_recipe(name).recipe.finetune
    words = [
        "machine.device=cpu",
        "machine.precision=fp32",
        f"finetune.model.name={tuning.model_of(section.task)}",
        f"finetune.model.context={tuning.CONTEXT}",
        f"finetune.data.files={tuning.rows_file(tmp_path, section.task)}",
        "finetune.train.length=6 steps",
    ]
    if section.validation is not None:
        held_out = tuning.rows_file(tmp_path, section.task, f"held-out-{tuning.FILES[section.task]}", 16)
        words.append(f"finetune.validation.files={held_out}")
    if name == "retrieval":
        words += searched(tmp_path)
    loaded = load_recipe(name, overrides=words, smoke=True)
    run_all(loaded, options(tmp_path), make_reporter(quiet=True))
    folder = tmp_path / "runs" / loaded.recipe.name / "finetune"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "done"
    assert math.isfinite(report["final"]["eval/loss"])
    assert (folder / "model" / "config.json").is_file()
    for place in folder.parent.glob("eval*"):
        measured = json.loads((place / "report.json").read_text())["figures"]
        assert all(math.isfinite(figure["value"]) for figure in measured.values())


def searched(folder):
    """Passages with the questions that they answer, as settings of `eval`."""
    passages = [{"id": f"p{number}", "text": f"The {word} sat there."} for number, word in enumerate(ANIMALS)]
    questions = [
        {"question": f"What did the {word} do?", "positive": f"p{number}", "answers": [word]}
        for number, word in enumerate(ANIMALS)
    ]
    for name, rows in (("passages", passages), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"eval.labelled.files={folder / 'questions.jsonl'}",
        f"eval.retrieval.corpus={folder / 'passages.jsonl'}",
    ]


ANIMALS = ("cat", "dog", "bird", "fish", "mouse", "horse")


def test_questions_are_answered_from_what_was_found(tmp_path):
    models = {"eval.model": "embed", "eval.retrieval.reader": "sft"}
    words = [f"{key}={tuning.model_of(task)}" for key, task in models.items()]
    words += ["machine.device=cpu", "eval.generation.max_new_tokens=4", "eval.rows=6", *searched(tmp_path)]
    loaded = load_recipe("rag", overrides=words)
    found = run_all(loaded, options(tmp_path), make_reporter(quiet=True)).summary["eval"]["metrics"]
    assert 0 <= found["recall_at_1"] <= found["recall_at_5"] <= 1
    assert {"exact_match", "f1", "mrr"} <= found.keys()


@pytest.mark.slow
def test_a_student_of_the_quickstart(tmp_path):
    teacher, _ = smoke("quickstart", tmp_path)
    place = tmp_path / "runs" / teacher.name
    student, _ = smoke("distil", tmp_path, f"pretrain.distil.teacher={place}")
    report = json.loads((tmp_path / "runs" / student.name / "pretrain" / "report.json").read_text())
    assert report["status"] == "done"


def test_what_is_left_out_here_is_there():
    assert set(ELSEWHERE) <= set(packaged_names())
