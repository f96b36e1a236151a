"""Generation: a batch gives what one by one gives, the cache is on, and afterwards the model is as before."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmkit.evaluate.generate import _continuation, generate
from llmkit.models.attention import use_attention
from llmkit.recipe.schema import Sampling

WORDS = ["<|endoftext|>", "<|pad|>", *"abcdefghijklmnopqrst"]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=WORDS[0], bos_token=WORDS[0], pad_token=WORDS[1]
    )


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.6,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


PROMPTS = ["a b c d e", "f", "", "g h i a b c j"]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


def test_a_batch_of_unequal_prompts_gives_what_one_by_one_gives(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, GREEDY, seed=0)
    alone = [generate(model, tokenizer, [prompt], GREEDY, seed=0)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({one.text for one in together}) > 1, "all the same: nothing was compared"


def test_greedy_follows_the_likeliest_token_by_hand(model, tokenizer):
    model.eval()
    ids = tokenizer("a b c")["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    (written,) = generate(model, tokenizer, ["a b c"], Sampling(max_new_tokens=4, temperature=0.0), seed=0)
    expected = ids[3:]
    if 0 in expected:
        expected = expected[: expected.index(0) + 1]
    assert written.num_tokens == len(expected)
    assert written.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_seed_decides_the_draw(model, tokenizer):
    hot = Sampling(max_new_tokens=8, temperature=2.0)
    first = generate(model, tokenizer, ["a"] * 3, hot, seed=1)
    assert generate(model, tokenizer, ["a"] * 3, hot, seed=1) == first
    assert generate(model, tokenizer, ["a"] * 3, hot, seed=2) != first
    assert len({one.text for one in first}) > 1, "samples of one prompt differ"


def test_a_prompt_longer_than_the_model_keeps_its_end_and_says_so(model, tokenizer):
    prompt = " ".join(WORDS[2:] * 2)  # 40 tokens, the model reads 24
    (written,) = generate(model, tokenizer, [prompt], GREEDY, seed=0)
    assert written.prompt_cut == 40 - (24 - 6)
    (same,) = generate(model, tokenizer, [" ".join(prompt.split()[-18:])], GREEDY, seed=0)
    assert written.text == same.text


def test_the_model_is_as_before_and_used_its_cache(model, tokenizer, monkeypatch):
    use_attention(model, "compiled", isolate=True)
    model.train()
    lengths = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: lengths.append(k["input_ids"].shape[1]) or forward(*a, **k)
    )
    generate(model, tokenizer, ["a b c d e"], Sampling(max_new_tokens=3, temperature=0.0), seed=0)
    assert lengths[0] == 5
    assert set(lengths[1:]) <= {1}, "each further token is computed alone: the cache is used"
    assert model.training
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "compiled_documents"


def test_marks_of_gaps_stay_and_a_models_own_end_ends():
    """Ids: 0 end of text, 1 a mark, 2 an end of its own, 3 and 4 words, 5 special and nowhere named."""
    words = {0: "", 1: "<|extra_0|>", 3: "hello", 4: "world", 5: "<|im_end|>"}
    tokenizer = SimpleNamespace(
        eos_token_id=0,
        all_special_ids=[0, 1, 2],
        get_added_vocab=lambda: {"<|extra_0|>": 1, "<|eop|>": 2, "<|im_end|>": 5},
        added_tokens_decoder={1: SimpleNamespace(special=True), 5: SimpleNamespace(special=True)},
        decode=lambda ids, **_: " ".join(words[number] for number in ids),
    )
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0, 2]))
    found = _continuation(model, tokenizer, "p", [1, 3, 2, 4, 4], cut=0)
    assert (found.text, found.num_tokens, found.finished) == ("<|extra_0|> hello", 3, True)
    unfinished = _continuation(model, tokenizer, "p", [3, 4, 5], cut=0)
    assert (unfinished.text, unfinished.finished) == ("hello world", False)
