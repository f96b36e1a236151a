"""What is kept of a teacher: the divergence against whole logits, its bound, and where each line belongs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.models.heads import Scores
from llmkit.objectives import taught
from llmkit.objectives.base import LossModule
from llmkit.objectives.clm import CausalLM
from llmkit.objectives.distil import Distilled
from llmkit.objectives.sft import Sft
from llmkit.objectives.taught import Taught, divergence_from_kept, likeliest
from llmkit.recipe.objectives import Cache, Distil

VOCAB = 50
SIZES = {"num_attention_heads": 2, "intermediate_size": 64, "vocab_size": VOCAB, "num_hidden_layers": 2}
IDS = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1)).numpy()


def llama(seed, **fields):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{"hidden_size": 32, **SIZES, **fields})
    return AutoModelForCausalLM.from_config(config)


def settings(**more):
    return Distil(teacher="t", **{"cache": Cache(top_k=8), **more})


def as_tensors(lines):
    return tuple(
        torch.from_numpy(one) for one in (lines.ids_LK.astype(np.int64), lines.logs_LK, lines.rest_L)
    )


def pair(sharp=1.0, count=7):
    """A teacher's and a model's scores of some positions, and which of them are learned."""
    made = torch.Generator().manual_seed(3)
    theirs, mine = (torch.randn(count, VOCAB, generator=made) * 3 * scale for scale in (sharp, 1.0))
    targets = torch.arange(count)
    targets[2] = -100
    return Scores(theirs), Scores(mine.requires_grad_()), targets


def kept(top_k, temperature=1.0, sharp=1.0):
    theirs, mine, targets = pair(sharp)
    lines = likeliest(theirs, targets, top_k, temperature, VOCAB)
    return divergence_from_kept(mine, targets, as_tensors(lines), temperature, VOCAB), mine, lines


def whole(temperature=1.0, sharp=1.0):
    theirs, mine, targets = pair(sharp)
    some = targets != -100
    logs = [functional.log_softmax(one.features_NH[some] / temperature, 1) for one in (mine, theirs)]
    return functional.kl_div(*logs, log_target=True, reduction="sum") * temperature**2, mine


def test_a_hand_count_of_two_kept_of_four():
    """p = (1/2, 1/4 | 1/4), q = (1/4, 1/4 | 1/2): 1/2 ln 2 + 0 + 1/4 ln 1/2."""
    theirs = Scores(torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log())
    mine = Scores(torch.tensor([[1.0, 1.0, 0.5, 1.5]]).log())
    lines = likeliest(theirs, torch.tensor([3]), 2, 1.0, 4)
    assert lines.ids_LK.tolist() == [[0, 1]]
    assert np.exp(lines.logs_LK) == pytest.approx(np.array([[0.5, 0.25]]), abs=1e-6)
    assert np.exp(lines.rest_L) == pytest.approx(np.array([0.25]), abs=1e-6)
    found = divergence_from_kept(mine, torch.tensor([3]), as_tensors(lines), 1.0, 4)
    assert float(found) == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_with_all_outputs_kept_it_is_the_whole_divergence_and_has_its_gradient(temperature, monkeypatch):
    monkeypatch.setattr(taught, "_CHUNK", 4)
    (found, mine, lines), (expected, other) = kept(VOCAB, temperature), whole(temperature)
    assert np.isneginf(lines.rest_L).all()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    gradients = [
        torch.autograd.grad(total, scores.features_NH)[0]
        for total, scores in ((found, mine), (expected, other))
    ]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fewer_are_kept_the_lower_it_is_and_never_below_nothing(temperature):
    values = [float(kept(top_k, temperature)[0].detach()) for top_k in (1, 2, 4, 8, 16, 32, 49, VOCAB)]
    assert all(less <= more + 1e-5 for less, more in pairwise(values))
    assert 0 < values[0] < values[-1] - 0.1
    assert values[-2] == pytest.approx(float(whole(temperature)[0].detach()), rel=1e-5)


def test_the_gradient_is_that_of_finite_differences_and_finite_for_a_teacher_that_is_sure():
    found, mine, lines = kept(4, sharp=100.0)
    assert lines.rest_L.min() < -100
    gradient = torch.autograd.grad(found, mine.features_NH)[0]
    assert torch.isfinite(gradient).all()
    theirs, mine, targets = pair()
    tensors = as_tensors(likeliest(theirs, targets, 4, 2.0, VOCAB))

    def total(logits):
        return divergence_from_kept(Scores(logits), targets, tensors, 2.0, VOCAB)

    logits = mine.features_NH.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(total(logits), logits)[0]
    step = torch.zeros_like(logits)
    step[0, 7] = 1e-2
    change = (total(logits + step) - total(logits - step)) / 2e-2
    assert float(gradient[0, 7]) == pytest.approx(float(change.detach()), abs=1e-3)


def with_lines(objective, teacher, examples):
    said = objective.ask(teacher, examples)
    return [{**example, **lines.arrays()} for example, lines in zip(examples, said, strict=True)]


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_equals_that_of_a_teacher_that_is_asked_at_every_step(weight):
    student, teacher = llama(0).train(), llama(1, hidden_size=48).eval()
    live = Distilled(CausalLM(), teacher, settings(weight=weight, temperature=1.5, cache=None), "causal")
    own = Taught(CausalLM(), settings(weight=weight, temperature=1.5), top_k=VOCAB, outputs=VOCAB)
    examples = [own.encode({"ids": row}) for row in IDS]
    batch = own.collate(with_lines(own, teacher, examples))
    found = LossModule(student, own, bf16=False)(batch).total
    expected = LossModule(student, live, bf16=False)(live.collate(examples)).total
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    mine, its = (torch.autograd.grad(one, student.lm_head.weight)[0] for one in (found, expected))
    assert torch.allclose(mine, its, atol=1e-6)


class _Conversations:
    stops = frozenset()


def test_lines_find_their_targets_in_rows_that_are_packed_in_another_order():
    """Conversations are put in lines by their lengths; each target must meet what was said of it, and no other."""
    own = Taught(Sft(_Conversations(), 0, pack=True), settings(), top_k=VOCAB, outputs=VOCAB)
    draw = np.random.default_rng(5)
    examples = []
    for length in (5, 3000, 9, 2500, 700, 12):
        ids = draw.integers(0, VOCAB, length)
        examples.append({"input_ids": ids, "targets": np.where(draw.random(length) < 0.1, ids, -100)})
    for number, example in enumerate(examples):  # a line says of which example and target it is
        count = int((example["targets"] != -100).sum())
        example[taught.IDS] = np.tile(np.arange(VOCAB), (count, 1))
        example[taught.LOGS] = np.full((count, VOCAB), number, np.float32)
        example[taught.REST] = example["targets"][example["targets"] != -100].astype(np.float32)
    batch = own.collate(examples)
    learned = batch["targets"].flatten()
    learned = learned[learned != -100]
    assert batch[taught.REST][: len(learned)].tolist() == learned.tolist()
    assert batch[taught.LOGS][: len(learned), 0].tolist() != sorted(
        batch[taught.LOGS][: len(learned), 0].tolist()
    )


def test_what_is_said_of_a_row_does_not_depend_on_the_rows_beside_it():
    teacher = llama(1).eval()
    own = Taught(Sft(_Conversations(), 0, pack=True), settings(), top_k=8, outputs=VOCAB)
    examples = [
        {"input_ids": row[:-1][:size], "targets": row[1:][:size]}
        for row, size in zip(IDS, (4, 11, 7), strict=True)
    ]
    together = own.ask(teacher, examples)
    for example, lines in zip(examples, together, strict=True):
        (alone,) = own.ask(teacher, [example])
        assert len(lines) == len(example["targets"])
        assert np.array_equal(alone.ids_LK, lines.ids_LK)
        assert np.allclose(alone.logs_LK, lines.logs_LK, atol=1e-5)
        assert np.allclose(alone.rest_L, lines.rest_L, atol=1e-4)


def test_an_evaluation_measures_the_model_alone():
    student = llama(0).eval()
    own = Taught(CausalLM(), settings(), top_k=8, outputs=VOCAB)
    examples = with_lines(own, llama(1).eval(), [own.encode({"ids": row}) for row in IDS])
    mine = LossModule(student, own, bf16=False).eval()(own.collate(examples))
    plain = LossModule(student, CausalLM(), bf16=False).eval()(CausalLM().collate(examples))
    assert float(mine.total.detach()) == float(plain.total.detach())
