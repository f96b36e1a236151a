"""T5's span corruption: the published lengths, nothing lost, the loss of transformers."""

from collections import Counter

import numpy as np
import objectives
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, T5ForConditionalGeneration

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import UsageError
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.span import SpanCorruption
from llmkit.objectives.spans import cut_out, random_sum, sentinel_ids
from llmkit.recipe.objectives import RowLayout, Span
from llmkit.registry import SENTINELS

VOCABULARY = objectives.vocabulary("span")
MARKS = sentinel_ids(VOCABULARY)
END, PAD = VOCABULARY.role("eos_token"), VOCABULARY.role("pad_token")


def row(length, seed=0):
    return {"ids": np.arange(length) % 200 + 150, "seed": np.asarray(seed)}


def test_the_published_lengths():
    """Raffel 2020: inputs of 512 hold 568 tokens of text, and targets are 114."""
    assert Span().layout(512) == RowLayout(568, overlap=0, decoder=114)
    assert Span().counts(568) == (85, 28)
    example = SpanCorruption(Span(), VOCABULARY).encode(row(568))
    assert (len(example["input_ids"]), len(example["targets"])) == (512, 114)


def test_what_the_paper_shows_figure_2():
    """`Thank you <X> me to your party <Y> week .` and `<X> for inviting <Y> last`, each with its end."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    ids = np.arange(len(words)) + 300
    found = set()
    for seed in range(400):
        made = SpanCorruption(Span(ratio=0.25, mean_length=1.5), VOCABULARY)
        example = made.encode({"ids": ids, "seed": np.asarray(seed)})
        named = {**dict(zip(ids, words, strict=True)), MARKS[0]: "<X>", MARKS[1]: "<Y>", END: "(end)"}
        found.add(tuple(" ".join(named[i] for i in example[name]) for name in ("input_ids", "targets")))
    assert (
        "Thank you <X> me to your party <Y> week . (end)",
        "<X> for inviting <Y> last (end)",
    ) in found
    assert ("<X> you for inviting <Y> to your party last week . (end)", "<X> Thank <Y> me (end)") not in found


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.9), st.floats(1, 12), st.integers(0, 2**60))
def test_both_sides_together_are_the_row(length, ratio, mean_length, seed):
    chosen = Span(ratio=ratio, mean_length=mean_length)
    assume(chosen.counts(length)[1] <= len(MARKS))
    given_row = row(length, seed)
    example = SpanCorruption(chosen, VOCABULARY).encode(given_row)
    assert (len(example["input_ids"]), len(example["targets"])) == chosen.widths(length)
    marks, held = set(MARKS.tolist()), {}
    for number in example["targets"][:-1].tolist():
        if number in marks:
            mark = number
            held[mark] = []
        else:
            held[mark].append(number)
    assert list(held) == MARKS[: len(held)].tolist()
    assert all(held.values()), "an empty span"
    filled = [t for i in example["input_ids"][:-1].tolist() for t in held.get(i, [i])]
    assert filled == given_row["ids"].tolist()
    assert example["input_ids"][-1] == example["targets"][-1] == END


def test_the_ends_of_a_row_are_taken_out_too():
    """In T5's code the first token never is, and the last always."""
    taken = np.zeros(40)
    for seed in range(4000):
        kept, spans = cut_out(np.arange(40), np.array([2, 2, 2]), np.random.default_rng(seed))
        assert [len(part) for part in spans] == [2, 2, 2]
        assert min(len(part) for part in kept[1:-1]) > 0
        taken[np.concatenate(spans)] += 1 / 4000
    # C(36, 2) of C(37, 3) choices of places begin with a span; 6 of 40 tokens are taken on average.
    assert taken[[0, -1]] == pytest.approx([3 / 37 * 36 / 35, 3 / 37 * 36 / 35], abs=0.02)
    assert taken[2:-2] == pytest.approx(np.full(36, 0.15), abs=0.04)
    assert taken[:20] == pytest.approx(taken[:19:-1], abs=0.04)


def test_each_sum_is_as_likely_as_any_other():
    """5 = a + b + c in six ways."""
    drawn = Counter(tuple(random_sum(5, 3, np.random.default_rng(seed)).tolist()) for seed in range(6000))
    assert len(drawn) == 6
    assert all(sum(parts) == 5 and min(parts) > 0 for parts in drawn)
    assert max(abs(count - 1000) for count in drawn.values()) < 120  # four standard deviations


def test_the_loss_is_that_of_t5():
    """Of full rows, and of a batch in which a short row is filled up, for which the encoder needs its mask."""
    made = SpanCorruption(Span(), VOCABULARY)
    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    config = AutoConfig.for_model(**objectives.TINY["seq2seq"], vocab_size=objectives.VOCAB_SIZE, **ids)
    model = T5ForConditionalGeneration(config).eval()
    choose_heads(model, "seq2seq")
    for lengths in ((60, 60, 60), (60, 7, 33)):
        batch = made.collate([made.encode(row(length, seed)) for seed, length in enumerate(lengths)])
        assert ("attention_mask" in batch) == (len(set(lengths)) > 1)
        own = model(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), labels=batch["targets"]
        ).loss
        loss = made.loss(model, batch)
        mean = float(loss.total.detach()) / int(batch["num_targets"])
        assert mean == pytest.approx(own.item(), abs=1e-5)
        assert made.summarise(
            {"total": float(loss.total.detach()), "num_targets": int(batch["num_targets"])}
        ) == {
            "loss": pytest.approx(mean, abs=1e-5),
            "perplexity": pytest.approx(np.exp(mean), rel=1e-4),
            "num_targets": int(batch["num_targets"]),
        }
    assert int((batch["targets"][1] != NOT_LEARNED).sum()) == Span().widths(7)[1]


def test_more_spans_than_marks_are_refused_with_what_would_do():
    with pytest.raises(UsageError, match="2,048 positions has 114 spans, and there are 100 marks") as caught:
        Span().layout(2048)
    assert "`mean_length` of 4 or more" in str(caught.value)
    assert Span(mean_length=4).layout(2048).stride > 2048


def test_marks_of_t5s_own_tokenizer_are_taken():
    from tokenizers import AddedToken, Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<pad>": 2}, unk_token="a"))
    backend.add_special_tokens([AddedToken(f"<extra_id_{n}>", special=True) for n in range(99, -1, -1)])
    roles = {"eos_token": "</s>", "pad_token": "<pad>"}
    t5 = Vocabulary(size=103, roles=roles, special_ids=(), backend=backend, name="t5")
    assert sentinel_ids(t5).tolist() == list(range(102, 2, -1))
    assert len(SENTINELS) == 100
    without = objectives.vocabulary("clm")
    with pytest.raises(UsageError, match=r"<\|extra_0\|>"):
        SpanCorruption(Span(), without)
