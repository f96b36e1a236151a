"""GLM's blank infilling in the form of a decoder: an example worked by hand, and the loss of transformers."""

import numpy as np
import objectives
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.infill import BlankInfilling
from llmkit.objectives.spans import sentinel_ids
from llmkit.recipe.objectives import Infill, RowLayout

VOCABULARY = objectives.vocabulary("infill")
MARKS = sentinel_ids(VOCABULARY)
END_OF_SPAN = VOCABULARY.id_of("<|eop|>")


def test_an_example_by_hand():
    """Du 2022, figure 2: x1..x6, of which x3 and x5 x6 are taken out, the second span first.

    GLM's figure has [M] for both gaps and [S] before both spans; here each has its mark.
    """
    made = BlankInfilling(Infill(ratio=0.5, mean_length=1.5), VOCABULARY)
    x1, x2, x3, x4, x5, x6 = ids = np.arange(201, 207)
    m0, m1 = MARKS[:2]
    wanted = (
        [x1, x2, m0, x4, m1, m1, x5, x6, m0, x3],
        [*[NOT_LEARNED] * 5, x5, x6, END_OF_SPAN, x3, END_OF_SPAN],
    )
    found = set()
    for seed in range(600):
        example = made.encode({"ids": ids, "seed": np.asarray(seed)})
        found.add(tuple(tuple(example[name].tolist()) for name in ("input_ids", "targets")))
    assert tuple(map(tuple, wanted)) in found
    in_order = (
        (x1, x2, m0, x4, m1, m0, x3, m1, x5, x6),
        (*[NOT_LEARNED] * 5, x3, END_OF_SPAN, x5, x6, END_OF_SPAN),
    )
    assert in_order in found
    # 3 of 6 tokens in 2 spans: (1, 2) or (2, 1) in C(4, 2) places, and two orders.
    assert len(found) == 2 * 6 * 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.9), st.floats(1, 12), st.integers(0, 2**60))
def test_filling_the_gaps_with_the_targets_gives_the_row(length, ratio, mean_length, seed):
    chosen = Infill(ratio=ratio, mean_length=mean_length)
    assume(chosen.counts(length)[1] <= len(MARKS))
    ids = np.arange(length) % 200 + 150
    example = BlankInfilling(chosen, VOCABULARY).encode({"ids": ids, "seed": np.asarray(seed)})
    inputs, targets = example["input_ids"].tolist(), example["targets"].tolist()
    assert len(inputs) == len(targets) == chosen.widths(length)[0]
    start = next(i for i, target in enumerate(targets) if target != NOT_LEARNED)
    text, held, marks = inputs[:start], {}, set(MARKS.tolist())
    for number, target in zip(inputs[start:], targets[start:], strict=True):
        if number in marks:
            mark = number
            held[mark] = []
        else:
            assert number == held[mark][-1], "what was to be predicted is what is read next"
        held[mark].append(target)
    assert all(
        span[-1] == END_OF_SPAN and END_OF_SPAN not in span[:-1] and len(span) > 1 for span in held.values()
    )
    assert sum(len(span) - 1 for span in held.values()) == chosen.counts(length)[0]
    assert [number for i in text for number in (held[i][:-1] if i in held else [i])] == ids.tolist()


def test_lengths_have_the_mean_and_the_spread_of_one_and_a_poisson_number():
    made = BlankInfilling(Infill(), VOCABULARY)
    lengths = []
    for seed in range(200):
        targets = made.encode({"ids": np.arange(568) % 200 + 150, "seed": np.asarray(seed)})["targets"]
        ends = np.flatnonzero(targets == END_OF_SPAN)
        lengths += np.diff(ends, prepend=int((targets == NOT_LEARNED).sum()) - 1).tolist()
    lengths = np.array(lengths) - 1
    assert lengths.mean() == pytest.approx(85 / 28)
    expected = np.exp(-57 / 28) * np.array([1, 57 / 28, (57 / 28) ** 2 / 2])  # lengths of 1, 2 and 3
    assert [(lengths == n).mean() for n in (1, 2, 3)] == pytest.approx(expected, abs=0.02)


def test_a_row_fills_the_context():
    """466 tokens: 15 % are 70, in 23 spans, and each span has its mark twice."""
    assert Infill().layout(512) == RowLayout(466, overlap=0, decoder=0)
    assert Infill().counts(466) == (70, 23)
    assert Infill().widths(466)[0] == 466 + 2 * 23 == 512


def test_the_loss_is_that_of_transformers():
    made = BlankInfilling(Infill(), VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**objectives.TINY["causal"], vocab_size=objectives.VOCAB_SIZE)
    ).eval()
    choose_heads(model, "causal")
    rows = [{"ids": np.arange(n) % 200 + 150, "seed": np.asarray(n)} for n in (60, 60, 13)]
    batch = made.collate([made.encode(row) for row in rows])
    # transformers shifts labels by one itself: one input more, behind all others, gives the last target its place.
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 1))
    labels = torch.nn.functional.pad(batch["targets"], (1, 0), value=NOT_LEARNED)
    own = model(input_ids=ids, labels=labels).loss.item()
    total = float(made.loss(model, batch).total.detach())
    assert total / int(batch["num_targets"]) == pytest.approx(own, abs=1e-5)
