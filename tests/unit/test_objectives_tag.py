"""Tags: losses beside transformers' own, words and their tokens, windows, entities beside seqeval."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import seqeval.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForTokenClassification
from tuning import CONTEXT, finetune, model, tokenizer_of

from llmkit.data.tokenizers import load_tokenizer
from llmkit.evaluate.predict import predict
from llmkit.objectives.base import NOT_LEARNED, LossModule, Material, size_of
from llmkit.objectives.make import make_task
from llmkit.objectives.pieces import WordPieces, windows, words_of
from llmkit.recipe.schema import Finetune

LABELS = ("O", "B-animal", "I-animal", "B-place", "I-place")
ROWS = [
    {"tokens": ["the", "red", "cat"], "tags": ["O", "O", "B-animal"]},
    {
        "tokens": ["it", "lives", "in", "New", "York", "City"],
        "tags": ["O", "O", "O", "B-place", "I-place", "I-place"],
    },
    {"tokens": ["Parisunbelievable", "\u200b", "!"], "tags": ["B-place", "I-place", "O"]},
]


def task_of(family="bert", labels=LABELS, context=CONTEXT, **settings):
    made = {"task": "tag", "model": {"name": "m"}, "data": {"files": "x"}, "tag": settings}
    return make_task(Finetune.model_validate(made), Material(tokenizer_of(family), context, labels))


def net_of(family):
    torch.manual_seed(5)
    return AutoModelForTokenClassification.from_pretrained(model(family), num_labels=len(LABELS)).eval()


def batch_of(objective, rows):
    return objective.collate([objective.encode({**row, "seed": 0}) for row in rows])


@pytest.mark.parametrize("pieces", ["first", "all"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
@torch.no_grad()
def test_the_loss_is_that_of_transformers(family, pieces):
    objective, net = task_of(family, pieces=pieces), net_of(family)
    batch = batch_of(objective, ROWS)
    loss = objective.loss(net, batch)
    names = ("input_ids", "attention_mask", "token_type_ids")
    own = net(**{name: batch[name] for name in names if name in batch}, labels=batch["targets"])
    count = int(batch["num_targets"])
    assert count == 12 if pieces == "first" else count > 12
    assert float(loss.total) / count == pytest.approx(float(own.loss), rel=1e-6)
    assert [len(tags) for tags in loss.found] == [3, 6, 3], "every word has one tag"
    alone = [objective.loss(net, batch_of(objective, [row])) for row in ROWS]
    assert sum(float(one.total) for one in alone) == pytest.approx(float(loss.total), rel=1e-5)
    assert [one.found[0] for one in alone] == list(loss.found)


def test_first_tokens_are_those_of_transformers_own_word_ids():
    objective, tokenizer = task_of(), tokenizer_of("bert")
    for row in ROWS[:2]:
        example = objective.encode(row)
        own = tokenizer(row["tokens"], is_split_into_words=True)
        assert example["input_ids"].tolist() == own["input_ids"]
        before, expected = None, []
        for word in own.word_ids():
            expected.append(
                NOT_LEARNED if word is None or word == before else LABELS.index(row["tags"][word])
            )
            before = word
        assert example["targets"].tolist() == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_words_are_cut_as_in_running_text(family):
    tokenizer = tokenizer_of(family)
    words = ["the", "red", "cat", "lives", "in", "Oslo"]
    assert WordPieces(tokenizer)(words).input_ids_T.tolist() == tokenizer(" ".join(words))["input_ids"]


def test_all_pieces_learn_the_tag_that_goes_on():
    objective = task_of(pieces="all")
    word = "unbelievableness"
    targets = objective.encode({"tokens": [word], "tags": ["B-place"]})["targets"]
    assert targets[0] == targets[-1] == NOT_LEARNED, "of [CLS] and [SEP] nothing is learned"
    assert targets[1:-1].tolist() == [3] + [4] * (len(targets) - 3)
    assert len(targets) > 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(3, 20), st.integers(0, 10))
def test_every_word_is_in_one_windows_share_and_windows_fit(lengths, room, overlap):
    found = windows(np.array(lengths), room, overlap)
    assert [word for window in found for word in range(window.first, window.last)] == list(
        range(len(lengths))
    )
    for window in found:
        assert window.start <= window.first < window.last <= window.stop
        tokens = sum(lengths[window.start : window.stop])
        assert tokens <= room or window.stop - window.start == 1
    for one, two in pairwise(found):
        assert one.start < two.start
        assert sum(lengths[two.start : one.stop]) <= overlap
    if sum(lengths) <= room:
        assert len(found) == 1


def test_a_long_sentence_is_read_in_windows_and_joined_again():
    objective = task_of(context=16, overlap=4)
    words = ["the", "cat", "in", "New", "York"] * 9
    row = {"tokens": words, "tags": ["O", "B-animal", "O", "B-place", "I-place"] * 9, "place": "a:1"}
    parts = objective.expand(row)
    examples = [objective.encode(part) for part in parts]
    assert len(parts) > 3
    assert all(size_of(objective, example) <= 16 and not int(example["cut"]) for example in examples)
    targets = np.concatenate([example["targets"] for example in examples])
    assert [LABELS[n] for n in targets[targets != NOT_LEARNED]] == row["tags"]
    right = [[LABELS.index(tag) for tag in part["tags"][slice(*part["share"])]] for part in parts]
    other = {"tokens": ["a"], "tags": ["B-animal"], "place": "a:9"}
    figures = objective.measure([*parts, other], [*right, [0]])
    expected = seqeval.metrics.f1_score([row["tags"], ["B-animal"]], [row["tags"], ["O"]])
    assert figures["f1"] == pytest.approx(expected)
    assert figures["recall"] == pytest.approx(18 / 19), "an entity that two windows share is one"
    assert objective.expand(ROWS[0]) == [ROWS[0]]


def test_an_entity_that_windows_part_is_one_and_right_as_a_whole_or_not_at_all():
    objective = task_of(context=16, overlap=4)
    row = {"tokens": ["York"] * 40, "tags": ["B-place"] + ["I-place"] * 39, "place": "a:1"}
    parts = objective.expand(row)
    found = [[LABELS.index(tag) for tag in part["tags"][slice(*part["share"])]] for part in parts]
    assert len(parts) > 2
    assert objective.measure(parts, found)["f1"] == 1.0
    found[-1][-1] = 0
    assert objective.measure(parts, found)["f1"] == 0.0
    assert objective.measure(parts[1:], found[1:])["f1"] == 0.0, "what is there of a sentence is joined too"


def test_a_word_that_is_longer_than_the_model_is_cut_and_counted():
    objective = task_of(context=8)
    [part] = objective.expand({"tokens": ["x" * 40], "tags": ["O"], "place": "a:1"})
    example = objective.encode(part)
    assert len(example["input_ids"]) == 8
    assert int(example["cut"]) > 0
    assert (example["targets"] != NOT_LEARNED).sum() == 1


def test_tags_without_marks_are_measured_by_the_word():
    objective = task_of(labels=("NOUN", "OTHER", "VERB"))
    row = {"tokens": ["a", "b", "c", "d"], "tags": ["NOUN", "NOUN", "OTHER", "VERB"]}
    figures = objective.measure([row], [[0, 1, 1, 2]])
    assert figures["accuracy"] == 0.75
    assert figures["recall"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert objective.predict(row, [0, 1, 1, 2])["entities"] == []


def test_what_is_said_of_a_plain_text():
    objective = task_of()
    said = objective.predict({"text": "It lives in New York."}, [0, 0, 0, 3, 4, 0])
    assert said["entities"] == [{"type": "place", "text": "New York", "start": 3, "end": 5}]
    assert words_of("他住在New York，很好。") == ["他", "住", "在", "New", "York", "，", "很", "好", "。"]
    example = objective.encode({"text": "他住在Rome"})
    assert int(example["starts"].sum()) == 4


@pytest.mark.parametrize("key", ["text", "tokens"])
def test_what_is_said_of_a_long_text_goes_to_its_end(key):
    """With a head whose every tag is a place's beginning, no word is outside; each is said once, in its order."""
    net = net_of("bert")
    with torch.no_grad():
        net.classifier.weight.zero_()
        net.classifier.bias.copy_(torch.tensor([0.0, 0, 0, 5, 0]))
    text = " ".join(["the", "red", "cat", "in", "Oslo"] * 60)
    row = {key: text if key == "text" else text.split()}
    [short, long] = predict(LossModule(net, task_of(), bf16=False), [{"text": "a cat"}, row])
    assert long["tokens"] == text.split()
    assert long["tags"] == ["B-place"] * 300
    assert short["tags"] == ["B-place"] * 2
    assert long["entities"][-1] == {"type": "place", "text": "Oslo", "start": 299, "end": 300}


def test_a_run_learns_to_tag(tmp_path):
    prompts = ["the cat lives in Oslo", "cat " * 300]
    folder = finetune(tmp_path, "tag", finetune__train__length="12 steps", finetune__prompts=prompts)
    samples = json.loads((folder / "report.json").read_text())["samples"]
    said = {one["prompt"]: json.loads(one["text"])["tags"] for one in samples}
    assert [len(said[prompt]) for prompt in prompts] == [5, 300]
    figures = json.loads((folder / "report.json").read_text())["final"]
    assert figures["eval/f1"] > 0.7
    config = json.loads((folder / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(LABELS)


def test_a_tokenizer_file_that_fills_texts_up_does_not_lengthen_rows(tmp_path):
    """Files of sentence encoders often ask for 128 tokens of each text; that is a caller's wish, not the model's."""
    plain = load_tokenizer(model("bert"))
    plain.backend_tokenizer.enable_padding(length=40, pad_id=0)
    plain.backend_tokenizer.enable_truncation(30)
    plain.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((Path(model("bert")) / name).read_text())
    read = load_tokenizer(str(tmp_path))
    assert len(read.backend_tokenizer.encode("red cat").ids) < 10
    assert len(read.backend_tokenizer.encode("red cat " * 50).ids) > 90
