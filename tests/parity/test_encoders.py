"""The fast encoder gives the very ids of `tokenizers`, or is not used."""

import inspect
import json
import random
import subprocess
import textwrap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmkit.data import encode
from llmkit.data.encode import CheckedEncoder, Verdict, prove
from llmkit.data.tokenizers import LightTokenizer, learn, open_tokenizer
from llmkit.errors import DataError, UsageError
from llmkit.recipe.schema import Tokenize

pytest.importorskip("gigatoken")

CHINESE = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" * 8
)
TEXTS = [
    *(inspect.getsource(module) for module in (json, textwrap, subprocess)),
    CHINESE,
    "emoji 😀👍🏽 " * 50,
]
CODE_POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
FORMS = ("x{0}y", " {0}{0} 1{0}", "{0}\n{0}a'S{0}!{0}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    learn(TEXTS, [], Tokenize(vocab_size=2000), folder)
    return open_tokenizer(str(folder))


def ids_of(tokenizer, texts):
    """What the library that defines the ids says, by the plainest call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def assert_equal(tokenizer, texts):
    fast = encode._fast_encoder(tokenizer)
    for text, expected in zip(texts, ids_of(tokenizer, texts), strict=True):
        assert fast(text).tolist() == expected, text


def test_real_text_and_difficult_text(tokenizer):
    assert_equal(tokenizer, [*TEXTS, *encode._DIFFICULT])
    verdict = prove(tokenizer, TEXTS)
    assert verdict.encoder == "gigatoken"
    assert verdict.compared_documents == len(TEXTS)
    assert verdict.compared_bytes == sum(len(text.encode()) for text in TEXTS)


def test_code_points_drawn_at_random(tokenizer):
    drawn = random.Random(5).sample(CODE_POINTS, 3000) + list(range(0x300)) + list(range(0x2000, 0x2100))
    assert_equal(tokenizer, [form.format(chr(point)) for point in drawn for form in FORMS])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", FORMS)
def test_every_code_point(tokenizer, form):
    fast = encode._fast_encoder(tokenizer)
    for start in range(0, len(CODE_POINTS), 20_000):
        texts = [form.format(chr(point)) for point in CODE_POINTS[start : start + 20_000]]
        for text, expected in zip(texts, encode._reference_batch(tokenizer, texts), strict=True):
            assert np.array_equal(fast(text), expected), text


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.text(max_size=40),
            st.text(alphabet=" \n\t\r'sStTdDmM.,!?0123456789aAzZ的是。\u3000\u200d\u0301é😀<|>", max_size=60),
            st.sampled_from(["<|endoftext|>", "'ll", "\r\n", "  ", "don't", "ﬁ", "İ", "한국", "ไทย", "۱۲"]),
        ),
        max_size=8,
    )
)
def test_anything(tokenizer, pieces):
    assert_equal(tokenizer, ["".join(pieces)])


def test_special_tokens_in_text_stay_text(tokenizer):
    text = "a <|endoftext|> b <|pad|>"
    ids = encode._fast_encoder(tokenizer)(text).tolist()
    assert ids == ids_of(tokenizer, [text])[0]
    assert not {*ids} & {*tokenizer.all_special_ids}
    assert tokenizer.decode(ids) == text


def test_ordinary_added_words_are_left_to_the_reference(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(["hello world"])
    other = LightTokenizer(backend, "", tokenizer.special_tokens_map)
    verdict = prove(other, ["no such words"])
    assert verdict.encoder == "tokenizers"
    assert "added tokens" in verdict.reason


@pytest.mark.parametrize("text", [CHINESE, "x" * 50_000 + " 黄河"])
def test_each_batch_is_compared_however_long_its_documents_are(tokenizer, monkeypatch, text):
    right = encode._fast_encoder(tokenizer)
    monkeypatch.setattr(encode, "_fast_encoder", lambda _: lambda text: right(text) + 1)
    with pytest.raises(DataError, match="other ids"):
        CheckedEncoder(tokenizer, "gigatoken")([text, text])


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram"])
def test_an_unknown_kind_of_tokenizer_is_encoded_by_the_reference(tmp_path, algorithm):
    learn(TEXTS, [], Tokenize(algorithm=algorithm, vocab_size=1200), tmp_path)
    other = open_tokenizer(str(tmp_path))
    verdict = prove(other, TEXTS)
    assert (verdict.encoder, verdict.compared_documents) == ("tokenizers", 0)
    assert "does not know" in verdict.reason
    found = CheckedEncoder(other, verdict.encoder)(TEXTS)
    assert [ids.tolist() for ids in found] == ids_of(other, TEXTS)


def test_one_wrong_id_in_the_sample_and_the_reference_is_used(tokenizer, monkeypatch):
    right = encode._fast_encoder(tokenizer)

    def wrong(text):
        ids = right(text)
        return ids + 1 if "黄河" in text else ids

    monkeypatch.setattr(encode, "_fast_encoder", lambda _: wrong)
    verdict = prove(tokenizer, TEXTS)
    assert verdict.encoder == "tokenizers"
    assert "床前" in verdict.reason
    assert prove(tokenizer, TEXTS[:3]).encoder == "gigatoken"
    # A difference that shows later stops the run instead of writing other ids.
    with pytest.raises(DataError, match="other ids"):
        CheckedEncoder(tokenizer, "gigatoken", share=1.0)([CHINESE])


def test_the_environment_pins_an_encoder(tokenizer, monkeypatch):
    monkeypatch.setenv("LLMKIT_ENCODER", "tokenizers")
    assert prove(tokenizer, TEXTS).encoder == "tokenizers"
    monkeypatch.setenv("LLMKIT_ENCODER", "gigatoken")
    assert isinstance(prove(tokenizer, TEXTS), Verdict)
    monkeypatch.setattr(encode, "_fast_encoder", lambda _: lambda text: np.zeros(1, np.uint32))
    with pytest.raises(UsageError, match="other ids"):
        prove(tokenizer, TEXTS)
    monkeypatch.setenv("LLMKIT_ENCODER", "tiktoken")
    with pytest.raises(UsageError, match="no such encoder"):
        prove(tokenizer, TEXTS)
