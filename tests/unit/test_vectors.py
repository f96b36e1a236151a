"""Word vectors: every form of file, which token gets which vector, and what is said of a file that is damaged."""

import gzip
import struct

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmkit.data import vectors as module
from llmkit.data.vectors import hash_of, read_vectors, width_of
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.models.vectors import begin_with_vectors
from llmkit.recipe.schema import Model
from llmkit.run.planning import model_shape

WORDS = {"the": [1.0, 2.0, 3.0], "house": [4.0, 5.0, 6.0], "été": [-1.0, 0.5, 0.25], "房子": [7.0, 8.0, 9.0],
         ". . .": [0.1, 0.2, 0.3], "ing": [5.0, 5.0, 5.0]}  # fmt: skip

PLAIN = {word: values for word, values in WORDS.items() if " " not in word}  # word2vec's words hold no blanks


def as_text(words, header=False):
    lines = [f"{len(words)} 3"] if header else []
    return (
        "\n".join([*lines, *(f"{word} {' '.join(map(str, values))}" for word, values in words.items())])
        + "\n"
    )


def as_binary(words):
    """As word2vec's own program writes it: a line break after each vector."""
    head = f"{len(words)} 3\n".encode()
    return head + b"".join(f"{w} ".encode() + struct.pack("<3f", *v) + b"\n" for w, v in words.items())


def as_binary_without_breaks(words):
    """As other programs write it."""
    head = f"{len(words)} 3\n".encode()
    return head + b"".join(f"{w} ".encode() + struct.pack("<3f", *v) for w, v in words.items())


def byte_level(*words):
    """A tokenizer of these byte-level pieces."""
    vocabulary = {"<pad>": 0, **{word: number for number, word in enumerate(words, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def pieces(*words):
    """A tokenizer of these WordPiece entries."""
    vocabulary = {"[UNK]": 0, **{word: number for number, word in enumerate(words, 1)}}
    model = models.WordPiece(vocab=vocabulary, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="[UNK]")


def spelt(text):
    """A text as byte-level models spell it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0]


FORMS = {
    "glove.txt": lambda: as_text(WORDS).encode(),
    "fast.vec": lambda: as_text(WORDS, header=True).encode(),
    "fast.vec.gz": lambda: gzip.compress(as_text(WORDS, header=True).encode()),
    "word2vec.bin": lambda: as_binary(PLAIN),
    "word2vec.bin.gz": lambda: gzip.compress(as_binary(PLAIN)),
    "gensim.bin": lambda: as_binary_without_breaks(PLAIN),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_vectors(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name]())
    tokenizer = byte_level("Ġthe", "the", "Ġhouse", "x", spelt("été"), spelt(" 房子"), "ing")
    found = read_vectors(tmp_path / name, tokenizer)
    expected = {1: "the", 2: "the", 3: "house", 5: "été", 6: "房子", 7: "ing"}
    assert found.ids_M.tolist() == list(expected)
    assert np.array_equal(found.values_MD, np.array([WORDS[w] for w in expected.values()], dtype=np.float32))
    assert (found.num_words, found.num_lower, found.num_tokens) == (5 if ".bin" in name else 6, 0, 8)
    assert width_of(tmp_path / name) == 3


def test_capitals_fall_back_on_small_letters_and_pieces_within_words_get_none(tmp_path):
    words = {"the": [1, 1, 1], "The": [2, 2, 2], "house": [3, 3, 3], "ing": [4, 4, 4], "##ing": [9, 9, 9]}
    (tmp_path / "v.txt").write_text(as_text(words))
    tokenizer = pieces("The", "THE", "the", "House", "##ing", "ing", "##house")
    found = read_vectors(tmp_path / "v.txt", tokenizer)
    assert dict(zip(found.ids_M.tolist(), found.values_MD[:, 0].tolist(), strict=True)) == {
        1: 2, 2: 1, 3: 1, 4: 3, 6: 4,
    }  # fmt: skip
    assert found.num_lower == 2  # THE and House
    assert found.describe() == (
        "5 of 8 tokens (62.5%) are words of the vectors' file; 2 of them only in small letters"
    )
    counts = np.array([2, 1, 0, 4, 0, 3, 0, 0])
    assert "50.0% of the training text" in found.describe(counts)


def test_an_exact_word_wins_wherever_it_stands_and_the_first_of_two(tmp_path):
    for order in (["The", "the", "The"], ["the", "The", "the"]):
        lines = [f"{word} {number} 0" for number, word in enumerate(order, 1)]
        (tmp_path / "v.txt").write_text("\n".join(lines))
        found = read_vectors(tmp_path / "v.txt", pieces("The"))
        assert found.values_MD.tolist() == [[order.index("The") + 1, 0]]


def test_words_of_accents_are_found_whatever_kind_of_tokenizer_spells_them(tmp_path):
    (tmp_path / "v.txt").write_text(as_text(WORDS))
    assert read_vectors(tmp_path / "v.txt", pieces("été")).ids_M.tolist() == [1]
    assert read_vectors(tmp_path / "v.txt", byte_level(spelt(" été"))).ids_M.tolist() == [1]
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁été", -1.0), ("house", -2.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    assert read_vectors(tmp_path / "v.txt", tokenizer).ids_M.tolist() == [1, 2]


def test_special_tokens_get_no_vector(tmp_path):
    (tmp_path / "v.txt").write_text(as_text({"<pad>": [1, 1, 1], "x": [2, 2, 2]}))
    assert read_vectors(tmp_path / "v.txt", byte_level("x")).ids_M.tolist() == [1]


DAMAGED = [
    (
        "v.txt",
        b"the 1 2 3\nhouse 1 2\n",
        "line 2 is damaged: 2 numbers, not the 3 that its first word has: 'house 1 2'",
    ),
    (
        "v.vec",
        b"1 3\nthe 1 2\n",
        "line 2 is damaged: 2 numbers, not the 3 that its first line promises: 'the 1 2'",
    ),
    ("v.vec", b"3 3\nthe 1 2 3\nhouse 1 2 3\n", "ends after 2 words, and its first line promises 3"),
    ("v.vec", b"2 3\nthe 1 2 3\nhouse 1 x 3\n", "line 3 is damaged: could not convert"),
    ("v.txt", b"the 1 2 3\nhouse 1 nan 3\n", "line 2 is damaged: a number that is not finite"),
    ("v.txt", b"the 1 2 3\n\xff\xfe 1 2 3\n", "line 2 is damaged: a word that is not UTF-8"),
    ("v.txt", b"the house\nx 1 2\n", "line 1 is no word with its numbers"),
    ("v.bin", as_binary(PLAIN)[:-4], "ends within the vector of word 5 of 5"),
    (
        "v.bin",
        as_binary(PLAIN)[:30],
        "ends or is damaged where word 3 should be|ends within the vector of word 2",
    ),
    ("v.bin", b"1 3\n\xff\xfe 123412341234", "word 1 is damaged: a word that is not UTF-8"),
    ("v.bin", as_binary({"the": [1, float("inf"), 2]}), "word 1 is damaged: a number that is not finite"),
    ("v.bin", b"not counts\n", "does not begin with a line of two counts"),
    ("v.bin", struct.pack("<i", 793712314) + b"\x0c\0\0\0", "is a fastText model, not its vectors"),
    ("v.vec.gz", gzip.compress(as_text(WORDS).encode(), mtime=0)[:40], "the compressed file ends early"),
    ("v.txt", b"cat 1 2 3\n", "none of its 1 words is a token"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / name, byte_level("the", "house"))


def test_a_file_that_is_not_there(tmp_path):
    for ask in (width_of, hash_of, lambda path: read_vectors(path, byte_level("the"))):
        with pytest.raises(MissingError, match=r"model\.embeddings: .* cannot be read"):
            ask(tmp_path / "no.vec")


def test_only_what_is_needed_is_kept(tmp_path, monkeypatch):
    """A file of a million words is read line by line: of those that no token spells, no number is made."""
    lines = [f"word{n} 1 2 3" for n in range(5000)]
    (tmp_path / "v.txt").write_text("\n".join([*lines, "the 1 2 3"]))
    made, numbers = [], module._numbers
    monkeypatch.setattr(module, "_numbers", lambda *given: made.append(1) or numbers(*given))
    assert read_vectors(tmp_path / "v.txt", byte_level("the")).num_words == 5001
    assert len(made) == 1


# --- in a model ---


def small(**fields):
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
              "num_hidden_layers": 1, "tie_word_embeddings": True, **fields}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))


def test_vectors_keep_their_directions_and_take_the_size_of_the_embedding():
    model = small()
    before = model.model.embed_tokens.weight.detach().clone()
    ids = torch.tensor([3, 7, 11])
    values = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[5.0], [10.0], [1.0]]
    )
    begin_with_vectors(model, ids, values)
    after = model.model.embed_tokens.weight.detach()
    others = [number for number in range(50) if number not in ids.tolist()]
    assert torch.equal(after[others], before[others])
    ratios = after[ids] / values
    assert ratios.min().item() == pytest.approx(ratios.max().item(), rel=1e-5)
    assert after[ids].square().mean().item() == pytest.approx(before.square().mean().item(), rel=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_vectors_of_another_width_are_no_accident():
    with pytest.raises(ValueError, match="vectors of 3 numbers for an embedding of 16"):
        begin_with_vectors(small(), torch.tensor([1]), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("spec", "wanted", "hint"),
    [
        (
            {"preset": "gpt-tiny"},
            128,
            r"architecture: llama, config: \{hidden_size: 3\} and a number of heads",
        ),
        ({"preset": "lstm-tiny"}, 128, r"architecture: lstm, config: \{embedding_size: 3\}; or"),
        ({"preset": "gpt2-tiny"}, 128, r"config: \{n_embd: 3\}"),
    ],
)
def test_the_plan_refuses_another_width_and_says_what_fits(tmp_path, spec, wanted, hint):
    (tmp_path / "v.txt").write_text(as_text(WORDS))
    with pytest.raises(UsageError, match=f"3 wide, this model's embedding is {wanted}") as caught:
        model_shape(Model(**spec, embeddings=str(tmp_path / "v.txt")), "clm", 500)
    caught.match(hint)


def test_the_plan_takes_the_right_width(tmp_path):
    (tmp_path / "v.txt").write_text(as_text(WORDS))
    spec = Model(architecture="lstm", config={"embedding_size": 3}, embeddings=str(tmp_path / "v.txt"))
    assert model_shape(spec, "clm", 500).embedding_size == 3


def test_a_file_is_known_by_its_bytes(tmp_path):
    (tmp_path / "v.txt").write_text("the 1 2 3\n")
    first = hash_of(tmp_path / "v.txt")
    (tmp_path / "v.txt").write_text("the 1 2 4\n")
    assert first != hash_of(tmp_path / "v.txt")
    assert len(first) == 64
