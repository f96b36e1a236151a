"""What is shared out among the words of a text, compared with sums made by hand and with captum's own."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import tuning
from captum.attr import LayerIntegratedGradients
from training import options
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from llmkit.cli import main
from llmkit.cli.explain import shown, stretches
from llmkit.cli.show import Terminal
from llmkit.errors import MissingError, UsageError
from llmkit.evaluate import gradients
from llmkit.evaluate.explain import _log_p_of, explain_label, explain_next
from llmkit.evaluate.gradients import import_captum, integrated_gradients
from llmkit.evaluate.reading import joined, read_text, with_scores
from llmkit.report.console import make_reporter
from llmkit.report.explained import balance, explained, heading
from llmkit.run.explain import explain

TEXT = "the red cat lives in New York"


def judge(num_labels=3, **changes):
    """A small classifier of texts, with the tokenizer of `tuning`."""
    torch.manual_seed(1)
    names = dict(enumerate(("bad", "fair", "good")[:num_labels]))
    model = AutoModelForSequenceClassification.from_pretrained(
        tuning.model("bert"), num_labels=num_labels, id2label=names, **changes
    )
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # as far from undecided as a model that learned
    return model.eval(), tuning.tokenizer_of("bert")


class Toy(torch.nn.Module):
    """Embeddings of one number each, and what is made of them."""

    def __init__(self, said, is_encoder_decoder=False):
        super().__init__()
        self.table = torch.nn.Embedding(10, 1)
        with torch.no_grad():
            self.table.weight[:, 0] = torch.arange(10.0)
        self.said = said
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder, model_type="toy")

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids_BT):
        return self.said(self.table(ids_BT)[:, :, 0])


# --- integrated gradients


def shared(said, steps=50, ids=(3, 5, 7), base=(3, 0, 0)):
    model = Toy(said)
    return integrated_gradients(model, model, torch.tensor([ids]), torch.tensor([base]), steps)


def test_a_linear_model_by_hand():
    weights = torch.tensor([10.0, 2.0, -3.0])
    found = shared(lambda values_BT: values_BT @ weights + 4, steps=3)
    # w * (x - baseline): the first token is the baseline's own.
    assert found.scores.tolist() == pytest.approx([0, 2 * 5, -3 * 7])
    assert (found.value, found.baseline_value) == (30 + 10 - 21 + 4, 34)
    assert found.steps == 3


def test_a_product_by_hand():
    found = shared(lambda values_BT: values_BT[:, 1] * values_BT[:, 2], steps=8)
    # On the way t the gradients are 7t and 5t, whose means over t are 3.5 and 2.5: each token gets half.
    assert found.scores.tolist() == pytest.approx([0, 17.5, 17.5])


def test_where_all_changes_at_once_more_steps_are_taken_there():
    def cliff(values_BT):
        return torch.sigmoid(300 * (values_BT @ torch.tensor([0.0, 1.0, 3.0]) - 11.3))

    found = shared(cliff, steps=10)
    assert found.steps > 10
    assert found.scores.sum().item() == pytest.approx(1, abs=0.02)
    # Only the sum counts, so each token's share is its own part of it: 5 and 21 of 26.
    assert found.scores.tolist() == pytest.approx([0, 5 / 26, 21 / 26], abs=0.02)


def test_what_stays_incomplete_is_known_and_told(monkeypatch, folder, capsys):
    monkeypatch.setattr(gradients, "MOST_STEPS", 45)
    monkeypatch.setattr(gradients, "_LEAST", -1.0)
    monkeypatch.setattr(gradients, "_SHARE", -1.0)
    model, tokenizer = judge()
    found = explain_label(model, tokenizer, TEXT, steps=10)
    assert found.steps == 10 + 2 * 8 + 2 * 8  # a third halving would be too much
    assert not found.is_complete
    assert main(["explain", "cls", TEXT, "--runs", str(folder / "runs"), "--steps", "40"]) == 0
    out, err = capsys.readouterr()
    assert not json.loads(out)["explained"][0]["complete"]
    assert "40 steps are not enough" in err


def test_the_scores_are_those_of_captum():
    model, tokenizer = judge()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    base = ids.clone()
    base[:, 1:-1] = tokenizer.mask_token_id
    plain = LayerIntegratedGradients(
        lambda given: model(given).logits.log_softmax(1)[:, 2], model.get_input_embeddings()
    ).attribute(ids, baselines=base, n_steps=50)
    found = explain_label(model, tokenizer, TEXT, label="good")
    assert found.steps == 50
    assert [one.score for one in found.tokens] == pytest.approx(plain[0, 1:-1].sum(1).tolist(), abs=1e-5)


def test_without_captum_the_command_that_gets_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(MissingError) as told:
        import_captum()
    assert told.value.hint == 'pip install "llmkit[explain]"'


# --- classes and numbers


def test_a_class_is_explained_by_its_log_probability():
    model, tokenizer = judge()
    logits = model(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    found = explain_label(model, tokenizer, TEXT)
    first, second = (model.config.id2label[int(number)] for number in logits.topk(2).indices)
    assert (found.label, found.runner_up, found.unit) == (first, second, "log probability")
    assert found.value == pytest.approx(logits.log_softmax(0).max().item(), abs=1e-5)
    assert found.probability == pytest.approx(logits.softmax(0).max().item(), abs=1e-5)
    assert found.baseline == "[MASK]"
    total = sum(one.score for one in found.tokens)
    assert total == pytest.approx(found.value - found.baseline_value + found.delta, abs=1e-6)
    assert sum(one.score for one in found.words) == pytest.approx(total, abs=1e-6)
    assert found.is_complete
    other = explain_label(model, tokenizer, TEXT, label=second)
    assert other.value == pytest.approx(logits.log_softmax(0).topk(2).values[1].item(), abs=1e-5)
    assert (other.label, other.runner_up) == (second, first)


def test_a_number_and_classes_that_apply_by_themselves():
    model, tokenizer = judge(1, problem_type="regression")
    found = explain_label(model, tokenizer, TEXT)
    value = model(**tokenizer(TEXT, return_tensors="pt")).logits.item()
    assert (found.label, found.unit, found.probability) == ("score", "score", None)
    assert found.value == pytest.approx(value, abs=1e-5)
    with pytest.raises(UsageError, match="one number"):
        explain_label(model, tokenizer, TEXT, label="good")
    model, tokenizer = judge(3, problem_type="multi_label_classification")
    found = explain_label(model, tokenizer, TEXT, label="fair")
    logit = model(**tokenizer(TEXT, return_tensors="pt")).logits[0, 1]
    assert (found.unit, found.value) == ("log odds", pytest.approx(logit.item(), abs=1e-5))
    assert found.probability == pytest.approx(logit.sigmoid().item(), abs=1e-5)


def test_pairs_and_texts_that_are_too_long():
    model, tokenizer = judge()
    found = explain_label(model, tokenizer, TEXT, "a blue dog")
    value = model(**tokenizer(TEXT, "a blue dog", return_tensors="pt")).logits.log_softmax(1).max().item()
    assert found.value == pytest.approx(value, abs=1e-5)
    assert [one.piece for one in found.words if one.part == 1] == ["a", "blue", "dog"]
    assert "".join(one.piece for one in found.words if one.part == 0) == TEXT.replace(" ", "")
    short = explain_label(model, tokenizer, TEXT, longest=5)
    whole = len(tokenizer(TEXT)["input_ids"])
    assert (len(short.tokens), short.cut) == (3, whole - 5)


def test_padding_as_baseline_does_not_change_what_a_decoder_reads():
    torch.manual_seed(1)
    tokenizer = tuning.tokenizer_of("gpt2")
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        pad_token_id=end,
        num_labels=2,
    )
    model = GPT2ForSequenceClassification(config).eval()
    found = explain_label(model, tokenizer, TEXT)
    # The baseline is the padding token: taken by its id, the model would read no text at all.
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    nothing = model.get_input_embeddings()(torch.full_like(ids, end))
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, made: nothing)
    value = model(ids).logits.log_softmax(1)[0, int(found.label[-1])].item()
    hook.remove()
    assert found.baseline_value == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"label": "goood"}, "did you mean 'good'"),
        ({"label": "zzz"}, "it has bad, fair, good"),
        ({"text": ""}, "no text"),
    ],
    ids=str,
)
def test_what_cannot_be_explained_is_named(words, said):
    model, tokenizer = judge()
    with pytest.raises(UsageError) as told:
        explain_label(model, tokenizer, **{"text": TEXT, **words})
    assert said in str(told.value)


def test_models_that_cannot_be_explained_are_named():
    _, tokenizer = judge()
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    with pytest.raises(UsageError, match="encoder and decoder"):
        explain_label(BartForSequenceClassification(config), tokenizer, TEXT)
    toy = Toy(lambda values_BT: values_BT.sum(1))
    toy.get_input_embeddings = lambda: None
    with pytest.raises(UsageError, match="no gradients"):
        integrated_gradients(toy, toy, torch.tensor([[1]]), torch.tensor([[0]]), 5)


# --- the next token


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_next_token_and_longer_continuations(family):
    model = AutoModelForCausalLM.from_pretrained(tuning.model(family)).eval()
    tokenizer = tuning.tokenizer_of(family)
    ids = tokenizer(TEXT)["input_ids"]
    log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
    found = explain_next(model, tokenizer, TEXT)
    best, second = log_p.topk(2).indices.tolist()
    assert (found.label, found.runner_up) == (tokenizer.decode([best]), tokenizer.decode([second]))
    assert found.value == pytest.approx(log_p.max().item(), abs=1e-4)
    assert found.is_complete
    more = tokenizer(" and walks")["input_ids"]
    assert len(more) > 1
    longer = explain_next(model, tokenizer, TEXT, token=" and walks")
    both = model(torch.tensor([[*ids, *more]])).logits[0].log_softmax(1)
    total = sum(both[len(ids) - 1 + place, number].item() for place, number in enumerate(more))
    assert longer.value == pytest.approx(total, abs=1e-4)
    assert len(longer.tokens) == len(ids)  # the continuation explains nothing
    assert longer.is_complete
    with pytest.raises(UsageError, match="reads at most"):
        explain_next(model, tokenizer, TEXT, longest=len(ids) - 1)
    with pytest.raises(UsageError, match="no token"):
        explain_next(model, tokenizer, TEXT, token="")


def test_of_a_model_that_gives_all_positions_the_last_count():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    log_p = logits.log_softmax(2)
    expected = log_p[:, 3, 6] + log_p[:, 4, 1]
    assert torch.allclose(_log_p_of([6, 1])(logits), expected)


# --- words


def words_of(family, text):
    read = read_text(tuning.tokenizer_of(family), text, None, None, framed=family == "bert")
    tokens = with_scores(read, [1.0] * len(read.ids))
    return [(one.piece, one.score) for one in joined(tokens, read.texts)]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pieces_are_joined_to_words_and_their_scores_added(family):
    found = words_of(family, "the xylophone, unheard")
    assert [piece.strip() for piece, _ in found] == ["the", "xylophone", ",", "unheard"]
    pieces = len(tuning.tokenizer_of(family)("the xylophone, unheard", add_special_tokens=False)["input_ids"])
    assert sum(score for _, score in found) == pieces > 4


def test_signs_that_are_words_stand_alone_and_bytes_of_one_are_joined():
    found = words_of("llama", "从前有座山 ok")  # no token of this vocabulary has a whole sign
    assert [piece for piece, _ in found] == ["从", "前", "有", "座", "山", " ok"]
    assert [score for _, score in found][:5] == [3.0] * 5


# --- shown


def row(**changes):
    words = [
        {"piece": "not", "score": -2.0, "start": 0, "end": 3, "part": 0},
        {"piece": "so", "score": 0.01, "start": 4, "end": 6, "part": 0},
        {"piece": "<b>", "score": 1.0, "start": 7, "end": 10, "part": 0},
    ]
    facts = {
        "label": "good",
        "unit": "log probability",
        "value": -0.5,
        "probability": 0.6,
        "baseline": "[MASK]",
    }
    numbers = {"baseline_value": 0.5, "delta": 0.01, "steps": 50}
    return {"text": "not so <b>", **facts, **numbers, "words": words, "tokens": words, **changes}


def test_words_are_coloured_by_sign_and_strength():
    tints = ("38;5;16;48;5;153",)
    found = stretches(row(), 0, tints)
    assert [text for text, _ in found] == ["", "not", " ", "so", " ", "<b>", ""]
    styles = dict(found)
    assert styles["not"].endswith(";203")  # the strongest, against it
    assert styles["<b>"].endswith(";157")  # half as strong, for it
    assert styles["so"] == ""
    assert dict(stretches(row(), 0, ("30;46",)))["not"] == "30;41"


def test_without_colours_scores_stand_behind_words():
    lines = shown(row(), Terminal(60))
    assert lines[0] == "good, 60%"
    assert lines[1] == "not(-2.00) so <b>(+1.00)"
    assert lines[2:5] == ["for it      against it", "+1.000 <b>  -2.000 not", "+0.010 so"]
    assert lines[-1] == balance(row())
    assert "-0.500; with [MASK] for every word 0.500: a change of -1.000" in lines[-1]
    assert "make -0.990 (50 steps)" in lines[-1]


def test_wide_signs_take_two_columns():
    words = [{"piece": "好", "score": 1.0, "start": 0, "end": 1, "part": 0}]
    words.append({"piece": "坏", "score": -1.0, "start": 1, "end": 2, "part": 0})
    lines = shown(row(text="好坏", words=words), Terminal(60))
    assert lines[2:4] == ["for it     against it", "+1.000 好  -1.000 坏"]


def test_the_page_is_tinted_and_what_the_text_says_is_text():
    page = explained({"tables": {"explained": [row(), row(text="<i>", words=[], label="<u>")]}})
    assert "<b>" not in page
    assert "<u>" not in page
    assert 'title="-2.000">not</span>' in page
    assert "</span> so <span" in page  # too weak for a tint
    assert explained({}) == ""
    assert heading(row(unit="score", value=3.25, probability=None, label="score")) == "score: 3.25"


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that learned classes."""
    place = tmp_path_factory.mktemp("explained")
    tuning.finetune(place, "cls")
    return place


def test_a_run_is_explained_and_a_report_left(folder, capsys):
    runs = str(folder / "runs")
    assert main(["explain", "cls", TEXT, "the blue dog", "--runs", runs]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["explained"]
    assert [one["text"] for one in rows] == [TEXT, "the blue dog"]
    assert {one["label"] for one in rows} <= {"red", "green", "blue", "white", "black"}
    assert all(one["complete"] for one in rows)
    report = json.loads((folder / "runs" / "cls" / "explain" / "report.json").read_bytes())
    assert report["tables"]["explained"] == rows
    assert report["kind"] == "explain"
    assert "What the model looked at" in (folder / "runs" / "cls" / "explain" / "report.html").read_text()
    assert f"llmkit explain cls '{TEXT}' --label {rows[0]['runner_up']}" in err
    said = explain("cls", [TEXT], options(folder), make_reporter(quiet=True), label="white")
    assert said.summary["explained"][0]["label"] == "white"
    assert said.next_command == f"llmkit predict cls '{TEXT}'"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cls", "a", "--token", "b"], "--label LABEL explains a class"),
        (["cls", "a", "--label", "purple"], "no class"),
        (["LLAMA", "a", "--label", "b"], "predicts the next token"),
        (["LLAMA", "a", "--other", "b"], "predicts the next token"),
        (["BERT", "a"], "cannot be explained"),
        (["nothing", "a"], "no model in 'nothing'"),
    ],
    ids=" ".join,
)
def test_what_a_model_does_not_say_is_refused(words, said, folder, capsys):
    models = {"LLAMA": tuning.model("llama"), "BERT": tuning.model("bert")}
    given = [models.get(word, word) for word in words]
    assert main(["explain", *given, "--runs", str(folder / "runs")]) in (2, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
