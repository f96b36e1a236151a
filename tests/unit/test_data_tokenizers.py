import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizing import train_bpe
from transformers import AutoTokenizer

from llmkit.data.split import document_hash, threshold_of_ratio
from llmkit.data.tokenizers import (
    encode_documents,
    eos_id,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
)
from llmkit.errors import DataError, MissingError, RecipeError

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "从前",
    "有座山",
    "，山里",
    "有座庙",
    "naïve",
    "12",
]
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
WORDS += ["".join(random.Random(i).choices(SYLLABLES, k=3)) for i in range(300)]
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=40)) + f"\n\n{i}" for i in range(300)]

TRICKY = [
    "",
    " ",
    "Hello  world\n\n\tx  ",
    "从前有座山，山里有座庙。老和尚说：“GPT-4很好”",
    "😀👩‍👩‍👧 e\u0301 \u00e9 \ufb01 ½",
    "\x00\x01\x7f\r\n\r\x85\u2028",
    "a<|endoftext|>b<|pad|>c <|user|>",
    "don't I'LL  we've   1234567 . , !!!\n\n",
    "\ufeffx\uffff\U0010ffff",
    "مرحبا नमस्ते 한국어 ภาษาไทย",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(CORPUS, vocab_size=420, special_tokens=["<|user|>"], folder=folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def ids_of(texts, tokenizer, **options):
    return [ids.tolist() for _, ids in encode_documents(texts, tokenizer, **options)]


def test_every_text_comes_back(tokenizer):
    for text, ids in zip(TRICKY, ids_of(TRICKY, tokenizer), strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_that_spells_a_special_token_is_text(tokenizer):
    special = set(tokenizer.all_special_ids)
    assert special == {0, 1, 2}
    for text, ids in zip(TRICKY, ids_of(TRICKY, tokenizer), strict=True):
        assert not special & set(ids)
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]
    # and the caller's tokenizer goes on as before
    assert tokenizer("a<|endoftext|>b")["input_ids"][1] == 0


def test_ids_equal_plain_auto_tokenizers(folder, tokenizer):
    plain = AutoTokenizer.from_pretrained(str(folder))
    for text, ids in zip(TRICKY, ids_of(TRICKY, tokenizer), strict=True):
        if "<|" not in text:
            assert plain(text)["input_ids"] == ids
    assert (plain.eos_token_id, plain.bos_token_id, plain.pad_token_id) == (0, 0, 1)
    assert len(plain) == 420
    assert plain.convert_tokens_to_ids("<|user|>") == 2
    assert plain.model_max_length > 10**9  # no limit, rather than a wrong one


def test_a_callers_truncation_and_padding_do_not_reach_documents(tokenizer):
    expected = ids_of(CORPUS[:3], tokenizer)
    tokenizer(CORPUS[:3], truncation=True, max_length=4, padding=True)
    before = fingerprint(tokenizer)
    assert ids_of(CORPUS[:3], tokenizer) == expected
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert tokenizer.backend_tokenizer.padding is not None
    tokenizer(CORPUS[0], truncation=False, padding=False)
    assert fingerprint(tokenizer) == before


def test_batches_do_not_change_ids_and_arrays_are_small(tokenizer):
    assert ids_of(CORPUS, tokenizer, batch_chars=1) == ids_of(CORPUS, tokenizer)
    _, ids = next(encode_documents(CORPUS, tokenizer))
    assert ids.dtype == np.uint16
    assert token_dtype(tokenizer) is np.uint16


def test_wide_ids_need_uint32(tokenizer):
    class Wide:
        def __len__(self):
            return 5

        def get_vocab(self):
            return {"a": 0, "b": 65_536}

    assert token_dtype(Wide()) is np.uint32


def test_learning_does_not_depend_on_the_order_of_documents(folder, tmp_path):
    shuffled = random.Random(1).sample(CORPUS, len(CORPUS))
    train_bpe(shuffled, vocab_size=420, special_tokens=["<|user|>"], folder=tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_sample_is_bounded_and_does_not_depend_on_order(tmp_path):
    sizes = [len(text.encode()) for text in CORPUS]
    written = set()
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        shuffled = random.Random(seed).sample(CORPUS, len(CORPUS))
        figures = train_bpe(shuffled, vocab_size=300, sample_bytes=20_000, folder=tmp_path / str(seed))
        assert 20_000 - max(sizes) < figures["bytes"] <= 20_000
        written.add((tmp_path / str(seed) / "tokenizer.json").read_bytes())
    assert len(written) == 1


def test_learning_is_the_same_in_another_process(folder, tmp_path):
    script = (
        "import json, sys; from pathlib import Path; from tokenizing import train_bpe;"
        "train_bpe(json.load(sys.stdin), vocab_size=420, special_tokens=['<|user|>'], folder=Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input=json.dumps(CORPUS),
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_figures_are_of_the_held_out_documents(tmp_path):
    below = threshold_of_ratio(0.2)
    held_out = [text for text in CORPUS if document_hash(text) < below]
    figures = train_bpe(CORPUS, vocab_size=400, folder=tmp_path, held_out_below=below, max_length=128)
    tokenizer = load_tokenizer(str(tmp_path))
    num_tokens = sum(map(len, ids_of(held_out, tokenizer)))
    assert figures["documents"] == len(CORPUS) - len(held_out)
    assert figures["chars"] == sum(len(text) for text in CORPUS) - sum(map(len, held_out))
    assert figures["measured_on"] == "held-out documents"
    assert figures["chars_per_token"] == round(sum(map(len, held_out)) / num_tokens, 4)
    assert figures["bytes_per_token"] == round(sum(len(t.encode()) for t in held_out) / num_tokens, 4)
    assert figures["round_trip"] is True
    assert figures["vocab_size"] == 400
    assert figures["note"] == ""
    assert tokenizer.model_max_length == 128


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path):
    figures = train_bpe(["aaaa bbbb aaaa"], vocab_size=5000, folder=tmp_path)
    assert 258 < figures["vocab_size"] < 270
    assert "fewer than the 5,000 asked for" in figures["note"]
    assert len(load_tokenizer(str(tmp_path))) == figures["vocab_size"]


def test_vocabulary_smaller_than_the_byte_alphabet(tmp_path):
    with pytest.raises(RecipeError, match="256 bytes and 3 special tokens need 259"):
        train_bpe(CORPUS, vocab_size=258, special_tokens=["<|x|>"], folder=tmp_path)
    assert train_bpe(CORPUS, vocab_size=258, folder=tmp_path)["vocab_size"] == 258


def test_no_text(tmp_path):
    with pytest.raises(DataError, match="no text to learn"):
        train_bpe([], vocab_size=400, folder=tmp_path)


def test_fingerprint_follows_vocabulary_and_special_tokens(folder, tokenizer, tmp_path):
    first = fingerprint(tokenizer)
    assert fingerprint(load_tokenizer(str(folder))) == first
    train_bpe(CORPUS[:-1], vocab_size=420, special_tokens=["<|user|>"], folder=tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) != first
    other = load_tokenizer(str(folder))
    other.eos_token = "<|user|>"
    assert fingerprint(other) != first


def test_saving_keeps_ids_and_the_widely_known_class_name(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fingerprint(load_tokenizer(str(tmp_path))) == fingerprint(tokenizer)


def test_a_model_config_beside_it_does_not_change_the_ids(folder, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert fingerprint(AutoTokenizer.from_pretrained(str(tmp_path))) == fingerprint(tokenizer)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(MissingError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(MissingError, match="hf download nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_code_that_comes_with_a_tokenizer_never_runs(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('code ran')")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(folder):
    tokenizer = load_tokenizer(str(folder))
    assert eos_id(tokenizer) == 0
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token") as caught:
        eos_id(tokenizer)
    assert "tokenizer_config.json" in caught.value.hint
