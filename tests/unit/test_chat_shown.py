"""What is learned of an example, for people: colours on a terminal, marks without, JSON in a pipe."""

import io
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizing import train_bpe
from transformers import PreTrainedTokenizerFast

from llmkit.cli.rows import ShownRow, as_object, heading, marked, painted, show_rows
from llmkit.cli.show import Terminal
from llmkit.data.chat import MaskedPiece, masked_pieces, unshifted
from llmkit.data.tokenizers import open_tokenizer


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"the cat {i} sat on the mat" for i in range(50)]
    train_bpe(texts, vocab_size=300, folder=folder, special_tokens=["<|end|>"])
    return open_tokenizer(str(folder))


def pieces_of(tokenizer, prompt: str, answer: str) -> list[MaskedPiece]:
    encode = tokenizer.backend_tokenizer.encode
    before, after = (encode(text, add_special_tokens=False).ids for text in (prompt, answer + "<|end|>"))
    ids = np.array(before + after)
    targets = np.where(np.arange(len(ids)) < len(before), -100, ids)
    return masked_pieces(ids, targets, tokenizer)


def test_pieces_say_what_is_learned_and_spell_the_text(tokenizer) -> None:
    pieces = pieces_of(tokenizer, "the cat\n", "sat 山")
    text = b"".join(p.content if isinstance(p.content, bytes) else p.content.encode() for p in pieces)
    assert text.decode() == "the cat\nsat 山<|end|>"
    learned = [p.content if isinstance(p.content, bytes) else p.content.encode() for p in pieces if p.learned]
    assert b"".join(learned).decode() == "sat 山<|end|>"
    assert [p.content for p in pieces if p.special] == ["<|end|>"]
    assert {len(p.content) for p in pieces if isinstance(p.content, bytes)} == {1}  # 山 in its three bytes


def test_blanks_and_bytes_of_sentencepiece_are_spelled() -> None:
    vocabulary = {"▁the": 0, "▁cat": 1, "s": 2, "<0xE5>": 3, "<unk>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces = masked_pieces([0, 1, 2, 3, 9], [-100, 1, 2, -100, 9], fast)
    assert [p.content for p in pieces] == [" the", " cat", "s", b"\xe5", "<9>"]
    assert [p.learned for p in pieces] == [False, True, True, False, True]


def test_an_example_whose_targets_are_the_next_tokens_is_put_together_again() -> None:
    ids, learned = np.array([5, 6, 7, 8, 9]), np.array([0, 0, 1, 1, 0], dtype=bool)
    for is_last in (True, False):
        learned[-1] = is_last
        inputs, targets = ids[:-1], np.where(learned, ids, -100)[1:]
        whole, moved = unshifted(inputs, targets)
        size = 5 if is_last else 4  # the last token is nowhere in the example if it is not learned
        assert whole.tolist() == ids.tolist()[:size]
        assert moved.tolist() == np.where(learned, ids, -100).tolist()[:size]


def test_json_in_a_pipe(tokenizer) -> None:
    stream = io.StringIO()
    rows = [
        ShownRow("a.jsonl:1", pieces_of(tokenizer, "the", " cat")),
        ShownRow("b:2", [], {"tokens_cut": 3}),
    ]
    show_rows(rows, stream=stream, env={})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first == as_object(rows[0])
    assert first["place"] == "a.jsonl:1"
    assert "".join(first["pieces"]) == "the cat<|end|>"
    assert first["num_targets"] == sum(first["learned"]) == first["num_tokens"] - first["learned"].index(True)
    assert (second["num_tokens"], second["tokens_cut"]) == (0, 3)


def test_colours_are_for_what_is_learned_and_marks_stand_in_for_them(tokenizer) -> None:
    row = ShownRow("a:1", pieces_of(tokenizer, "the\n", "the the"), {"tokens_cut": 2})
    assert painted(row, Terminal(40, ("A", "B"))) == [
        "the⏎",
        *["\x1b[Amthe\x1b[0m\x1b[Bm the\x1b[0m\x1b[Am<|end|>\x1b[0m"],
    ]
    assert marked(row) == ["the⏎", "⟦the the<|end|>⟧"]
    assert (
        heading(row) == f"a:1: {len(row.pieces)} tokens, 3 learned ({3 / len(row.pieces):.0%}), tokens cut 2"
    )
    for env, sign in (({"TERM": "dumb"}, "⟦"), ({"TERM": "xterm-256color"}, "\x1b[38;5;16;48")):
        stream = Tty()
        show_rows([row], stream=stream, env=env)
        assert sign in stream.getvalue()
        assert stream.getvalue().startswith("a:1: ")
