"""Distillation by hand counts, and against what transformers says of states and attention."""

import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from llmkit.errors import MissingError, UsageError
from llmkit.evaluate.split import sum_over
from llmkit.models.attention import tap_attention
from llmkit.models.heads import Scores
from llmkit.objectives import distil
from llmkit.objectives.base import LossModule
from llmkit.objectives.clm import CausalLM
from llmkit.objectives.distil import Distilled
from llmkit.recipe.objectives import Distil
from llmkit.train.places import check_teacher
from llmkit.train.prove import prove_saving

SIZES = {"num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 2}
IDS = torch.randint(0, 50, (3, 13), generator=torch.Generator().manual_seed(1)).numpy()


def llama(seed, **fields):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{"hidden_size": 32, **SIZES, **fields})
    return AutoModelForCausalLM.from_config(config)


def batch_of(objective):
    return objective.collate([objective.encode({"ids": row}) for row in IDS])


def test_a_hand_count_of_two_tokens():
    """p = (3/4, 1/4) taught, q = (1/2, 1/2) found: KL(p|q) = 3/4 ln 3/2 + 1/4 ln 1/2, KL(q|p) = 1/2 ln 4/3."""
    taught = Scores(torch.tensor([[3.0, 1.0], [9.0, 9.0]]).log())
    found = Scores(torch.tensor([[1.0, 1.0], [1.0, 5.0]]).log())
    targets = torch.tensor([1, -100])
    forward = Distil(teacher="t", direction="forward")
    reverse = Distil(teacher="t", direction="reverse")
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert float(distil._divergence(found, taught, targets, forward)) == pytest.approx(expected, abs=1e-7)
    expected = 0.5 * np.log(4 / 3)
    assert float(distil._divergence(found, taught, targets, reverse)) == pytest.approx(expected, abs=1e-7)


def test_temperature_flattens_both_and_counts_by_its_square():
    """At temperature 2 the square roots are compared: p = (3/4, 1/4) from logits of (9, 1), times 4."""
    taught, found = Scores(torch.tensor([[9.0, 1.0]]).log()), Scores(torch.tensor([[1.0, 1.0]]).log())
    warm = Distil(teacher="t", temperature=2.0)
    expected = 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    found_value = float(distil._divergence(found, taught, torch.tensor([0]), warm))
    assert found_value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_and_its_gradient_equal_those_from_whole_logits(direction, monkeypatch):
    monkeypatch.setattr(distil, "_CHUNK", 5)
    student, teacher = llama(0).train(), llama(1, hidden_size=48).eval()
    settings = Distil(teacher="t", weight=0.3, temperature=1.5, direction=direction)
    objective = Distilled(CausalLM(), teacher, settings, "causal")
    batch = batch_of(objective)
    total = LossModule(student, objective, bf16=False)(batch).mean({"num_targets": 36})
    mine = torch.autograd.grad(total, student.lm_head.weight, retain_graph=True)[0]
    logits, targets = student(batch["input_ids"]).logits.flatten(0, 1), batch["targets"].flatten()
    with torch.no_grad():
        taught = teacher(batch["input_ids"]).logits.flatten(0, 1) / 1.5
    pair = [functional.log_softmax(one, 1) for one in (logits / 1.5, taught)]
    input_, target = pair if direction == "forward" else reversed(pair)
    divergence = functional.kl_div(input_, target, log_target=True, reduction="batchmean")
    expected = 0.7 * functional.cross_entropy(logits, targets) + 0.3 * divergence * 1.5**2
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert torch.allclose(mine, torch.autograd.grad(expected, student.lm_head.weight)[0], atol=1e-7)


@pytest.mark.parametrize("layers", ["uniform", "last"])
def test_states_and_attention_equal_those_that_transformers_gives(layers):
    student, teacher = llama(0).train(), llama(1, num_hidden_layers=4).eval()
    settings = Distil(teacher="t", weight=0.0, hidden=2.0, attention=3.0, layers=layers)
    objective = Distilled(CausalLM(), teacher, settings, "causal")
    for model in (student, teacher):
        tap_attention(model, isolate=False)
    core = LossModule(student, objective, bf16=False, parts=objective.parts(student))
    batch = batch_of(objective)
    loss = core(batch)
    assert int(batch["num_states"]) == 36
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    outputs = [
        model.base_model(batch["input_ids"], output_hidden_states=True, output_attentions=True)
        for model in (student, teacher)
    ]
    expected = 0.0
    pairs = [(1, 2), (2, 4)] if layers == "uniform" else [(2, 4)]
    for mine, theirs in pairs:
        # The last of transformers' states has the final norm; a block's own output has not.
        if theirs < 4:
            states = [outputs[0].hidden_states[mine], outputs[1].hidden_states[theirs]]
            expected += 2.0 * float((states[0] - states[1]).square().mean(-1).sum().detach())
        weights = [outputs[0].attentions[mine - 1], outputs[1].attentions[theirs - 1]]
        divergence = functional.kl_div(weights[0].clamp(min=1e-12).log(), weights[1], reduction="none")
        expected += 3.0 * float(divergence.sum(-1).mean(1).sum().detach())
    found = float(loss.totals["num_states"].detach()) * len(pairs)
    last = [distil.blocks_of(model)[-1] for model in (student, teacher)]
    with distil.listening([last[0]]) as one, distil.listening([last[1]]) as two, torch.no_grad():
        student.base_model(batch["input_ids"])
        teacher.base_model(batch["input_ids"])
    expected += 2.0 * float((one[0] - two[0]).square().mean(-1).sum())
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_its_own_weights_has_nothing_to_teach():
    student = llama(0, attention_dropout=0.0).train()
    teacher = llama(0).eval()
    settings = Distil(teacher="t", weight=1.0, hidden=1.0, attention=1.0)
    objective = Distilled(CausalLM(), teacher, settings, "causal")
    for model in (student, teacher):
        tap_attention(model, isolate=False)
    loss = LossModule(student, objective, bf16=False)(batch_of(objective))
    assert abs(float(loss.total.detach())) < 1e-5


def test_other_widths_are_bridged_and_a_part_of_what_is_trained():
    student, teacher = llama(0), llama(1, hidden_size=48)
    objective = Distilled(CausalLM(), teacher, Distil(teacher="t", hidden=1.0), "causal")
    parts = objective.parts(student)
    core = LossModule(student, objective, bf16=False, parts=parts, frozen={"teacher": teacher}).train()
    names = dict(core.trained.named_parameters())
    assert names["projections.0.weight"].shape == (48, 32)
    assert not any("teacher" in name for name in names)
    assert not teacher.training
    assert core.model.training
    core(batch_of(objective)).total.backward()
    assert names["projections.1.weight"].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gap_fillers_are_compared_at_every_position_but_padding():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", hidden_size=32, **SIZES)
    student, teacher = (AutoModelForMaskedLM.from_config(config) for _ in range(2))
    objective = Distilled(CausalLM(), teacher, Distil(teacher="t", hidden=1.0), "masked")
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    assert objective._compared({"targets": torch.zeros(2, 6), "attention_mask": mask}).sum() == 10
    assert len(distil.blocks_of(student)) == 2


def test_evaluation_measures_the_student_alone():
    student, teacher = llama(0).eval(), llama(1).eval()
    objective = Distilled(CausalLM(), teacher, Distil(teacher="t", weight=0.9), "causal")
    batch = batch_of(objective)
    mine = LossModule(student, objective, bf16=False).eval()(batch)
    plain = LossModule(student, CausalLM(), bf16=False).eval()(batch)
    assert float(mine.total) == float(plain.total)


def test_loader_processes_get_it_without_the_teacher():
    objective = Distilled(CausalLM(), llama(1), Distil(teacher="t"), "causal")
    copy = pickle.loads(pickle.dumps(objective))
    assert len(pickle.dumps(objective)) < 2000
    assert np.array_equal(copy.encode({"ids": IDS[0]})["targets"], IDS[0][1:])


def test_a_process_without_a_held_out_batch_knows_all_sums():
    objective = Distilled(CausalLM(), llama(1), Distil(teacher="t", hidden=1.0), "causal")
    core = LossModule(llama(0), objective, bf16=False)
    assert sum_over(core, [batch_of(objective)]).keys() == sum_over(core, [None]).keys()


def test_projections_are_proved_to_be_saved(tmp_path):
    student, teacher = llama(0), llama(1, hidden_size=48)
    objective = Distilled(CausalLM(), teacher, Distil(teacher="t", hidden=1.0), "causal")
    core = LossModule(student, objective, bf16=False, parts=objective.parts(student))
    assert "the logits are the same" in prove_saving(core, tmp_path)


def test_a_deeper_student_begins_with_the_teachers_first_block():
    student, teacher = llama(0, num_hidden_layers=6), llama(1, num_hidden_layers=2)
    objective = Distilled(CausalLM(), teacher, Distil(teacher="t", hidden=1.0), "causal")
    blocks = list(teacher.base_model.layers)
    assert [blocks.index(theirs) for _, theirs in objective._pairs(student)] == [0, 0, 0, 0, 1, 1]


def test_a_teacher_with_rows_of_padding_in_its_output_layer_teaches_the_vocabulary():
    student, teacher = llama(0).train(), llama(1, vocab_size=64)
    objective = Distilled(CausalLM(), teacher, Distil(teacher="t", weight=1.0), "causal")
    assert float(LossModule(student, objective, bf16=False)(batch_of(objective)).total.detach()) > 0


def test_a_teacher_is_looked_for_before_any_text_is_read(tmp_path):
    with pytest.raises(MissingError, match="no model, and no run"):
        check_teacher(str(tmp_path / "nothing"), "clm")
    AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="'clm' needs a causal language model"):
        check_teacher(str(tmp_path), "clm")
    check_teacher(str(tmp_path), "mlm")
    check_teacher("owner/name", "clm")


def test_heads_that_do_not_match_are_refused():
    objective = Distilled(
        CausalLM(), llama(1, num_attention_heads=4), Distil(teacher="t", attention=1.0), "causal"
    )
    with pytest.raises(UsageError, match="2 attention heads, the teacher 4"):
        objective.parts(llama(0))
