"""The plan of fine-tuning: arithmetic from rows whose lengths are known."""

import json
import math
from dataclasses import replace

import pytest

from llmkit.errors import RecipeError
from llmkit.hardware import detect_hardware
from llmkit.plan import Plan, PlanError, shape_of_preset
from llmkit.plan.tuning import CPU_TOKENS, plan_tuning
from llmkit.recipe import load_recipe
from llmkit.report.report import default_references

ROWS = {
    "train": {"num_rows": 1000, "num_tokens": 48_500, "longest": 200, "num_targets": 1000, "num_cut": 3},
    "held_out": {"num_rows": 100, "num_tokens": 5000, "longest": 180, "num_targets": 100, "num_cut": 0},
}


def planned(world_size=None, num_trained=None, **changes):
    section = {"task": "cls", "model": {"name": "m", "context": 256}, "data": {"files": "a.csv"}, **changes}
    machine = {"device": "cpu", "processes": 1, "precision": "fp32"}
    recipe = load_recipe({"llmkit": 1, "finetune": section, "machine": machine}).recipe
    model = shape_of_preset("bert-tiny", 1000, 256)
    return plan_tuning(
        recipe,
        replace(detect_hardware(recipe.machine), cores=2, memory_bytes=8 * 10**9),
        ROWS,
        vocab_size=1000,
        model=model,
        packed=False,
        num_trained=num_trained or model.num_parameters,
        world_size=world_size,
    )


def test_steps_follow_from_rows_not_from_tokens():
    plan = planned()
    assert (plan.rows_per_step, plan.num_steps) == (32, math.ceil(3 * 1000 / 32))
    assert plan.num_epochs == pytest.approx(plan.num_steps * 32 / 1000)
    assert plan.tokens_per_step == 32 * math.ceil(48_500 / 1000)
    assert plan.warmup_steps == round(0.06 * plan.num_steps)
    assert plan.micro_batch_tokens == CPU_TOKENS
    assert plan.choices["machine.micro_batch"][0] * 256 == CPU_TOKENS


def test_a_pinned_micro_batch_is_rows_of_full_length():
    section = {"task": "cls", "model": {"name": "m", "context": 256}, "data": {"files": "a.csv"}}
    recipe = load_recipe(
        {"llmkit": 1, "finetune": section, "machine": {"device": "cpu", "micro_batch": 3, "processes": 1}}
    ).recipe
    plan = plan_tuning(
        recipe, detect_hardware(recipe.machine), ROWS, vocab_size=1000,
        model=shape_of_preset("bert-tiny", 1000, 256), packed=False, num_trained=1,
    )  # fmt: skip
    assert plan.micro_batch_tokens == 3 * 256


def test_what_does_not_learn_has_neither_gradient_nor_moments():
    full = planned()
    some = planned(num_trained=full.num_parameters // 4)
    assert some.memory.gradients == pytest.approx(full.memory.gradients / 4, rel=1e-3)
    assert some.memory.optimizer == pytest.approx(full.memory.optimizer / 4, rel=1e-3)
    assert some.memory.weights == full.memory.weights
    saved = full.memory.gradients + full.memory.optimizer - some.memory.gradients - some.memory.optimizer
    copies = full.memory.copy - some.memory.copy
    # What hardly learns has no gradient of its output layer, and so less that is freed and kept.
    heads = full.memory.logits - some.memory.logits + full.memory.heap - some.memory.heap
    assert full.memory.total - some.memory.total == saved + copies + heads
    assert some.checkpoint_bytes == pytest.approx(full.checkpoint_bytes / 4, rel=1e-3)
    matrices = shape_of_preset("bert-tiny", 1000, 256).num_matmul_parameters
    assert full.flops_per_token - some.flops_per_token == pytest.approx(2 * matrices * 3 / 4, rel=1e-3)


def test_a_reference_is_one_forward_pass_more_whatever_learns():
    dpo = {"task": "dpo", "model": {"name": "m", "context": 256}}
    for trained in (None, 100):
        with_it, without = planned(num_trained=trained, **dpo), planned(num_trained=trained)
        assert with_it.flops_per_token - without.flops_per_token == planned().flops_per_token // 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"train": {"batch": "4Ki tokens"}}, "whole number of them"),
        ({"model": {"name": "m", "context": 512}}, "reads at most"),
    ],
)
def test_what_cannot_be_is_told_with_a_way_out(changes, word):
    with pytest.raises((PlanError, RecipeError)) as caught:
        planned(**changes)
    said = "".join(getattr(caught.value, "problems", ())) + str(caught.value)
    assert word in said
    assert "finetune.model.context=256" in said or "32 samples" in said


@pytest.mark.parametrize(
    ("changes", "held_out", "key"),
    [
        ({"held_out": 0}, 0, "held_out: 0` keeps none"),
        ({"validation": {"files": "b.csv"}}, 0, "`validation` has none"),
        ({"eval": {"every": "200 steps"}}, 100, "eval.every` is 200 steps, and the run is 94 steps long"),
        ({"eval": {"every": "94 steps"}}, 100, "eval.every` is 94 steps"),
    ],
)
def test_a_run_that_nothing_could_stop_early_is_refused_by_the_right_key(changes, held_out, key, monkeypatch):
    monkeypatch.setitem(ROWS, "held_out", {**ROWS["held_out"], "num_rows": held_out})
    with pytest.raises(PlanError) as caught:
        planned(stop_early={}, **changes)
    assert key in str(caught.value)
    assert planned(**changes).num_steps == 94


def test_a_run_that_may_stop_early_is_planned():
    assert planned(stop_early={}, eval={"every": "93 steps"}).eval_every == 93


def test_a_batch_larger_than_the_data_is_noted():
    assert any("rows repeat" in note for note in planned(train={"batch": "2k samples"}).notes)


def test_a_plan_comes_back_from_json_and_an_older_one_too():
    plan = planned()
    plain = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(plain) == plan
    for new in ("rows", "packed", "num_trained", "micro_batch_tokens"):
        plain.pop(new)
    assert Plan.from_dict(plain).micro_batch_tokens == 0
    with pytest.raises(ValueError, match="fields that differ"):
        Plan.from_dict({**plain, "other": 1})


def test_the_line_to_beat_of_classes_is_their_entropy():
    found = default_references({"vocab_size": 1000}, {"task": "cls", "classes": {"a": 30, "b": 10}})
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert list(found.values()) == [pytest.approx(entropy)]
    assert default_references({"vocab_size": 1000}, {"task": "sft", "classes": {}}) == {}
