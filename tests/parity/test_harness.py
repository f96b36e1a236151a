"""Our own scorer against lm-evaluation-harness: on the same requests, and on whole tasks."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from training import options
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from tuning import model, tokenizer_of

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.evaluate.choices import outcome_of, pairs_of, read_questions
from llmkit.evaluate.requests import Scorer, encode_pairs, prefix_of, rolling_requests
from llmkit.recipe.evaluation import Harness
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.schema import Eval
from llmkit.report.console import make_reporter
from llmkit.run.measure import choice, harness
from llmkit.run.measure.asked import Asked, Subject

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from llmkit.evaluate.harness import HarnessModel, find_tasks  # noqa: E402

BOUND = 1e-4
LONG = "the green horse lives in New York and walks on and on " * 20
PAIRS = [
    ("the red cat lives in", " Oslo"),
    ("the red cat lives in", " Rome and walks on and on"),
    ("the red cat lives in ", "Paris"),
    ("the red cat lives in", " Oslo"),
    ("the red cat lives", " in Oslo"),  # the tokens of the first, parted elsewhere
    ("", "the white dog"),
    ("", "<|endoftext|>the white dog"),
    ("<|endoftext|>the white dog", " lives"),
    ("the black bird\n", "answer"),
    ("红色的猫", "住在巴黎"),
    (LONG, " Vienna"),
    (LONG, " and walks on"),
]


def loaded(family):
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(model(family), dtype=torch.float32).eval()


def asked_of(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_requests_get_what_the_harness_gives_them(family, batch_size):
    network, tokenizer = loaded(family), tokenizer_of(family)
    pairs = [pair for pair in PAIRS if family != "t5" or pair[0]]
    # Its cache of logits, as of 0.4.13, takes the wrong position where the same tokens are parted in two ways
    # ("lives in| Oslo", "lives| in Oslo").
    theirs = HFLM(
        pretrained=network, tokenizer=tokenizer, batch_size=batch_size, device="cpu", logits_cache=False
    )
    expected = theirs.loglikelihood(asked_of(pairs), disable_tqdm=True)
    scorer = Scorer(network, tokenizer, longest=theirs.max_length)
    found = scorer.score(encode_pairs(tokenizer, pairs, encoder_decoder=family == "t5"))
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    for one, (likely, _) in zip(found, expected, strict=True):
        assert one.loglikelihood == pytest.approx(likely, abs=BOUND)


def test_long_texts_are_told_as_the_harness_tells_them():
    network, tokenizer = loaded("gpt2"), tokenizer_of("gpt2")
    texts = [LONG, "short", LONG[:700]]
    theirs = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=2, device="cpu")
    expected = theirs.loglikelihood_rolling(
        asked_of([(text,) for text in texts], "loglikelihood_rolling"), disable_tqdm=True
    )
    scorer = Scorer(network, tokenizer, longest=theirs.max_length)
    for text, likely in zip(texts, expected, strict=True):
        windows = rolling_requests(tokenizer(text)["input_ids"], prefix_of(tokenizer), scorer.longest)
        told = sum(answer.loglikelihood for answer in scorer.score(windows))
        assert told == pytest.approx(likely, abs=BOUND)


def test_as_its_model_ours_gives_what_its_own_gives():
    network, tokenizer = loaded("llama"), tokenizer_of("llama")
    ours = HarnessModel(network, tokenizer)
    theirs = HarnessModel(network, tokenizer, native=False)
    for kind, given in (
        ("loglikelihood", PAIRS[1:3] + PAIRS[5:]),
        ("loglikelihood_rolling", [(LONG,), ("short",)]),
        ("generate_until", [("the red", {"until": [" on"], "max_gen_toks": 8}), ("a", {"max_gen_toks": 5})]),
    ):
        found, expected = (
            getattr(one, kind)(asked_of(given, kind), disable_tqdm=True) for one in (ours, theirs)
        )
        if kind == "generate_until":
            assert found == expected
        else:
            assert torch.tensor(found, dtype=torch.float64) == pytest.approx(
                torch.tensor(expected, dtype=torch.float64), abs=BOUND
            )


# --- whole tasks ------------------------------------------------------------------------------------------------------


QUESTIONS = [
    {
        "query": f"the {colour} cat lives in",
        "choices": ["Oslo", "New York", "Rome and walks"],
        "gold": number % 3,
    }
    for number, colour in enumerate(("red", "green", "blue", "white", "black", "red and white", "grey"))
]
CONTINUATIONS = [
    {"context": f"the {animal} lives", "continuation": "in"}
    for animal in ["cat", "dog", "bird", "horse", "fish", "red", "white"]
]


def written(folder):
    """Files of questions, and the task files that the harness reads them by."""
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, rows, task in (
        (
            "which",
            QUESTIONS,
            'output_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\n'
            "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]\n",
        ),
        (
            "next",
            CONTINUATIONS,
            'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: " {{continuation}}"\n'
            "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]\n",
        ),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tasks / f"{name}.yaml").write_text(
            f"task: tiny_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"test_split: test\n{task}"
        )
    return tasks


def asked(folder, **section):
    return Asked(
        section=Eval(**section),
        base=folder,
        language="en",
        seed=1,
        device="cpu",
        options=options(folder / "runs"),
        reporter=make_reporter(quiet=True),
    )


@pytest.fixture
def subject():
    return Subject(word="tiny", place=Path(model("llama")))


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return written(tmp_path)


def test_tasks_of_the_user_are_asked(tmp_path, tasks, subject, capfd):
    def figures(backend):
        settings = Harness(tasks=["tiny_*"], include=str(tasks), backend=backend)
        return harness.measure(subject, asked(tmp_path, harness=settings, resamples=20))

    ours, theirs = figures("native"), figures("harness")
    assert ours.figures == pytest.approx(theirs.figures, abs=BOUND)
    assert set(ours.figures) == {
        *(f"tiny_which/{name}" for name in ("acc", "acc_norm", "acc_bytes")),
        "tiny_next/perplexity",
        "tiny_next/acc",
    }
    own = choice.measure(subject, asked(tmp_path, data=[{"files": [str(tmp_path / "which.jsonl")]}]))
    for name, their in (("accuracy", "acc"), ("accuracy_norm", "acc_norm"), ("accuracy_bytes", "acc_bytes")):
        assert own.figures[name] == ours.figures[f"tiny_which/{their}"]
    told = choice.measure(subject, asked(tmp_path, data=[{"files": [str(tmp_path / "next.jsonl")]}]))
    assert told.figures["perplexity"] == pytest.approx(theirs.figures["tiny_next/perplexity"], rel=1e-5)
    assert ours.items.figures(range(14)) == pytest.approx(ours.figures)
    assert set(ours.intervals(seed=1, resamples=50)) == set(ours.figures)
    assert len(ours.predictions) == 14
    assert {row["num"] for row in ours.tables["tasks"]} == {7}
    assert ours.files["harness.json"]["results"]["tiny_which"]["acc,none"] == ours.figures["tiny_which/acc"]
    assert ours.data == theirs.data
    assert capfd.readouterr().out == ""  # standard output is for the result


def test_what_the_choice_leaves(tmp_path, tasks, subject):
    found = choice.measure(subject, asked(tmp_path, data=[{"files": [str(tmp_path / "which.jsonl")]}]))
    questions = read_questions(Labelled(files=[str(tmp_path / "which.jsonl")]), tmp_path)
    pairs = pairs_of(questions, " ")
    scorer = Scorer(loaded("llama"), tokenizer_of("llama"))
    outcome = outcome_of(questions, scorer.score(encode_pairs(tokenizer_of("llama"), pairs)))
    assert found.items.right == outcome.right_N.tolist()
    assert found.figures["accuracy"] == outcome.right_N.mean()
    assert [line["prediction"] for line in found.predictions] == outcome.chosen_N.tolist()
    assert len(found.tables["errors"]) == int((~outcome.right_N).sum())
    scores = [row["score"] for row in found.tables["errors"]]
    assert scores == sorted(scores, reverse=True)
    assert found.items.figures([0, 0, 0])["accuracy"] == float(outcome.right_N[0])
    few = choice.measure(subject, asked(tmp_path, data=[{"files": [str(tmp_path / "which.jsonl")]}], rows=3))
    assert len(few.predictions) == 3


def test_one_option_each_time_is_warned_of(tmp_path, subject):
    rows = [{"query": LONG.strip(), "choices": ["a", LONG[:99]], "gold": number % 2} for number in range(4)]
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = choice.measure(subject, asked(tmp_path, data=[{"files": [str(path)]}]))
    assert any("option 0 of every question" in text for text in found.warnings)
    assert any("beginnings were cut" in text for text in found.warnings)


def test_an_encoder_is_refused(tmp_path, tasks):
    encoder = Subject(word="bert", place=Path(model("bert")))
    for measure, section in (
        (choice.measure, {"data": [{"files": [str(tmp_path / "which.jsonl")]}]}),
        (harness.measure, {"harness": Harness(tasks=["tiny_which"], include=str(tasks))}),
    ):
        with pytest.raises(UsageError, match="masked"):
            measure(encoder, asked(tmp_path, **section))
    with pytest.raises(UsageError, match="which questions to ask"):
        choice.measure(encoder, asked(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("output_type: multiple_choice", "output_type: [", r"which\.yaml:\d+:\d+: "),
        ("{{query}}", "{{query", r"which\.yaml:6: .*TemplateSyntaxError"),
        ("output_type: multiple_choice", "output_type: many_choices", r"which\.yaml"),
        ("test_split: test", "test_split: nowhere", r"which\.yaml"),
        ("doc_to_target: gold", "doc_to_target: 7", r"which\.yaml: .*tiny_which .*IndexError"),
        (
            "doc_to_target: gold",
            "doc_to_target: !function own.missing",
            r"which\.yaml:8: .*tiny_which .*'none'",
        ),
        ("{{choices}}", "{{chioces}}", r"which\.yaml:7: .*tiny_which .*'chioces' is undefined"),
        ("metric: acc_norm", "metric: acc_nrom", r"which\.yaml:9: .* no metric 'acc_nrom'\n.*'acc_norm'"),
        ("{metric: acc}", "{metric: acc, aggregation: maen}", r"which\.yaml:9: .* 'maen'\n.*'mean'"),
        (
            "{metric: acc}",
            "{metric: sacrebleu}",
            r"which\.yaml:9: .* no metric 'sacrebleu'\n.*hf_evaluate: true",
        ),
        (
            "{metric: acc}",
            "{metric: sacrebleu, hf_evaluate: true}",
            r"which\.yaml:9: .*'sacrebleu' .*\n.*aggregation: mean",
        ),
    ],
)
def test_a_wrong_task_file_is_named(tmp_path, tasks, subject, old, new, said):
    path = tasks / "which.yaml"
    (tasks / "own.py").write_text("def missing(row):\n    return row['none']\n")
    path.write_text(path.read_text().replace(old, new))
    assert new in path.read_text()
    settings = Harness(tasks=["tiny_next", "tiny_which"], include=str(tasks))  # both have these keys
    with pytest.raises(DataError, match=said):
        harness.measure(subject, asked(tmp_path, harness=settings))


def test_a_broken_file_does_not_keep_other_tasks_from_being_asked(tmp_path, tasks):
    (tasks / "broken.yaml").write_text("task: [\n")
    assert find_tasks(["tiny_which"], tasks)[1] == ["tiny_which"]
    with pytest.raises(DataError, match=r"broken\.yaml"):
        find_tasks(["tiny_broken"], tasks)


def test_requests_that_the_model_does_not_read_whole_are_counted(tmp_path, tasks, subject, capfd):
    rows = [{**row, "query": LONG + row["query"]} for row in QUESTIONS[:2]] + QUESTIONS[2:]
    (tmp_path / "which.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Harness(tasks=["tiny_which"], include=str(tasks))
    found = harness.measure(subject, asked(tmp_path, harness=settings))
    [said] = [text for text in found.warnings if "do not fit" in text]
    assert said.startswith("6 of 21 requests do not fit")
    assert "Token indices" not in capfd.readouterr().err + "".join(found.warnings)


def test_data_that_cannot_be_read_are_named(tmp_path, tasks, subject):
    data = tmp_path / "which.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:]]) + "\n")
    settings = Harness(tasks=["tiny_which"], include=str(tasks))
    with pytest.raises(DataError, match=r"which\.jsonl:3: the data of tiny_which") as caught:
        harness.measure(subject, asked(tmp_path, harness=settings))
    assert "which.yaml:3" in caught.value.hint


def test_what_our_scorer_raises_is_not_blamed_on_a_task(tmp_path, tasks, subject, monkeypatch):
    monkeypatch.setattr("llmkit.evaluate.requests.Scorer._of_lines", None)
    settings = Harness(tasks=["tiny_which"], include=str(tasks))
    with pytest.raises(TypeError):
        harness.measure(subject, asked(tmp_path, harness=settings))


def test_which_way_figures_are_better_is_told(tmp_path, tasks, subject):
    path = tasks / "which.yaml"
    path.write_text(
        path.read_text()
        .replace("{metric: acc_bytes}", "{metric: mine, aggregation: mean}, {metric: less}")
        .replace("{metric: less}", "{metric: less, aggregation: mean, higher_is_better: false}")
        + "process_results: !function own.figures\n"
    )
    (tasks / "own.py").write_text(
        "def figures(row, found):\n    return {'acc': 1.0, 'acc_norm': 1.0, 'mine': 2.0, 'less': 0.5}\n"
    )
    settings = Harness(tasks=["tiny_*"], include=str(tasks))
    found = harness.measure(subject, asked(tmp_path, harness=settings))
    assert set(found.figures) - set(found.directions) == {"tiny_which/mine"}
    assert found.direction("tiny_which/mine") is None
    assert found.directions == {
        "tiny_which/acc": "higher",
        "tiny_which/acc_norm": "higher",
        "tiny_which/less": "lower",
        "tiny_next/acc": "higher",
        "tiny_next/perplexity": "lower",
    }


@pytest.mark.slow
def test_an_unknown_task_gets_the_nearest(tasks):
    with pytest.raises(UsageError, match="tiny_wich") as caught:
        find_tasks(["tiny_wich"], tasks)
    assert "tiny_which" in caught.value.hint
    assert find_tasks(["arc_easy"], None)[1] == ["arc_easy"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        find_tasks(["tiny_which"], tmp_path / "nowhere")


def test_without_the_harness_the_line_that_installs_it_is_shown(tmp_path, subject, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(MissingError) as caught:
        harness.measure(subject, asked(tmp_path, harness=Harness(tasks=["arc_easy"])))
    assert caught.value.hint == 'pip install "llmkit[harness]"'
