"""Masked language modelling: what is hidden, what stands there, and the loss of transformers' own models."""

import re
import sys
from collections import Counter

import numpy as np
import objectives
import pytest
import torch
from transformers import AutoConfig

from llmkit.data.tokenizers import learn, open_tokenizer
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import MissingError, RecipeError, UsageError
from llmkit.models.build import AUTO_CLASSES
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.masking import Masking
from llmkit.objectives.words import Words
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Tokenize

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
CHINESE = "中国人民在自己的土地上建设社会主义国家，北京大学的学生研究自然语言处理。"


def vocabulary_of(tmp_path, algorithm, texts, size=900):
    learn(texts, [], Tokenize(algorithm=algorithm, vocab_size=size), tmp_path)
    return Vocabulary.of(open_tokenizer(str(tmp_path)))


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    return vocabulary_of(tmp_path_factory.mktemp("zh"), "chars", [POEM * 20, CHINESE * 20])


def hidden(masking, ids, seed):
    read, targets = masking.hide(ids, np.random.default_rng(seed))
    return read, targets, targets != NOT_LEARNED


def test_the_share_of_hidden_tokens_is_exact_and_special_ones_stay():
    vocabulary = objectives.vocabulary("mlm")
    masking = Masking.of(vocabulary, ratio=0.15, mask_ratio=0.8, random_ratio=0.1)
    special = vocabulary.role("sep_token")
    for length in (1, 2, 9, 10, 57, 126):
        ids = np.array([special, *vocabulary.encode("def read(self): " * 80)[:length], special])
        for seed in range(20):
            _, targets, is_hidden = hidden(masking, ids, seed)
            assert is_hidden.sum() == max(1, round(0.15 * length))
            assert not is_hidden[[0, -1]].any()
            assert np.array_equal(targets[is_hidden], ids[is_hidden])
    only_special = np.array([special, special])
    assert not hidden(masking, only_special, 0)[2].any()


def test_eighty_ten_ten():
    vocabulary = objectives.vocabulary("mlm")
    masking = Masking.of(vocabulary, ratio=0.15, mask_ratio=0.8, random_ratio=0.1)
    ids = np.array(vocabulary.encode("def read(self, size): return 1 " * 8))
    fates, placed = Counter(), Counter()
    for seed in range(2000):
        read, _, is_hidden = hidden(masking, ids, seed)
        assert np.array_equal(read[~is_hidden], ids[~is_hidden])
        for got, was in zip(read[is_hidden].tolist(), ids[is_hidden].tolist(), strict=True):
            fates["mask" if got == masking.mask_id else "same" if got == was else "random"] += 1
            if got not in (masking.mask_id, was):
                placed[got] += 1
    total = sum(fates.values())
    # A random token is the hidden one itself once in V - specials times; 5 standard deviations of a share of 10 %.
    tolerance = 5 * (0.1 * 0.9 / total) ** 0.5
    assert fates["mask"] / total == pytest.approx(0.8, abs=2 * tolerance)
    assert fates["random"] / total == pytest.approx(0.1, abs=tolerance)
    assert not set(placed) & set(vocabulary.special_ids)
    assert len(placed) > 0.9 * (vocabulary.size - len(vocabulary.special_ids)), "not all tokens are placed"


def test_every_token_is_hidden_equally_often():
    vocabulary = objectives.vocabulary("mlm")
    masking = Masking.of(vocabulary, ratio=0.15)
    ids = np.array(vocabulary.encode("import json and textwrap; def read(self)"))
    counts = sum(hidden(masking, ids, seed)[2].astype(int) for seed in range(3000))
    expected = 3000 * round(0.15 * len(ids)) / len(ids)
    assert np.abs(counts - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "chars", "unigram"])
def test_english_words_are_found_in_their_pieces(algorithm, tmp_path):
    text = (
        "Return the indentation_level of every unquestionably malformed paragraph, e.g. 'x1 y22'.\n\tNaïve?"
    )
    vocabulary = vocabulary_of(tmp_path, algorithm, ["the of every level indent paragraph return " * 20], 600)
    ids = np.array(vocabulary.encode(text))
    groups = Words(vocabulary).groups(ids)
    words = Counter()
    for group in range(groups.max() + 1):
        word = b"".join(vocabulary.spellings[number] for number in ids[groups == group]).decode()
        words[word.strip()] += 1
    assert len(ids) > groups.max() + 5, "no word has pieces: nothing was tested"
    for word in ("Return", "indentation", "unquestionably", "malformed", "Naïve"):
        assert words[word] == 1, (word, words)


def test_chinese_words_are_those_of_jieba(chinese):
    import rjieba

    ids = np.array(chinese.encode(CHINESE))
    groups = Words(chinese).groups(ids)
    spelled = [
        b"".join(chinese.spellings[number] for number in ids[groups == group]).decode()
        for group in range(groups.max() + 1)
    ]
    assert spelled == [word for run in re.split("([，。])", CHINESE) if run for word in rjieba.cut(run)]
    assert max(map(len, spelled)) >= 2


def test_a_character_in_bytes_is_one_word(chinese):
    ids = np.array(chinese.encode("鑫😀 x"))
    assert len(ids) >= 8
    groups = Words(chinese).groups(ids)
    assert groups.tolist() == [0] * 3 + [1] * 4 + [2] * (len(ids) - 7)


def test_tokens_across_chinese_words_are_joined(tmp_path):
    """Where byte pairs of Chinese do not keep to words, all words that a token touches go together."""
    vocabulary = vocabulary_of(tmp_path, "bpe", [(POEM + CHINESE) * 30], 420)
    ids = np.array(vocabulary.encode(POEM))
    groups = Words(vocabulary).groups(ids)
    for group in range(groups.max() + 1):
        b"".join(
            vocabulary.spellings[n] for n in ids[groups == group]
        ).decode()  # never a part of a character
    assert (np.diff(groups) >= 0).all()


def test_whole_words_are_hidden_whole_and_counted_in_tokens(chinese):
    words = Words(chinese)
    masking = Masking.of(chinese, ratio=0.15, whole_words=True)
    ids = np.array([chinese.role("cls_token"), *chinese.encode(CHINESE + POEM), chinese.role("sep_token")])
    groups = words.groups(ids)
    sizes, seen = [], set()
    for seed in range(200):
        _, _, is_hidden = hidden(masking, ids, seed)
        for group in set(groups[is_hidden].tolist()):
            assert is_hidden[groups == group].all()
            seen.add(group)
        sizes.append(int(is_hidden.sum()))
    wanted = round(0.15 * (len(ids) - 2))
    assert max(sizes) <= wanted
    assert np.mean(sizes) > wanted - 0.5, "words that fit are left out"
    assert len(seen) == groups.max() - 1  # all but [CLS] and [SEP]


def test_a_row_of_one_long_word_still_has_a_target(chinese):
    masking = Masking.of(chinese, ratio=0.15, whole_words=True)
    ids = np.array(chinese.encode("unquestionably"))
    assert hidden(masking, ids, 0)[2].all()


def test_chinese_words_without_rjieba_is_said_with_the_command(chinese, monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(MissingError, match="rjieba") as caught:
        Masking.of(chinese, ratio=0.15, whole_words=True)
    assert caught.value.hint == "pip install 'llmkit[zh]'"
    Masking.of(objectives.vocabulary("mlm"), ratio=0.15, whole_words=True)  # knows no Chinese: needs nothing


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    vocabulary = vocabulary_of(tmp_path, "bpe", [POEM], 300)
    with pytest.raises(UsageError, match="has no"):
        Masking.of(vocabulary, ratio=0.15)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "bert": SMALL,
    "roberta": SMALL,
    "modernbert": {**SMALL, "local_attention": 8, "global_attn_every_n_layers": 2},
    "electra": {**SMALL, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_loss_is_that_of_transformers(model_type):
    vocabulary = objectives.vocabulary("mlm")
    pad, end = vocabulary.role("pad_token"), vocabulary.role("sep_token")
    torch.manual_seed(0)
    ids = {
        "pad_token_id": pad,
        "bos_token_id": end,
        "eos_token_id": end,
        "cls_token_id": end,
        "sep_token_id": end,
    }
    fields = {**MODELS[model_type], **ids, "vocab_size": vocabulary.size, "max_position_embeddings": 64}
    model = AUTO_CLASSES["masked"].from_config(AutoConfig.for_model(model_type, **fields)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    choose_heads(model, "masked")
    made = objectives.make("mlm")
    rows = objectives.rows("mlm", 4)
    rows[2] = {name: array[:7] if array.ndim else array for name, array in rows[2].items()}
    batch = made.collate([made.encode(row) for row in rows])
    assert "attention_mask" in batch
    theirs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]
    ).loss
    loss = made.loss(model, batch)
    assert float(loss.mean(batch)) == pytest.approx(float(theirs), rel=1e-5)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    right = (logits.argmax(-1) == batch["targets"]).sum()
    figures = made.summarise({"total": float(loss.total), "num_targets": 10.0, "correct": float(right)})
    assert float(loss.sums["correct"]) == float(right)
    assert figures["accuracy"] == float(right) / 10
    assert figures["perplexity"] == pytest.approx(np.exp(float(loss.total) / 10))


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"mlm": {"mask_ratio": 0.8, "random_ratio": 0.3}}, "more than all", "80%"),
        ({"nsp": {}}, "`nsp`: objective `mlm` has no such settings", "mlm+nsp"),
        ({"checkpoint": {"keep_best": "eval/bits_per_byte"}}, "is not measured of `mlm`", "accuracy"),
    ],
)
def test_settings_that_would_do_nothing_are_errors(settings, said, hint):
    pretrain = {"objective": "mlm", "train": {"length": "1h"}, "data": {"files": "a.txt"}, **settings}
    with pytest.raises(RecipeError) as caught:
        load_recipe({"llmkit": 1, "tokenize": {}, "pretrain": pretrain})
    [problem] = caught.value.problems
    assert said in problem
    assert hint in problem


def test_settings_of_other_objectives_are_not_written_out():
    pretrain = {
        "objective": "mlm",
        "train": {"length": "1h"},
        "data": {"files": "a.txt"},
        "mlm": {"ratio": 0.3},
    }
    from llmkit.recipe import resolved_yaml

    text = resolved_yaml(load_recipe({"llmkit": 1, "tokenize": {}, "pretrain": pretrain}))
    assert "ratio: 0.3" in text
    assert not re.search(r"^  (nsp|electra|span|fim):", text, re.MULTILINE)
