"""Fill in the middle: examples worked by hand, borders of rows, and the loss of transformers."""

import inspect
import textwrap

import numpy as np
import objectives
import pytest
import torch
from training import losses, pretrain
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import UsageError
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.fim import FillInTheMiddle
from llmkit.recipe.objectives import Fim, RowLayout

BYTES = objectives.vocabulary("fim", size=261)
"""A vocabulary without any merge: each byte is a token, so that an example can be read."""
PIECES = objectives.vocabulary("fim")
NAMES = {"<|fim_prefix|>": "P", "<|fim_suffix|>": "S", "<|fim_middle|>": "M"}


def made(vocabulary=BYTES, *, context=64, isolate=False, **changes):
    return FillInTheMiddle(Fim(**changes), vocabulary, isolate=isolate, context=context)


def row_of(*texts, vocabulary=BYTES, seed=0, ended=True):
    """A row of documents, each with its end; the last one may be cut off."""
    end = vocabulary.role("eos_token")
    pieces = [[*vocabulary.encode(text), end] for text in texts]
    if not ended:
        pieces[-1].pop()
    positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
    return {"ids": np.concatenate(pieces), "positions": positions, "seed": np.asarray(seed)}


def spelled(example, vocabulary=BYTES):
    """The whole line of an example, with P, S, M for the marks and . for an end."""
    names = {vocabulary.id_of(name): letter.encode() for name, letter in NAMES.items()}
    names[vocabulary.role("eos_token")] = b"."
    line = [*example["input_ids"][:1], *example["targets"]]
    return b"".join(names.get(i) or vocabulary.spellings[i] for i in line)


def test_every_way_to_cut_three_characters_in_both_forms():
    """`abc` in a row with room: prefix, middle and suffix as Bavarian 2022 puts them in section 3."""
    cuts = [(a, b) for a in range(4) for b in range(a, 4)]
    wanted = {f"P{'abc'[:a]}S{'abc'[b:]}M{'abc'[a:b]}." for a, b in cuts}
    wanted_spm = {f"PS{'abc'[b:]}M{'abc'[:a]}{'abc'[a:b]}." for a, b in cuts}
    for ratio, expected in ((0.0, wanted), (1.0, wanted_spm)):
        objective, found = made(ratio=1.0, suffix_first_ratio=ratio), set()
        for seed in range(300):
            row = row_of("abc", "0123456789", seed=seed)  # the second makes room for what the first gets
            found.add(spelled(objective.encode(row)).decode().split(".")[0] + ".")
        assert found == expected


def test_a_document_is_rearranged_as_often_as_it_is_asked_for():
    texts = [
        b"P" in spelled(made().encode(row_of("abcdef", "0" * 20, seed=s))).split(b".")[0] for s in range(600)
    ]
    assert np.mean(texts) == pytest.approx(0.5, abs=0.08)
    plain = row_of("abcdef", "ghi")
    example = made(ratio=0.0).encode(plain)
    assert example["input_ids"].tolist() == plain["ids"][:-1].tolist()
    assert example["targets"].tolist() == plain["ids"][1:].tolist()


def test_what_is_added_takes_the_place_of_the_suffixs_end_then_of_the_prefixs_beginning():
    objective = made(ratio=1.0, suffix_first_ratio=0.0)
    text = "abcdefghijklmnopqrstuvwxyz"
    plain = 0
    for seed in range(200):
        row = row_of(text, seed=seed)
        line = spelled(objective.encode(row)).decode()
        assert len(line) == len(row["ids"]) == 27
        if line == text + ".":
            plain += 1
            continue
        prefix, rest = line[1:].split("S")
        suffix, rest = rest.split("M")
        assert line[0] == "P"
        assert rest[-1] == "."
        middle = rest[:-1]
        found = prefix + middle + suffix
        assert len(found) == 23, "three marks take the place of three letters"
        assert text.startswith(found) if suffix else found in text
    assert 0 < plain < 20, "a middle of all but two letters leaves no room"


def test_a_document_that_the_rows_border_cuts_off_has_its_middles_end():
    objective = made(ratio=1.0, suffix_first_ratio=0.5)
    for seed in range(100):
        line = spelled(objective.encode(row_of("abcdefghijklmnopqrstuvwxyz", seed=seed, ended=False)))
        assert len(line) == 26
        assert (b"P" in line) == (b"M" in line) == line.endswith(b".")


def test_a_character_that_the_border_cuts_through_stays_as_its_bytes():
    text = "黄河入海流"
    whole = row_of(text, "x" * 30)
    cut = {name: array[2:-1] if array.ndim else array for name, array in whole.items()}
    cut["positions"] = np.concatenate([np.arange(14), np.arange(30)])
    last_byte = BYTES.spellings[int(whole["ids"][2])]
    objective = made(ratio=1.0, suffix_first_ratio=0.0)
    for seed in range(60):
        line = spelled(objective.encode({**cut, "seed": np.asarray(seed)}))
        prefix, rest = line[1:].split(b"S", 1)
        suffix, middle = rest[: rest.index(b".")].split(b"M")
        assert prefix.startswith(last_byte)
        assert prefix + middle + suffix == last_byte + "河入海流".encode()
        assert (prefix[1:] + middle + suffix).decode() == "河入海流"
        assert middle.decode() in text, "only whole characters are cut off"
    # And at the other end: two bytes of the last character are in the row.
    row = row_of(text, ended=False)
    row = {name: array[:-1] if array.ndim else array for name, array in row.items()}
    room = {**row, "ids": np.append(row["ids"], []).astype(np.int64)}
    parts = objective._whole_characters(room["ids"])
    assert parts[1] == "黄河入海"
    assert [BYTES.spellings[i] for i in parts[2]] == [bytes([b]) for b in "流".encode()[:2]]
    broken = np.concatenate([row["ids"][:4], row["ids"][5:]])  # not text at all within
    assert objective._whole_characters(broken) is None


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram", "chars", "words"])
def test_parts_are_tokens_as_they_are_when_the_model_is_used(algorithm):
    """Each part is what the tokenizer makes of its text by itself; whatever tokenizer a recipe learns."""
    entries = objectives.vocabulary("fim", algorithm, 700)
    text = inspect.getsource(textwrap)[:400]
    objective = made(entries, context=512, ratio=1.0, suffix_first_ratio=0.0)
    marks = [entries.id_of(name) for name in NAMES]
    for seed in range(20):
        example = objective.encode(row_of(text, "y\n" * 200, vocabulary=entries, seed=seed))
        line = [*example["input_ids"][:1].tolist(), *example["targets"].tolist()]
        at = [line.index(mark) for mark in marks]
        stop = line.index(entries.role("eos_token"))
        parts = [line[a + 1 : b] for a, b in zip(at, [*at[1:], stop], strict=True)]
        prefix, suffix, middle = (b"".join(entries.spellings[i] for i in part).decode() for part in parts)
        assert prefix + middle + suffix == text
        assert [entries.encode(part) for part in (prefix, suffix, middle)] == parts


def test_isolated_documents_do_not_learn_each_others_beginning():
    objective = made(PIECES, context=96, isolate=True, ratio=1.0)
    for row in objectives.rows("fim", 20, 96):
        example = objective.encode(row)
        starts = np.flatnonzero(example["position_ids"][1:] == 0)
        assert (example["targets"][starts] == NOT_LEARNED).all()
        assert int((example["targets"] == NOT_LEARNED).sum()) >= len(starts)
        runs = np.split(example["position_ids"], starts + 1)
        assert all(np.array_equal(run, np.arange(len(run))) for run in runs)
        first = PIECES.id_of("<|fim_prefix|>")
        assert all(example["input_ids"][at + 1] == first for at in starts if at + 8 < 96) or len(starts) == 0


def test_a_tokenizer_that_does_not_keep_text_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"x": 0, "y": 1, "z": 2, "</s>": 3, **{name: 4 + n for n, name in enumerate(NAMES)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = {"eos_token": "</s>"}
    entries = Vocabulary(size=7, roles=roles, special_ids=(3, 4, 5, 6), backend=backend, name="words")
    with pytest.raises(UsageError, match=r"does not keep text as it is \('x  y\\n z' becomes 'xyz'\)"):
        made(entries)


def test_rows_have_one_shape_and_the_loss_is_that_of_transformers():
    assert Fim().layout(64) == RowLayout(64, overlap=1)
    objective = made(PIECES, ratio=1.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**objectives.TINY["causal"], vocab_size=objectives.VOCAB_SIZE)
    ).eval()
    choose_heads(model, "causal")
    batch = objective.collate([objective.encode(row) for row in objectives.rows("fim", 6, 64)])
    assert tuple(batch["input_ids"].shape) == tuple(batch["targets"].shape) == (6, 64)
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 1))
    labels = torch.nn.functional.pad(batch["targets"], (1, 0), value=NOT_LEARNED)
    own = model(input_ids=ids, labels=labels).loss.item()
    total = objective.loss(model, batch).total.item()
    assert total / int(batch["num_targets"]) == pytest.approx(own, abs=1e-5)


def test_isolated_documents_of_a_run_do_not_see_each_other(tmp_path):
    """The run proves it of its own rows, and says so; rearranged documents are no exception."""
    changes = {**objectives.changes("fim"), "pretrain__train__length": "2 steps", "pretrain__prompts": []}
    folder = pretrain(tmp_path, pretrain__isolate_documents=True, pretrain__fim={"ratio": 1.0}, **changes)
    assert sorted(losses(folder)) == [1, 2]
