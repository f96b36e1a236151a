"""BART's denoising: what is damaged and what is not, how much, and the loss of transformers."""

import inspect
import textwrap

import numpy as np
import objectives
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, BartForConditionalGeneration

from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.denoise import Denoising
from llmkit.objectives.sentences import ends_sentence
from llmkit.recipe.objectives import Denoise, RowLayout

VOCABULARY = objectives.vocabulary("denoise")
MASK, END, PAD = (VOCABULARY.role(f"{name}_token") for name in ("mask", "eos", "pad"))


def made(width=64, **changes):
    return Denoising(Denoise(**changes), VOCABULARY, width=width)


def row_of(*documents, seed=0):
    """A row of whole documents, each with its end."""
    pieces = [[*VOCABULARY.encode(text), END] for text in documents]
    positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
    return {"ids": np.concatenate(pieces), "positions": positions, "seed": np.asarray(seed)}


def plain_row(length, seed=0):
    ids = np.arange(length) % 200 + 150
    return {"ids": ids, "positions": np.arange(length), "seed": np.asarray(seed)}


def test_sentences_are_shuffled_within_their_document_and_nothing_else_moves():
    row = row_of("one. two! three?", "alone", "a\nb\n")
    found = set()
    for seed in range(300):
        example = made(ratio=0).encode({**row, "seed": np.asarray(seed)})
        assert np.array_equal(example["targets"], [*row["ids"], END])
        assert example["input_ids"][-1] == END
        text = b"".join(VOCABULARY.spellings[i] or b"|" for i in example["input_ids"][:-1]).decode()
        found.add(text)
    assert found <= {
        f"{first}|alone|{last}|" for first in ("".join(f) for f in orders()) for last in ("a\nb\n", "b\na\n")
    }
    assert len(found) == 12
    assert made(ratio=0, shuffle_sentences=False).encode(row)["input_ids"].tolist() == [*row["ids"], END]


def orders():
    from itertools import permutations

    return permutations(["one.", " two!", " three?"])


def test_where_sentences_end():
    ends = {VOCABULARY.spellings[i] for i in np.flatnonzero(ends_sentence(VOCABULARY))}
    assert {b".", b"!", b"?", b"\n"} <= ends
    assert all(s.rstrip(b" \t\"')]")[-1:] in b".!?\n" for s in ends), ends
    assert not {b",", b"a", b" "} & ends


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 63), st.floats(0, 0.99), st.floats(0.05, 12), st.integers(0, 2**60))
def test_a_mask_stands_for_a_run_of_the_text(length, ratio, mean_length, seed):
    """Whatever the settings: it fits the row, what is kept stays in order, and as much is gone as was asked for."""
    row = plain_row(length, seed)
    damaged = made(ratio=ratio, mean_length=mean_length, shuffle_sentences=False).encode(row)["input_ids"]
    assert len(damaged) <= 64
    kept = damaged[:-1][damaged[:-1] != MASK]
    assert len(kept) == length - round(length * ratio)
    assert np.isin(kept, row["ids"]).all()
    places = np.searchsorted(row["ids"], kept)  # ids ascend in so short a row
    assert (np.diff(places) > 0).all()
    gaps = np.diff(places, prepend=-1, append=length) > 1
    masks = np.diff(np.flatnonzero(np.append(damaged[:-1] != MASK, True)), prepend=-1) > 1
    assert not (gaps & ~masks).any(), "something is missing where no mask stands"


def test_the_share_that_is_masked_and_the_lengths_of_spans():
    """Lewis 2020: 30 % of the tokens, lengths Poisson numbers of 3."""
    objective = made(width=2002, shuffle_sentences=False)
    rng = np.random.default_rng(0)
    lengths = np.concatenate([objective._lengths(600, rng) for _ in range(300)])
    assert lengths.sum() == 600 * 300
    expected = [0.0498, 0.1494, 0.2240, 0.2240, 0.1680]  # of Poisson(3): 0 to 4
    assert [(lengths == n).mean() for n in range(5)] == pytest.approx(expected, abs=0.01)
    row = plain_row(2000)
    row["ids"] = np.full(2000, 300)
    damaged = objective.encode(row)["input_ids"]
    assert int((damaged == 300).sum()) == 1400
    assert 170 < int((damaged == MASK).sum()) < 230  # 600 / 3 spans


def test_ends_of_documents_are_never_masked_and_every_text_token_is_now_and_then():
    row = row_of(*(inspect.getsource(textwrap)[:4000].split("\n\n")[:5]))
    row = {name: array[:60] if array.ndim else array for name, array in row.items()}
    num_ends = int((row["ids"] == END).sum())
    assert num_ends > 0
    survived = np.zeros(60)
    for seed in range(300):
        row["seed"] = np.asarray(seed)
        damaged = made(shuffle_sentences=False).encode(row)["input_ids"]
        assert int((damaged == END).sum()) == num_ends + 1
        marked = plain_row(60, seed)
        marked["ids"][row["ids"] == END] = END
        damaged = made(shuffle_sentences=False).encode(marked)["input_ids"]
        survived[np.isin(marked["ids"], damaged)] += 1
    free = survived[row["ids"] != END] / 300
    assert free[3:-3].min() > 0.6
    assert free[3:-3].max() < 0.8
    assert free.max() < 0.95  # a span that held the first or the last token would have to begin or end there


def test_shapes_are_the_same_and_the_loss_is_that_of_bart():
    objective = made()
    assert Denoise().layout(64) == RowLayout(63, overlap=0, decoder=64)
    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": END, "bos_token_id": END}
    config = AutoConfig.for_model(
        **objectives.BART, **ids, vocab_size=objectives.VOCAB_SIZE, max_position_embeddings=64
    )
    model = BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # as it begins, it hardly looks at anything
    choose_heads(model, "seq2seq")
    batch = objective.collate([objective.encode(plain_row(n, n)) for n in (63, 63, 20)])
    assert {
        name: tuple(batch[name].shape) for name in ("input_ids", "attention_mask", "targets")
    } == dict.fromkeys(("input_ids", "attention_mask", "targets"), (3, 64))
    assert int(batch["num_targets"]) == 64 + 64 + 21 == int((batch["targets"] != NOT_LEARNED).sum())
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]
    ).loss
    total = float(objective.loss(model, batch).total.detach())
    assert total / int(batch["num_targets"]) == pytest.approx(own.item(), abs=1e-5)
    unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert abs(float(objective.loss(model, unmasked).total.detach()) - total) > 0.1, "the mask counts"
