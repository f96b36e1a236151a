"""Next-sentence prediction: how pairs are made, that nothing but the text gives them away, and transformers' loss."""

from collections import Counter

import numpy as np
import objectives
import pytest
import torch
from training import losses, pretrain
from transformers import BertConfig, BertForPreTraining

from llmkit.data.loader import evaluation_rows
from llmkit.data.rows import Rows
from llmkit.errors import DataError
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import NOT_LEARNED
from llmkit.objectives.nsp import GOES_ON, OTHER
from llmkit.objectives.sentences import ends_sentence

CONTEXT = 64


def encoded(count=400, **settings):
    made = objectives.make(
        "mlm+nsp", CONTEXT, mlm={"ratio": 0}, **settings
    )  # one token is hidden all the same
    rows = objectives.rows("mlm+nsp", count, CONTEXT)
    return rows, [restored(made.encode(row)) for row in rows]


def restored(example):
    """The example with its hidden tokens put back."""
    hidden = example["targets"] != NOT_LEARNED
    assert hidden.sum() == 1
    return {**example, "ids": np.where(hidden, example["targets"], example["input_ids"])}


def halves(example):
    """A and B without their frame."""
    ids, second = example["ids"], example["token_type_ids"] == 1
    return ids[~second][1:-1], ids[second][:-1]


def test_pairs_are_what_their_labels_say():
    vocabulary = objectives.vocabulary("mlm+nsp")
    end = objectives.tokenizer("mlm+nsp").eos_token_id
    cls, sep, ends = vocabulary.role("cls_token"), vocabulary.role("sep_token"), ends_sentence(vocabulary)
    seen = Counter()
    for row, example in zip(*encoded(), strict=True):
        first, second = halves(example)
        label = int(example["pair_targets"])
        seen[label] += 1
        assert example["ids"][0] == cls
        assert example["ids"][-1] == sep
        assert example["attention_mask"].all()
        if label == NOT_LEARNED:
            assert np.array_equal(example["ids"][1:-1], row["ids"])
            assert not example["token_type_ids"].any()
            continue
        assert len(example["ids"]) == CONTEXT
        assert np.array_equal(first, row["ids"][: len(first)])
        assert ends[first[-1]]
        assert first[-1] != end, "cut between two documents"
        if label == GOES_ON:
            assert np.array_equal(second, row["ids"][len(first) :])
        else:
            other = row["other"]
            windows = np.lib.stride_tricks.sliding_window_view(other, len(second))
            starts = np.flatnonzero((windows == second).all(1))
            assert any(start > 0 and ends[other[start - 1]] for start in starts)
    assert seen[GOES_ON] + seen[OTHER] > 300
    pairs = seen[GOES_ON] + seen[OTHER]
    assert abs(seen[OTHER] / pairs - 0.5) < 5 * (0.25 / pairs) ** 0.5


def test_where_the_second_text_begins_says_nothing_of_the_label():
    """Rows are cut alike whether the second text is then replaced or not."""
    _, all_real = encoded(nsp={"other_ratio": 0})
    _, all_other = encoded(nsp={"other_ratio": 1})
    cuts = [
        [len(halves(example)[0]) for example in examples if example["pair_targets"] != NOT_LEARNED]
        for examples in (all_real, all_other)
    ]
    assert cuts[0] == cuts[1]
    assert {int(e["pair_targets"]) for e in all_real} == {GOES_ON, NOT_LEARNED}
    assert {int(e["pair_targets"]) for e in all_other} == {OTHER, NOT_LEARNED}


def test_a_row_without_a_sentence_end_or_another_document_is_one_text():
    made = objectives.make("mlm+nsp", CONTEXT)
    [row] = objectives.rows("mlm+nsp", 1, CONTEXT)
    plain = np.full_like(row["ids"], objectives.vocabulary("mlm+nsp").encode("x")[0])
    empty = np.zeros(0, np.int64)
    for changed in ({**row, "ids": plain}, {**row, "other": plain}, {**row, "other": empty}):
        example = made.encode(changed)
        assert int(example["pair_targets"]) == NOT_LEARNED
        batch = made.collate([example])
        assert int(batch["num_pairs"]) == 0
        assert int(batch["num_targets"]) > 0
        assert batch["input_ids"].shape == (1, CONTEXT)
        assert int(batch["attention_mask"].sum()) == len(row["ids"]) + 2


@pytest.fixture(scope="module")
def model():
    vocabulary = objectives.vocabulary("mlm+nsp")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        pad_token_id=vocabulary.role("pad_token"),
    )
    made = BertForPreTraining(config).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def test_the_loss_is_that_of_transformers(model):
    choose_heads(model, "pairs")
    made = objectives.make("mlm+nsp", CONTEXT)
    batch = made.collate([made.encode(row) for row in objectives.rows("mlm+nsp", 12, CONTEXT)])
    assert 0 < int(batch["num_pairs"]) <= 12
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
        labels=batch["targets"],
        next_sentence_label=batch["pair_targets"],
    )
    loss = made.loss(model, batch)
    assert float(loss.mean(batch)) == pytest.approx(float(output.loss), rel=1e-5)
    assert list(loss.totals) == ["num_targets", "num_pairs"]
    judged = batch["pair_targets"] != NOT_LEARNED
    right = (output.seq_relationship_logits.argmax(1) == batch["pair_targets"])[judged].sum()
    sums = {name: float(value) for name, value in loss.sums.items()}
    figures = made.summarise(
        {**sums, "total": 1.0, "num_targets": 1.0, "num_pairs": float(batch["num_pairs"])}
    )
    assert figures["pair_accuracy"] == int(right) / int(judged.sum())
    # By the model's own logits, where they are not made in chunks, the same.
    model.llmkit_own_logits = True
    assert float(made.loss(model, batch).mean(batch)) == pytest.approx(float(output.loss), rel=1e-5)


def test_a_batch_without_pairs_has_a_gradient_for_every_parameter(model):
    """Else DDP would wait for those that have none."""
    choose_heads(model, "pairs")
    made = objectives.make("mlm+nsp", CONTEXT)
    [row] = objectives.rows("mlm+nsp", 1, CONTEXT)
    empty = np.zeros(0, np.int64)
    batch = made.collate([made.encode({**row, "other": empty})])
    model.zero_grad()
    made.loss(model.train(), batch).mean({"num_targets": 4, "num_pairs": 0}).backward()
    model.eval()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.cls.seq_relationship.weight.grad.abs().max() == 0


class OneDocument(objectives.Text):
    def __init__(self):
        super().__init__("mlm+nsp")
        self.starts = self.starts[:1]


def test_held_out_text_of_one_document_has_no_pairs_and_training_text_is_refused():
    rows = Rows([OneDocument()], CONTEXT - 3, overlap=0, partial=True)
    made = objectives.make("mlm+nsp", CONTEXT)
    for found in evaluation_rows(rows, micro_batch_size=4, max_rows=8, isolate=True, other=True):
        assert int(made.collate([made.encode(row) for row in found])["num_pairs"]) == 0
    with pytest.raises(DataError, match="no text of another document"):
        rows.take_other(0, 0, 1)


def test_pairs_are_learned_where_documents_differ(tmp_path):
    """Sentences that say which document they are of: a tiny model tells a change of document after some steps."""
    (tmp_path / "text").mkdir()
    draw = np.random.default_rng(0)
    for number in range(60):
        word = ("alpha", "omega", "kappa", "sigma")[number % 4]
        lines = [" ".join([word] * int(draw.integers(2, 5))) + "." for _ in range(100)]
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(lines))
    setting = objectives.changes("mlm+nsp")
    setting["pretrain__model__config"] = {
        **objectives.TINY["pairs"],
        "hidden_size": 64,
        "intermediate_size": 128,
    }
    folder = pretrain(
        tmp_path,
        **setting,
        pretrain__data={"name": "text", "files": str(tmp_path / "text")},
        pretrain__model__dropout=0.0,
        pretrain__train={
            "length": "200 steps",
            "batch": "16 samples",
            "optim": {"lr": 4e-3, "warmup": "5 steps"},
        },
        pretrain__eval={"every": "never"},
        pretrain__prompts=[],
    )
    # At best 0.875 or so: a quarter of the other documents are of the same kind.
    assert losses(folder, "eval/pair_accuracy")[200] > 0.7
    assert losses(folder, "eval/pair_loss")[200] < 0.5
