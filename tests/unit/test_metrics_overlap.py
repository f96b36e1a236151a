"""Overlap of texts: equal to sacrebleu and rouge-score, by hand where those have no say."""

import builtins
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer, lcs_ind
from rouge_score.rouge_scorer import _score_lcs as reference_lcs
from sacrebleu import corpus_bleu, corpus_chrf

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.metrics.bleu import bleu, chrf, tokenisation_of
from llmkit.metrics.repetition import distinct, repetition
from llmkit.metrics.rouge import NAMES, _members, common_length, cutter, rouge, rouge_rows

words = st.sampled_from(
    ["the", "cats", "running", "a", "9", "Caffè", "dog's", "was", "wa", "\n", ".", "generously"]
)
texts = st.lists(words, max_size=14).map(" ".join)
RU = "Кошка сидит на столе"


@settings(deadline=None, max_examples=120)
@given(texts, texts)
def test_rouge_equals_rouge_score(prediction, reference):
    expected = RougeScorer(list(NAMES)).score(reference, prediction)
    found = rouge_rows([prediction], [[reference]])
    for name in NAMES:
        assert found[name][0] == pytest.approx(expected[name].fmeasure, abs=1e-12), name


@settings(deadline=None, max_examples=40)
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_rouge_with_stems_and_several_references_equals_rouge_score(prediction, references):
    expected = RougeScorer(list(NAMES), use_stemmer=True).score_multi(references, prediction)
    found = rouge([prediction], [references], stem=PorterStemmer().stem)
    assert [found[name] for name in NAMES] == pytest.approx(
        [expected[name].fmeasure for name in NAMES], abs=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abc"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90))
def test_common_length_equals_the_table(first, second):
    """More than one machine word of bits."""
    precision = reference_lcs(first, second).precision
    assert common_length(first, second) == round(precision * len(second))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_of_several_common_runs_the_same_one_is_read_out(first, second):
    assert _members(first, second) == set(lcs_ind(first, second))


def test_rouge_by_hand():
    """The wanted `the cat sat on the mat`, found `the cat on a mat`."""
    found = rouge(["the cat on a mat"], [["The cat sat on the mat."]])
    assert found["rouge1"] == pytest.approx(2 * 4 / 11)  # the cat on mat
    assert found["rouge2"] == pytest.approx(2 * 1 / 9)  # the cat
    assert found["rougeL"] == pytest.approx(2 * 4 / 11)


def test_chinese_is_compared_by_character_and_other_words_whole():
    assert cutter("zh")("我用 GPT-4写，２０年") == ["我", "用", "gpt", "4", "写", "２０", "年"]
    found = rouge(["今天很好"], [["今天天气很好"]], language="zh")
    assert found["rouge1"] == pytest.approx(2 * 4 / 10)
    assert found["rouge2"] == pytest.approx(2 * 2 / 8)  # 今天 很好
    assert found["rougeL"] == pytest.approx(2 * 4 / 10)


def test_a_chinese_sentence_ends_at_its_stop():
    """Sentences in another order: the whole has a common run of one of them, the summary has both."""
    found = rouge(["很好。今天"], [["今天。很好"]], language="zh")
    assert found["rougeL"] == pytest.approx(1 / 2)
    assert found["rougeLsum"] == 1


def test_words_of_other_scripts_count():
    assert rouge([RU], [[RU]], language="ru")["rouge2"] == 1
    assert cutter("hi")("हिन्दी में।") == ["हिन्दी", "में"]
    assert cutter("fr")("L'été déjà") == ["l", "été", "déjà"]


@pytest.mark.parametrize("reference", ["今天天气很好", RU])
def test_english_rouge_of_text_it_cannot_see_is_refused(reference):
    with pytest.raises(UsageError, match="not ASCII") as caught:
        rouge(["x"], [[reference]])
    assert "language: zh" in caught.value.hint


def test_empty_texts_score_nothing():
    assert set(rouge([""], [["a cat"]]).values()) == {0.0}
    assert set(rouge(["a cat"], [[""]]).values()) == {0.0}
    assert set(rouge([""], [[""]]).values()) == {0.0}
    with pytest.raises(DataError, match="no rows"):
        rouge([], [])


EN = (["The cat sat on the mat.", "It's 3.5% of all"], [["The cat is on the mat."], ["It's 3.5 % of it all"]])
ZH = (["今天天气很好，我们去NBA。", "他说了"], [["今天天气真好，我们去看NBA。"], ["他说过了"]])


@pytest.mark.parametrize(
    ("case", "language", "cut"), [(EN, "en", "13a"), (ZH, "zh", "zh"), (ZH, "zh-TW", "zh")]
)
def test_bleu_and_chrf_equal_sacrebleu(case, language, cut):
    predictions, references = case
    columns = [list(column) for column in zip(*references, strict=True)]
    found = bleu(predictions, references, language=language)
    assert found.value == corpus_bleu(predictions, columns, tokenize=cut).score > 20
    assert f"tok:{cut}|" in found.signature
    assert found.signature.startswith("nrefs:1|")
    assert chrf(predictions, references).value == corpus_chrf(predictions, columns).score
    plus = chrf(predictions, references, word_order=2)
    assert plus.value == corpus_chrf(predictions, columns, word_order=2).score
    assert "nw:2" in plus.signature


def test_rows_can_have_different_numbers_of_references():
    predictions = ["a cat sat on the mat", "two dogs ran away"]
    found = bleu(predictions, [["a cat sat on a mat", "the cat sat on the mat"], ["two dogs run away"]])
    expected = corpus_bleu(
        predictions, [["a cat sat on a mat", "two dogs run away"], ["the cat sat on the mat", None]]
    )
    assert found.value == expected.score
    assert "nrefs:var" in found.signature


def test_without_a_language_the_script_decides():
    assert tokenisation_of([text for row in ZH[1] for text in row]) == "zh"
    assert tokenisation_of(["a cat", "今"]) == "13a"
    assert tokenisation_of([""]) == "13a"
    assert tokenisation_of(["猫"], "ja") == "ja-mecab"


def test_chinese_cut_at_spaces_is_refused():
    """A sentence would be one token: sacrebleu says 0 to a translation that is nearly right."""
    columns = [list(column) for column in zip(*ZH[1], strict=True)]
    assert corpus_bleu(ZH[0], columns, tokenize="13a").score < 5 < bleu(*ZH, language="zh").value
    for options in ({"language": "en"}, {"tokenize": "13a"}):
        with pytest.raises(UsageError, match="most letters of the references are Han") as caught:
            bleu(*ZH, **options)
        assert "language: zh" in caught.value.hint


def test_without_sacrebleu_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("sacrebleu"):
            raise ImportError("No module named 'sacrebleu'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for figure in (bleu, chrf):
        with pytest.raises(MissingError, match="need sacrebleu") as caught:
            figure(*EN)
        assert caught.value.hint == "pip install 'llmkit[metrics]'"


def test_a_language_whose_words_need_a_further_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(MissingError) as caught:
        bleu(["猫が"], [["猫が"]], language="ja")
    assert caught.value.hint == "pip install 'sacrebleu[ja]'"


def test_variety_by_hand():
    """`a b a b` and `a b c`: 2-grams ab ba ab, ab bc: 3 of 5 differ; the first repeats one of three."""
    said = ["a b a b", "a b c"]
    assert distinct(said, 2) == 3 / 5
    assert distinct(said, 1) == 3 / 7
    assert repetition(said, 2) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition(["好好好好好"], 4, language="zh") == 1 / 2
    assert distinct(["", "a"], 4) == repetition(["a"], 4) == 0


def test_long_texts_equal_rouge_score():
    chance = np.random.default_rng(0)
    first, second = (" ".join(map(str, chance.integers(50, size=400))) for _ in range(2))
    found = rouge([first], [[second]])
    expected = RougeScorer(list(NAMES)).score(second, first)
    assert found == pytest.approx({name: expected[name].fmeasure for name in NAMES})
