"""The n-gram model against a text worked by hand, NLTK, and a slow count with dictionaries."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, set_seed

from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.models.configs import NGramConfig
from llmkit.models.kneser_ney import FALLBACK, Level, Piece, count_ngrams, estimate, modified_discounts
from llmkit.models.ngram import NGramForCausalLM
from llmkit.train import ngram as counting
from llmkit.train.ngram import Text, spans_read


def count(ids, order, vocab_size, *, starts=(0,), piece=1 << 20):
    ids = np.asarray(ids)
    begins = np.zeros(len(ids), bool)
    begins[list(starts)] = True

    def pieces():
        for i in range(0, len(ids), piece):
            yield Piece(ids[i : i + piece], begins[i : i + piece])

    return count_ngrams(pieces, len(ids), order=order, vocab_size=vocab_size)


def model_of(ids, order, vocab_size, *, discounts=(), **how):
    levels = count(ids, order, vocab_size, **how)
    config = NGramConfig(vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return NGramForCausalLM.of(estimate(levels, vocab_size, discounts), config).eval()


def spelt(levels, vocab_size):
    """The n-grams of each order as tuples, with their counts."""
    known, found = [()], []
    for level in levels:
        grams = [(*known[key // vocab_size], key % vocab_size) for key in level.keys_G.tolist()]
        found.append(dict(zip(grams, level.counts_G.tolist(), strict=True)))
        known = grams
    return found


def slow_counts(ids, order, starts):
    """The same by dictionaries: raw counts of the highest order, different left neighbours of the others."""
    raw, lefts = Counter(), defaultdict(set)
    bounds = [*sorted(starts), len(ids)]
    for begin, end in pairwise(bounds):
        for i in range(begin, end):
            for k in range(1, min(order, i - begin + 1) + 1):
                gram = tuple(ids[i - k + 1 : i + 1])
                raw[gram] += 1
                lefts[gram].add(ids[i - k] if i - k >= begin else "start")
    return [
        {g: (raw[g] if k == order else len(lefts[g])) for g in raw if len(g) == k}
        for k in range(1, order + 1)
    ]


def test_a_text_worked_by_hand():
    """`a b a b a c` in bigrams, D = 1/2: the left neighbours are a: start, b; b: a; c: a."""
    a, b, c = 0, 1, 2
    half = (0.5, 0.5, 0.5)
    model = model_of([a, b, a, b, a, c], 2, 3, discounts=[half, half])
    # Order 1: counts 2, 1, 1 of 4; gamma = 3 * 1/2 / 4 = 3/8, a third of it to each.
    unigram = np.array([1.5 / 4 + 1 / 8, 0.5 / 4 + 1 / 8, 0.5 / 4 + 1 / 8])
    np.testing.assert_allclose(model.unigram_V.numpy(), unigram, rtol=1e-6)
    # After a: b twice and c once, gamma = 2 * 1/2 / 3; after b: a twice, gamma = 1/4; nothing follows c.
    p = model(torch.tensor([[a], [b], [c]])).logits[:, 0].exp().numpy()
    np.testing.assert_allclose(p[a], np.array([0, 1.5, 0.5]) / 3 + unigram / 3, rtol=1e-6)
    np.testing.assert_allclose(p[b], np.array([1.5, 0, 0]) / 2 + unigram / 4, rtol=1e-6)
    np.testing.assert_allclose(p[c], unigram, rtol=1e-6)


def test_equals_nltk():
    """NLTK takes one discount and leaves the unigrams as they are; its text begins with a mark where ours starts."""
    lm = pytest.importorskip("nltk.lm")
    order, vocab_size, discount = 4, 6, 0.75
    ids = np.random.default_rng(0).choice(vocab_size, 300, p=[0.35, 0.25, 0.2, 0.1, 0.06, 0.04]).tolist()
    words = ["<start>", *map(str, ids)]
    grams = [tuple(words[i : i + k]) for k in range(1, order + 1) for i in range(len(words) - k + 1)]
    theirs = lm.KneserNeyInterpolated(order, discount)
    theirs.fit([grams], vocabulary_text=words)
    model = model_of(ids, order, vocab_size, discounts=[(0, 0, 0), *[(discount,) * 3] * (order - 1)])
    text = np.random.default_rng(1).choice(vocab_size, 60).tolist()
    ours = model(torch.tensor([text])).logits[0].exp().numpy()
    for i in range(order, len(text)):
        context = tuple(map(str, text[i - order + 2 : i + 1]))
        expected = [theirs.unmasked_score(str(word), context) for word in range(vocab_size)]
        np.testing.assert_allclose(ours[i], expected, rtol=2e-6, atol=1e-9)


@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    order=st.integers(1, 5),
    cuts=st.sets(st.integers(1, 59), max_size=4),
    piece=st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_counts_equal_a_slow_count(ids, order, cuts, piece):
    """In pieces of any size, with starts anywhere; what is there is found, and nothing else."""
    starts = [0, *sorted(cut for cut in cuts if cut < len(ids))]
    found = spelt(count(ids, order, 5, starts=starts, piece=piece), 5)
    expected = slow_counts(ids, order, starts)
    assert {gram: times for gram, times in found[0].items() if times} == expected[0]
    assert found[1:] == expected[1:]


@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=80), order=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_row_sums_to_one(ids, order):
    """Whatever the text, also for tokens that never were, and nothing is impossible."""
    model = model_of(ids, order, 8)
    p = model(torch.tensor([ids, ids[::-1]])).logits.exp()
    assert (p > 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]), atol=1e-6, rtol=0)


def test_discounts_by_chen_and_goodman():
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 3, 2, 5])
    share = 8 / 16
    assert modified_discounts(counts) == pytest.approx(
        (1 - 2 * share * 4 / 8, 2 - 3 * share * 3 / 4, 3 - 4 * share * 2 / 3)
    )
    assert modified_discounts(np.array([1, 1, 2])) is None  # no count of three
    assert modified_discounts(np.repeat([1, 2, 3, 4], [1, 1, 1, 9])) is None  # the third below 0
    [one] = estimate([Level(np.arange(3), np.array([1, 1, 2]))], 3)
    assert (one.discounts, one.estimated) == (FALLBACK, False)


def test_documents_apart_and_padding():
    """A document in the middle of a row, and one behind padding, are as alone."""
    rng = np.random.default_rng(3)
    model = model_of(rng.integers(0, 9, 2000), 4, 10)
    first, second = torch.from_numpy(rng.integers(0, 9, (2, 7)))
    alone = model(second[None]).logits[0]
    positions = torch.arange(7).repeat(2)[None]
    together = model(torch.cat([first, second])[None], position_ids=positions).logits[0]
    assert torch.equal(together[7:], alone)
    assert not torch.equal(model(torch.cat([first, second])[None]).logits[0, 7:], alone)
    padded = torch.cat([torch.zeros(5, dtype=torch.int64), second])[None]
    mask = torch.tensor([[0] * 5 + [1] * 7])
    assert torch.equal(model(padded, attention_mask=mask).logits[0, 5:], alone)
    gap = torch.cat([first, second[:1], second])[None]  # a place that is no text, in the middle
    mask = torch.tensor([[1] * 7 + [0] + [1] * 7])
    assert torch.equal(model(gap, attention_mask=mask).logits[0, 8:], alone)


def test_saved_and_loaded(tmp_path):
    model = model_of(np.random.default_rng(4).integers(0, 20, 3000), 3, 20)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, NGramForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(
        torch.equal(state[name], loaded[name]) and loaded[name].dtype == state[name].dtype for name in state
    )
    assert again.num_parameters() == model.num_parameters() > 20
    assert again.config.discounts == model.config.discounts
    ids = torch.randint(0, 20, (2, 9))
    assert torch.equal(again(ids, labels=ids).logits, model(ids).logits)
    expected = -model(ids).logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(again(ids, labels=ids).loss, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_what_its_probabilities_say(use_cache):
    """Greedy continuation equals the likeliest token one by one; shorter prompts behind padding too."""
    rng = np.random.default_rng(5)
    model = model_of(np.tile(rng.integers(1, 30, 200), 3), 4, 30)
    ids, mask = torch.from_numpy(rng.integers(1, 30, (2, 6))), torch.ones(2, 6, dtype=torch.int64)
    ids[1, :3] = mask[1, :3] = 0
    made = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    for row, kept in ((0, 0), (1, 3)):
        text = ids[row, kept:]
        for _ in range(8):
            text = torch.cat([text, model(text[None]).logits[0, -1].argmax()[None]])
        assert made[row, kept:].tolist() == text.tolist()
    set_seed(0)
    drawn = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, top_k=5)
    assert drawn.shape == (2, 9)


def test_rows_that_a_run_reads_as_runs_of_neighbours():
    """The same rows that `RowOrder` gives to steps, each once; more than an epoch is all of them."""
    order = RowOrder([7, 12], None, seed=3)
    sources, rows = order.locate(np.arange(9))
    read = {(s, r) for s, r in zip(sources.tolist(), rows.tolist(), strict=True)}
    spans = spans_read(order, 9)
    assert {(s, r) for s, first, after in spans.tolist() for r in range(first, after)} == read
    assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(spans.tolist()))
    assert spans_read(order, 1000).tolist() == [[0, 0, 7], [1, 0, 12]]
    weighted = RowOrder([7, 12], [1.0, 9.0], seed=3)
    sources, rows = weighted.locate(np.arange(30))
    covered = {(s, r) for s, first, after in spans_read(weighted, 30).tolist() for r in range(first, after)}
    assert covered == set(zip(sources.tolist(), rows.tolist(), strict=True))


class Listed:
    """A stream of tokens in memory."""

    name = "listed"

    def __init__(self, ids, starts):
        self.ids, self.starts, self.num_tokens = np.asarray(ids), np.asarray(starts), len(ids)

    def read(self, start, stop):
        return self.ids[start:stop]

    def document_starts(self, start, stop):
        return self.starts[(self.starts >= start) & (self.starts < stop)]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("piece", [3, 1000])
def test_the_text_of_some_rows(monkeypatch, isolate, piece):
    """A span holds its rows and the last target; it begins anew, and so does a document where they are apart."""
    monkeypatch.setattr(counting, "_PIECE_TOKENS", piece)
    streams = [Listed(range(100, 118), [0, 7, 12]), Listed(range(200, 213), [0, 5])]
    rows = Rows(streams, 4)
    assert rows.sizes == [4, 3]
    text = Text(rows, np.array([[0, 1, 3], [1, 0, 1], [1, 2, 3]]), isolate)
    ids = [*range(104, 113), *range(200, 205), *range(208, 213)]
    starts = {104, 200, 208} | ({107, 112} if isolate else set())
    pieces = list(text.pieces())
    assert np.concatenate([one.ids_N for one in pieces]).tolist() == ids
    found = [one.ids_N[one.starts_N] for one in pieces]
    assert set(np.concatenate(found).tolist()) == starts
    assert text.num_tokens == len(ids)
    assert (len(pieces) == 1) == (piece == 1000)
