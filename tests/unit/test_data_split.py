import random

import pytest

from llmkit.data.split import UndividedError, document_hash, find_threshold, is_held_out, threshold_of_ratio
from llmkit.errors import DataError

TEXTS = [f"document {i} 文" for i in range(5000)]


def test_share_is_near_the_ratio_and_a_function_of_the_text_alone():
    share = sum(is_held_out(text, 0.1) for text in TEXTS) / len(TEXTS)
    assert abs(share - 0.1) < 0.015
    assert document_hash("abc") == 7574370118008991040
    assert not any(is_held_out(text, 0) for text in TEXTS)
    assert all(is_held_out(text, 1) for text in TEXTS)
    held_out = {text for text in TEXTS if is_held_out(text, 0.1)}
    assert held_out > {text for text in TEXTS if is_held_out(text, 0.05)}  # a larger ratio only adds


def test_threshold_is_the_ratio_where_that_holds_something_out():
    assert find_threshold(TEXTS, 0.1) == threshold_of_ratio(0.1)
    assert find_threshold(iter(()), 0) == 0
    assert find_threshold(iter(()), 1) == 2**64


def test_reading_stops_once_the_answer_is_known():
    texts = iter(TEXTS)
    find_threshold(texts, 0.1)
    assert len(list(texts)) > 4000


def test_the_smallest_hash_is_held_out_where_nothing_falls_in_whatever_the_order():
    texts = [text for text in TEXTS[:200] if not is_held_out(text, 0.01)]
    smallest = min(texts, key=document_hash)
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        threshold = find_threshold(texts, 0.01)
        assert [text for text in texts if document_hash(text) < threshold] == [smallest]


@pytest.mark.parametrize(
    ("texts", "what", "remedy"),
    [
        (["one"], "one single document", "documents: paragraph"),
        (["same", "same"], "all 2 documents are the same", "more text"),
        ([], "there is no text", "more text"),
    ],
)
def test_one_document_cannot_be_divided(texts, what, remedy):
    with pytest.raises(UndividedError, match=what) as caught:
        find_threshold(texts, 0.01)
    assert remedy in str(caught.value)
    assert "held_out: 0" in str(caught.value)
    assert find_threshold(texts, 0) == 0


def test_all_documents_held_out_is_refused():
    with pytest.raises(DataError, match="every document is held out"):
        find_threshold([text for text in TEXTS if is_held_out(text, 0.1)][:3], 0.1)
