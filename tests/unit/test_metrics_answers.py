"""Answers by the rules of the official scripts: expected values by hand; English words as nltk cuts them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize import word_tokenize

from llmkit.errors import DataError, RunError
from llmkit.metrics.answers import (
    answer_f1,
    answer_metrics,
    best_threshold,
    exact_match,
    mixed_tokens,
    normalised,
    score_answers,
)
from llmkit.metrics.treebank import words_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel  Tower!", "eiffel tower"),
        ("a cat, an ant and the dog", "cat ant and dog"),
        ("the-end", "theend"),  # punctuation goes before articles
        ("A.B.", "ab"),
        ("U.S.A", "usa"),
        ("theatre and another", "theatre and another"),
        ("«quoted»", "«quoted»"),  # only ASCII punctuation goes
        ("The the THE", ""),
        ("1,000", "1000"),
    ],
)
def test_what_does_not_count_in_squad(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("the Denver Broncos", "Denver Broncos.", 1, 1),
        ("Broncos Denver", "Denver Broncos", 0, 1),  # order does not count for F1
        ("Denver", "Denver Broncos", 0, 2 / 3),
        ("Denver Denver Broncos", "Denver Broncos", 0, 4 / 5),  # a word counts as often as both have it
        ("in the year 1066", "1066", 0, 1 / 2),
        ("Paris", "London", 0, 0),
        ("", "London", 0, 0),
    ],
)
def test_squad_by_hand(prediction, answer, exact, f1):
    for rules in ("squad", "squad2"):
        assert exact_match(prediction, answer, rules) == exact
        assert answer_f1(prediction, answer, rules) == pytest.approx(f1)


def test_of_two_empty_answers_only_the_second_version_makes_a_hit():
    assert (exact_match("the", ""), answer_f1("the", "")) == (1, 0)
    assert (exact_match("the", "", "squad2"), answer_f1("the", "", "squad2")) == (1, 1)
    assert answer_f1("a word", "", "squad2") == 0


def test_the_best_of_several_answers_counts():
    exact, f1 = score_answers(["Denver"], [["the Broncos", "Denver Broncos", "Denver, Colorado USA"]])
    assert (exact[0], f1[0]) == (0, pytest.approx(2 / 3))


def test_questions_without_answer_by_hand():
    """Four questions: right, half right, rightly empty, wrongly answered."""
    predictions = ["red", "red car", "", "blue"]
    answers = [["red"], ["car"], [], []]
    found = answer_metrics(predictions, answers, rules="squad2")
    assert found["exact_match"] == 100 * 2 / 4
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 4)
    assert found["has_answer_exact_match"] == 50
    assert found["has_answer_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert (found["no_answer_exact_match"], found["no_answer_f1"]) == (50, 50)


def test_the_threshold_is_searched_from_no_answer_at_all():
    """By rising doubt: has (1), has not but answered (-1), has (2/3), has not and empty (0), from the two without."""
    predictions = ["red", "blue", "red car", ""]
    answers = [["red"], [], ["car"], []]
    doubt = [0.1, 0.2, 0.3, 0.9]
    found = answer_metrics(predictions, answers, rules="squad2", no_answer_N=doubt, threshold=0.25)
    # Totals: 2, then 3, 2, 2 2/3, 2 2/3.
    assert (found["best_f1"], found["best_f1_threshold"]) == (75, 0.1)
    assert (found["best_exact_match"], found["best_exact_match_threshold"]) == (75, 0.1)
    # At 0.25 the third question is taken for one without answer, wrongly, and the second is not.
    assert found["f1"] == pytest.approx(100 * (1 + 0 + 0 + 1) / 4)
    assert found["has_answer_f1"] == 50


def test_where_nothing_gains_the_threshold_is_zero():
    assert best_threshold([0.0, 0.0], [True, False], [0.2, 0.5], [True, True]) == (50, 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.booleans(), st.booleans()), min_size=1, max_size=12)
)
def test_the_best_threshold_is_the_best_of_all(case):
    """With doubts that all differ: as good as the best of trying each, and no doubt at all."""
    scores, has, answered = map(np.array, zip(*case, strict=True))
    scores = np.where(has, scores, ~answered)
    doubt = np.random.default_rng(len(case)).permutation(len(case)) / 10 + 0.05
    best, threshold = best_threshold(scores, has, doubt, answered)
    tried = [np.where(doubt > limit, ~has, scores).mean() for limit in (-1, *doubt)]
    assert best == pytest.approx(100 * max(tried))
    if threshold:
        assert 100 * np.where(doubt > threshold, ~has, scores).mean() == pytest.approx(best)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("《战国无双3》", ["战", "国", "无", "双", "3"]),
        ("光荣和ω-force", ["光", "荣", "和", "ωforce"]),
        ("约1,000米，3.5%", ["约", "1,000", "米", "3.5", "%"]),
        ("don't 说", ["do", "n't", "说"]),
        ("龥龦", ["龥", "龦"]),
        ("……", ["……"]),  # no sign to the script, which lists it doubled and looks up single characters
        ("，。", []),
    ],
)
def test_mixed_text(text, expected):
    assert mixed_tokens(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("北京市", "北京", 0, 4 / 5),
        ("“北京”。", "北京", 1, 1),
        ("京北", "北京", 0, 1 / 2),  # a run, so order counts: one token
        ("北方的京城", "北京", 0, 2 / 7),
        ("1998年5月", "1998年", 0, 4 / 6),
        ("NBA 总冠军", "nba总冠军", 0, 1),  # the blank counts for the exact match, as in the script
        ("上海", "北京", 0, 0),
        ("", "北京", 0, 0),
    ],
)
def test_chinese_by_hand(prediction, answer, exact, f1):
    assert exact_match(prediction, answer, "cmrc") == exact
    assert answer_f1(prediction, answer, "cmrc") == pytest.approx(f1)


def test_chinese_question_without_answer():
    exact, f1 = score_answers(["", "北京"], [[], []], "cmrc")
    assert (exact.tolist(), f1.tolist()) == ([1, 0], [1, 0])


@pytest.mark.parametrize(
    "text",
    [
        "3.5%", "1,000 people", "$5 million", "don't stop", "he's here", "u.s. army", "the u.s.", "we'll, they've",
        "rock 'n' roll", "'tis", "o'neil", "players' union", "10:30 am", "a: b, c", "wait...", "x--y", "(a) [b] {c}",
        'a "quoted" text', '"whole"', "st. john", "cannot", "gonna", "what?!", "c++", "at&t", "#1 @x.com", "a,b",
        "end.)", "he said 'hi there'", "‘a’ “b” «c»", "1990–1999", "i'm", "can't, won't", "",
    ],
)  # fmt: skip
def test_words_are_cut_as_nltk_does(text):
    assert words_of(text) == word_tokenize(text, preserve_line=True)


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from("abts 019.-$%()"), max_size=12))
def test_words_and_signs_are_cut_as_nltk_does(text):
    assert words_of(text) == word_tokenize(text, preserve_line=True)


def test_bad_input():
    with pytest.raises(DataError, match="question 2 has no answer") as caught:
        score_answers(["a", "b"], [["a"], []])
    assert "squad2" in caught.value.hint
    with pytest.raises(DataError, match="no rows"):
        answer_metrics([], [])
    with pytest.raises(ValueError, match="2 rows of targets, but 1"):
        score_answers(["a"], [["a"], ["b"]])
    with pytest.raises(RunError, match="no-answer scores"):
        answer_metrics(["a"], [["a"]], no_answer_N=[np.nan])
