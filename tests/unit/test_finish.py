"""The exported tokenizer puts around a text what training put there."""

import inspect
import json
import textwrap

import pytest
import torch
import training
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from llmkit.data.tokenizers import end_texts, fingerprint, learn, load_tokenizer, save_tokenizer
from llmkit.evaluate.generate import generate
from llmkit.recipe.objectives import tokens_for
from llmkit.recipe.schema import Sampling, Tokenize

TEXT = "def read(self):\n    return 1"


@pytest.mark.parametrize("objective", ["span", "denoise"])
def test_an_encoder_decoders_tokenizer_ends_texts_as_it_was_fed(objective, tmp_path, monkeypatch):
    texts = [inspect.getsource(module) for module in (json, textwrap)]
    special = tokens_for(objective, "bpe", [])
    (tmp_path / "learnt").mkdir()
    learn(texts, [], Tokenize(vocab_size=600, special_tokens=special), tmp_path / "learnt")
    tokenizer = load_tokenizer(str(tmp_path / "learnt"))
    before, bare = fingerprint(tokenizer), tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    end_texts(tokenizer)
    end_texts(tokenizer)  # no second one
    save_tokenizer(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(TEXT)["input_ids"] == [*bare, tokenizer.eos_token_id]
    assert read(TEXT, add_special_tokens=False)["input_ids"] == bare
    assert read(TEXT, "x")["input_ids"].count(tokenizer.eos_token_id) == 2
    assert fingerprint(read) == before
    assert read.decode(read(TEXT)["input_ids"], skip_special_tokens=True) == TEXT

    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model("t5", vocab_size=len(read), decoder_start_token_id=0, **small)
    model = AutoModelForSeq2SeqLM.from_config(config)
    fed = []
    write = model.generate

    def seen(**inputs):
        fed.append(inputs["input_ids"])
        return write(**inputs)

    monkeypatch.setattr(model, "generate", seen)
    generate(model, read, [TEXT], Sampling(max_new_tokens=2), seed=0)
    torch.testing.assert_close(fed[0], read(TEXT, return_tensors="pt")["input_ids"])


@pytest.mark.slow
def test_a_trained_encoder_decoders_export_ends_texts(tmp_path):
    fields = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    folder = training.pretrain(
        tmp_path,
        pretrain__objective="span",
        pretrain__model={"architecture": "t5", "config": fields, "context": 32},
        pretrain__train__length="2 steps",
        tokenize__vocab_size=500,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(TEXT).input_ids
    assert ids == [*tokenizer(TEXT, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
