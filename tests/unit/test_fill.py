"""`llmkit fill`: the model's own probabilities for each gap, and words for what cannot be filled."""

import io
import json

import objectives
import pytest
import torch
from training import pretrain
from transformers import AutoModelForMaskedLM, AutoTokenizer

from llmkit.cli import main
from llmkit.data.tokenizers import load_tokenizer
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import UsageError
from llmkit.evaluate.fill import _written, fill
from llmkit.evaluate.model import load_model
from llmkit.models.heads import choose_heads
from llmkit.recipe.schema import Sampling
from llmkit.report.console import make_reporter
from llmkit.run.fill import fill as fill_by_name
from llmkit.run.generate import generate

TEXT = "def [MASK](self, key):\n    return [MASK]"
SHORT = {
    "pretrain__train__length": "4 steps",
    "pretrain__eval": {"every": "never"},
    "pretrain__checkpoint": {"every": "never"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the kinds of models, a tokenizer of each."""
    place = tmp_path_factory.mktemp("fill")
    for objective, name in (
        ("mlm", "masked"),
        ("mlm+nsp", "pairs"),
        ("electra", "detector"),
        ("clm", "causal"),
    ):
        prompts = {"pretrain__prompts": [TEXT if name in ("masked", "pairs") else "def "]}
        pretrain(place, name, **objectives.changes(objective), **SHORT, **prompts)
    return place / "runs"


@pytest.mark.parametrize("name", ["masked", "pairs"])
def test_the_words_are_the_likeliest_of_the_exported_model(runs, name):
    folder = runs / name / "pretrain/model"
    model, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    # By plain transformers; as in a text that was hidden, the blank before a gap is the hidden word's.
    inputs = tokenizer(TEXT.replace(" [MASK]", tokenizer.mask_token), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    logits[:, tokenizer.all_special_ids] = -torch.inf
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    best = logits[places].softmax(-1).topk(3)
    [filled] = fill_by_name(str(folder), [TEXT], top=3, runs=runs)
    assert len(filled["gaps"]) == 2
    for gap, ids, shares in zip(filled["gaps"], best.indices, best.values, strict=True):
        assert gap["tokens"] == [tokenizer.decode([number]) for number in ids.tolist()]
        assert gap["probabilities"] == pytest.approx(shares.tolist(), rel=1e-4)
    first, second = (gap["tokens"][0] for gap in filled["gaps"])
    assert filled["text"] == f"def{first}(self, key):\n    return{second}"
    assert filled["prompt"] == TEXT


def test_the_tokenizers_own_mask_and_a_pipe_are_taken(runs, monkeypatch, capsys):
    own = TEXT.replace("[MASK]", "<|mask|>").replace("\n", " ")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{own}\na [MASK] b\n"))
    assert main(["fill", "masked", "--runs", str(runs), "--json", "-k", "2"]) == 0
    given = json.loads(capsys.readouterr().out)["texts"]
    assert [len(text["gaps"]) for text in given] == [2, 1]
    assert all(len(gap["tokens"]) == 2 for text in given for gap in text["gaps"])


def test_on_a_terminal_each_gap_has_a_line(runs, capsys):
    assert main(["fill", "masked", TEXT, "--runs", str(runs), "-k", "4"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.rstrip("\n").split("\n")
    assert [line.count("%") for line in lines[-2:]] == [4, 4]
    assert captured.err.rstrip().endswith("-k 8")


@pytest.mark.parametrize(
    ("name", "text", "said", "hint"),
    [
        ("masked", "nothing is missing", "no gap in 'nothing is missing'", "[MASK]"),
        ("masked", "x [MASK] " * 40, "the model reads at most 32", "leave out"),
        ("causal", TEXT, "a model that writes text fills no gaps", "llmkit generate"),
        ("detector", TEXT, "finds replaced tokens", "pretrain/generator"),
    ],
)
def test_what_cannot_be_filled(runs, name, text, said, hint):
    with pytest.raises(UsageError) as caught:
        fill_by_name(name, [text], top=1, runs=runs)
    assert said in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["masked", "pairs", "detector"])
def test_generate_says_what_to_use_instead(runs, name):
    with pytest.raises(UsageError, match="does not write text") as caught:
        generate(name, ["x"], Sampling(), samples=1, seed=0, runs=runs, reporter=make_reporter(quiet=True))
    assert "llmkit fill" in caught.value.hint


def test_the_generator_of_a_detector_fills(runs):
    [filled] = fill_by_name(str(runs / "detector/pretrain/generator"), [TEXT], top=10_000, runs=runs)
    vocabulary = Vocabulary.of(load_tokenizer(str(runs / "detector/pretrain/model")))
    for gap in filled["gaps"]:
        assert len(gap["tokens"]) == vocabulary.size - len(vocabulary.special_ids)
        assert sum(gap["probabilities"]) == pytest.approx(1.0, abs=1e-4)


def test_a_model_is_left_in_the_mode_it_was_in(runs):
    folder = runs / "masked/pretrain/model"
    model = load_model(folder).train()
    choose_heads(model, "masked")
    once = fill(model, load_tokenizer(str(folder)), [TEXT])
    assert model.training
    assert once == fill(model.eval(), load_tokenizer(str(folder)), [TEXT])


def test_each_run_says_the_command_that_shows_its_model(runs):
    next_commands = {
        name: json.loads((runs / name / "pretrain/report.json").read_text())["next_command"].split()[1]
        for name in ("masked", "pairs", "detector", "causal")
    }
    assert next_commands == {"masked": "fill", "pairs": "fill", "detector": "eval", "causal": "generate"}
    for name, words in (("masked", "AutoModelForMaskedLM"), ("detector", "AutoModelForPreTraining")):
        assert words in (runs / name / "pretrain/model/README.md").read_text()


def test_a_part_of_a_character_is_shown_by_its_bytes(runs):
    vocabulary = Vocabulary.of(load_tokenizer(str(runs / "masked" / "pretrain" / "model")))
    number = next(n for n, spelt in enumerate(vocabulary.spellings) if spelt == b"\xe6")
    assert _written(vocabulary, number) == "<0xE6>"
    assert _written(vocabulary, vocabulary.encode("def")[0]) in "def"
