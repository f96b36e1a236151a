"""What processes send: counted, refused, and brought together at meetings by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training import STEPS, recipe
from tuning import recipe as task_recipe

from llmkit.errors import LlmkitError
from llmkit.models.build import build_model
from llmkit.plan import shape_of_config
from llmkit.plan.communication import (
    apart_bytes,
    bytes_per_step,
    check_communication,
    factor_rank,
    identity_of,
    matrices_of,
    on_meetings,
    outer_bytes,
    overflow_hint,
    powersgd_values,
    told_change,
    with_communication,
)
from llmkit.plan.parallel import Layout
from llmkit.recipe import load_recipe
from llmkit.recipe.machine import Communication, LocalSteps
from llmkit.train import local_steps
from llmkit.train.communication import ByMeetings, Communicator, EveryStep
from llmkit.train.local_steps import Meetings
from llmkit.train.own import Held
from llmkit.train.powersgd import PowerSGD

DILOCO = {"every": 2, "lr": 0.5, "momentum": 0.5}


# --- counted ---------------------------------------------------------------------------------------------------


def test_only_matrices_that_become_much_thinner_are_sent_as_factors():
    assert factor_rank((100, 100), 4) == 4  # 800 numbers for 10,000
    assert factor_rank((100, 100), 25) == 0  # 5,000: not less than half of it
    assert factor_rank((100,), 1) == 0
    assert factor_rank((64, 8, 8), 4) == 4  # 64 x 64
    assert powersgd_values([(100, 100), (100,), (4, 4)], 4) == 800 + 100 + 16


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, 4 * 10_100),
        ({"gradients": "fp16"}, 2 * 10_100),
        ({"gradients": "bf16"}, 2 * 10_100),
        ({"gradients": "powersgd", "rank": 4}, 4 * 900),
        ({"local_steps": {"every": 8}}, 4 * 10_100 / 8),
    ],
)
def test_a_ring_sends_twice_what_the_others_have(settings, numbers):
    given, shapes = Communication.model_validate(settings), [(100, 100), (100,)]
    assert bytes_per_step(given, shapes, 1) == 0
    assert bytes_per_step(given, shapes, 2) == numbers
    assert bytes_per_step(given, shapes, 4) == 1.5 * numbers


def test_what_is_remembered_takes_memory_and_local_steps_need_no_buckets(tmp_path):
    def more(world, **settings):
        return outer_bytes(Communication.model_validate(settings), 10, Layout(replicate=world))

    assert more(2) == more(2, gradients="fp16") == more(1, gradients="powersgd") == 0
    assert more(2, gradients="powersgd") == more(1, local_steps={"every": 2}) == 40
    assert more(2, local_steps={"every": 2}) == 0
    assert more(2, local_steps=DILOCO) == 40
    assert more(1, local_steps=DILOCO) == 80
    plain = planned(tmp_path)
    met = planned(tmp_path, machine__communication={"local_steps": DILOCO})
    assert met.memory.buffers - plain.memory.buffers == 4 * plain.num_parameters


def test_a_checkpoint_holds_what_each_process_has_for_itself(tmp_path):
    plain = planned(tmp_path)
    weights = 4 * plain.num_parameters

    def more(**settings):
        found = planned(tmp_path, machine__communication=settings)
        assert found.disk_bytes["checkpoints"] == 11 * found.checkpoint_bytes  # ten are kept
        return found.checkpoint_bytes - plain.checkpoint_bytes, apart_bytes(found)

    assert plain.checkpoint_bytes == 3 * weights
    assert more(gradients="fp16") == (0, 0)
    assert more(gradients="powersgd") == (2 * weights, 0)
    assert more(local_steps={"every": 1}) == (2 * weights, 0)
    assert more(local_steps=DILOCO) == (3 * weights, 2 * weights)


def test_checkpoints_that_stay_for_good_and_the_best_take_room_on_the_disk(tmp_path):
    def count(**settings):
        found = planned(tmp_path, pretrain__checkpoint={"every": "2 steps", "keep": 2, **settings})
        return found.disk_bytes["checkpoints"] / found.checkpoint_bytes

    assert count() == 3
    assert count(keep_best="eval/loss") == 4
    assert count(keep_every="4 steps") == 3 + STEPS // 4


def test_weights_beside_the_model_are_sent_too(tmp_path):
    plain, section = planned(tmp_path), load_recipe(recipe(tmp_path)).recipe.pretrain

    def sent(beside, **settings):
        given = Communication.model_validate(settings)
        found = with_communication(plain, given, section, shapes=[(64, 64), (9,)], beside=beside)
        return found.communication.get("bytes_per_step")

    assert sent(50, gradients="fp16") - sent(0, gradients="fp16") == 2 * 50
    assert sent(0, gradients="powersgd", rank=1) == 4 * (128 + 9)
    assert sent(50, gradients="powersgd", rank=1) is None, "their shapes are not known"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["gpt", "qwen3"])
def test_the_shapes_in_the_plan_are_those_of_the_model(preset, tied):
    from llmkit.plan import model_fields, with_lengths
    from llmkit.recipe.schema import Model

    spec = Model(preset=f"{preset}-tiny", context=64)
    fields = {**with_lengths(model_fields(spec), 300, 64), "tie_word_embeddings": tied}
    found = matrices_of(shape_of_config(fields, "causal"))
    spec = Model(config=fields, context=64)
    model = build_model(spec, "causal", vocab_size=300, special_ids={"eos_token_id": 0}, seed=1)
    built = [tuple(p.shape) for p in model.parameters()]
    assert sum(p.numel() for p in model.parameters()) == sum(torch.Size(s).numel() for s in found)
    tables = {(300, model.config.hidden_size), (64, model.config.hidden_size)}

    def matrices(shapes):
        return sorted(tuple(sorted(s)) for s in shapes if len(s) > 1 and s not in tables)

    assert matrices(found) == matrices(built)


# --- told and refused ------------------------------------------------------------------------------------------


def planned(tmp_path, *, processes=2, **changes):
    from training import options

    from llmkit.run.planning import plan

    loaded = load_recipe(recipe(tmp_path, machine__micro_batch=2, **changes))
    return plan(loaded, options(tmp_path, processes=processes))


def test_the_plan_says_what_is_sent_and_evaluates_at_meetings(tmp_path):
    found = planned(tmp_path, machine__communication={"local_steps": {"every": 4}})
    assert (found.eval_every, found.checkpoint_every) == (12, 8)
    assert found.communication["bytes_per_step"] == found.num_parameters
    notes = "\n".join(found.notes)
    assert "evaluations fall on meetings: every 12 steps instead of 10" in notes
    assert "checkpoints fall on meetings: every 8 steps instead of 5" in notes
    assert "each process sends about" in notes
    assert on_meetings(found) == found
    plain = planned(tmp_path)
    assert (plain.eval_every, plain.checkpoint_every, plain.communication) == (10, 5, {})


def test_one_process_is_told_that_nothing_is_sent(tmp_path):
    found = planned(tmp_path, processes=1, machine__communication={"gradients": "fp16"})
    assert any("does nothing with one process" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"machine__communication": {"gradients": "fp16", "local_steps": {"every": 4}}},
            "with `local_steps` no gradients travel",
        ),
        (
            {"machine__communication": {"local_steps": {"every": 4}}, "pretrain__train__ema": 0.9},
            "every process would",
        ),
        (
            {
                "machine__communication": {"local_steps": {"every": 4}},
                "pretrain__train__optim": {"name": "schedule_free", "lr": 1e-3},
            },
            "every process would",
        ),
        (
            {"machine__communication": {"local_steps": {"every": 4}}, "machine__parallel": "fsdp"},
            "with a sharded model",
        ),
        (
            {"machine__communication": {"gradients": "powersgd"}, "machine__parallel": "fsdp"},
            "for models that every process holds whole",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, changes, said):
    with pytest.raises(LlmkitError, match=said) as refused:
        planned(tmp_path, **changes)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("dpo", {"finetune__dpo__loss": "kto"}, "finetune.dpo.loss: kto"),
        ("dpo", {}, ""),
        ("embed", {}, "finetune.task: embed"),
    ],
)
def test_local_steps_are_refused_where_rows_of_all_processes_are_compared(tmp_path, task, changes, said):
    section = load_recipe(task_recipe(tmp_path, task, **changes)).recipe.finetune
    met = Communication(local_steps=LocalSteps(every=2))
    check_communication(Communication(gradients="fp16"), Layout(replicate=2), section)
    if not said:
        check_communication(met, Layout(replicate=2), section)
        return
    with pytest.raises(LlmkitError, match=said):
        check_communication(met, Layout(replicate=2), section)


def test_meeting_makes_another_run_and_the_way_of_gradients_is_told(tmp_path):
    assert identity_of(Communication(gradients="fp16")) == {}
    [(key, value)] = identity_of(Communication(local_steps=LocalSteps(every=4))).items()
    assert (key, value["every"]) == ("machine.communication.local_steps", 4)
    plain = planned(tmp_path)
    half = planned(tmp_path, machine__communication={"gradients": "fp16"})
    assert "fp16, where this run began with fp32" in told_change(plain, half)
    assert told_change(half, half) == told_change(plain, plain) == ""
    assert "65,504" in overflow_hint(half)
    assert overflow_hint(plain) == overflow_hint(replace(half, world_size=1)) == ""
    met = planned(tmp_path, machine__communication={"local_steps": {"every": 4}})
    assert "4 processes meet, where this run began with 2" in told_change(met, replace(met, world_size=4))
    again = with_communication(
        plain, Communication(), load_recipe(recipe(tmp_path)).recipe.pretrain, shapes=None
    )
    assert again == plain


# --- meetings by hand --------------------------------------------------------------------------------------------


def model_of(values):
    made = nn.Module()
    made.w = nn.Parameter(torch.tensor(values))
    return made


def meeting(size, values=(1.0, 2.0), **changes):
    model = model_of(values)
    settings = {"every": 2, "lr": 0.5, "momentum": 0.5, "num_steps": 5, **changes}
    return model, Meetings(dict(model.named_parameters()), world_size=size, **settings)


def move(model, to):
    with torch.no_grad():
        model.w.copy_(torch.tensor(to))


def test_two_meetings_of_two_processes_worked_out_by_hand(monkeypatch):
    """Anchor (1, 2). They move to (0, 2) and (0, 4): in the mean by (-1, +1), so the outer gradient is (1, -1)."""
    model, meetings = meeting(2)
    others = iter([torch.tensor([1.0, -2.0]), torch.tensor([0.25, 2.75])])
    monkeypatch.setattr(local_steps.dist, "all_reduce", lambda message: message.add_(next(others)))
    move(model, [0.0, 2.0])
    meetings.meet()
    # Velocity (1, -1), direction (1, -1) + 0.5 (1, -1) = (1.5, -1.5), half of it taken: (0.25, 2.75).
    assert model.w.tolist() == meetings.anchor["w"].tolist() == [0.25, 2.75]
    assert meetings.velocity["w"].tolist() == [1.0, -1.0]
    # One stays, the other goes to (0, 0): it is (0.25, 2.75) away, in the mean (0.125, 1.375).
    meetings.meet()
    velocity = torch.tensor([0.5 + 0.125, -0.5 + 1.375])
    direction = torch.tensor([0.125, 1.375]) + 0.5 * velocity
    torch.testing.assert_close(meetings.velocity["w"], velocity)
    torch.testing.assert_close(model.w.detach(), torch.tensor([0.25, 2.75]) - 0.5 * direction)


def test_the_outer_step_is_that_of_torch(monkeypatch):
    model, meetings = meeting(1, values=(1.0, -3.0, 2.0), lr=0.7, momentum=0.9)
    twin = nn.Parameter(model.w.detach().clone())
    outer = torch.optim.SGD([twin], lr=0.7, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        moved = torch.randn(3, generator=generator)
        with torch.no_grad():
            model.w.add_(moved)
        twin.grad = -moved
        outer.step()
        meetings.meet()
        torch.testing.assert_close(model.w, twin, atol=1e-6, rtol=0)


def test_weights_travel_in_messages_of_a_bounded_size(monkeypatch):
    monkeypatch.setattr(local_steps, "_MESSAGE_VALUES", 10)
    sizes = []
    monkeypatch.setattr(local_steps.dist, "all_reduce", lambda message: sizes.append(message.numel()))
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(size)) for name, size in zip("abcd", (4, 6, 3, 20), strict=True)}
    )
    meetings = Meetings(
        dict(model.named_parameters()), every=1, lr=1.0, momentum=0.0, num_steps=1, world_size=2
    )
    meetings.meet()
    assert sizes == [10, 3, 20]
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters()), "nobody moved"


def test_they_meet_every_so_many_steps_and_at_the_end():
    _, meetings = meeting(1)
    assert [step for step in range(1, 6) if meetings.due(step)] == [2, 4, 5]


def test_each_process_divides_by_its_own_targets_and_is_told_the_mean_norm():
    _, meetings = meeting(2)
    apart = ByMeetings(meetings, lambda one: one + 5.0, size=2)
    together = EveryStep()
    mine, everyone = {"num_targets": 3}, {"num_targets": 8}
    assert (apart.shares(2), apart.counts(mine, everyone)) == (1, mine)
    assert (together.shares(2), together.counts(mine, everyone)) == (2, everyone)
    assert float(apart.norm(torch.tensor(1.0))) == 3.0
    assert not torch.isfinite(ByMeetings(meetings, lambda one: one + torch.inf, 2).norm(torch.tensor(1.0)))


# --- saved and gone on from ----------------------------------------------------------------------------------------


def held(folder, processes):
    """A checkpoint's own files, one for each process."""
    for rank, tensors in enumerate(processes):
        made = {name: torch.tensor(values) for name, values in tensors.items()}
        path = folder / f"own.rank-{rank:05d}.safetensors"
        save_file(made, path, metadata={"processes": str(len(processes))})
    return Held.of(folder)


def test_between_meetings_every_process_saves_its_weights_and_all_save_the_anchor(tmp_path):
    model, meetings = meeting(1)
    exchange = ByMeetings(meetings, lambda one: one, size=1)
    move(model, [0.0, 0.0])
    exchange.updated(1, good=True)
    own = exchange.own(1, {"exp_avg.w": torch.ones(2)})
    assert {name: tensor.tolist() for name, tensor in own.items()} == {
        "optimizer.exp_avg.w": [1.0, 1.0],
        "weights.w": [0.0, 0.0],
    }
    assert exchange.common({"w": model.w, "b": model.w})["w"].tolist() == [1.0, 2.0]
    exchange.updated(2, good=False)  # numbers that are not finite put no meeting off
    assert "weights.w" not in exchange.own(0, {})
    assert exchange.common({"w": model.w})["w"] is model.w


def test_another_number_of_processes_meets_first(tmp_path):
    """Two were at (0, 2) and (0, 4) when they stopped: the first example above."""
    found = held(
        tmp_path,
        [{"outer.w": [0.0, 0.0], "weights.w": [0.0, 2.0]}, {"weights.w": [0.0, 4.0]}],
    )
    model, meetings = meeting(1)
    exchange = ByMeetings(meetings, lambda one: one, size=1)
    said = exchange.begin(found, 0, 1, core=None, optimizer=None, state=None)
    assert model.w.tolist() == [0.25, 2.75]
    assert "met first" in said
    assert "1 processes go on from the inner optimizers of 2" in said


def test_what_was_not_sent_is_shared_by_another_number_of_processes(tmp_path):
    weight = nn.Parameter(torch.zeros(8, 8))
    compressor = PowerSGD({"w": weight}, rank=1, seed=0, world_size=1)
    errors = [torch.full((8, 8), 1.0), torch.full((8, 8), 3.0)]
    factor = torch.arange(8.0).unsqueeze(1)
    found = held(
        tmp_path,
        [
            {"error.w": errors[0].tolist(), "factor.w": factor.tolist()},
            {"error.w": errors[1].tolist()},
        ],
    )
    exchange = EveryStep(compressor)
    assert exchange.begin(found, 1, 2) == ""
    assert torch.equal(compressor.tensors()["error.w"], errors[1])
    assert torch.equal(compressor.tensors()["factor.w"], factor)
    assert "shared equally by 3" in exchange.begin(found, 2, 3)
    assert torch.equal(compressor.tensors()["error.w"], torch.full((8, 8), 2.0))
    assert set(exchange.own(1, {})) == {"error.w"}
    first = PowerSGD({"w": weight}, rank=1, seed=0, world_size=1).tensors()["factor.w"]
    exchange.updated(3, good=False)
    assert not compressor.tensors()["error.w"].any()
    assert torch.equal(compressor.tensors()["factor.w"], first)


def test_what_was_not_sent_goes_into_the_next_gradient_where_nothing_compresses_any_more(tmp_path):
    """Two had kept back (1, 2) and (3, 4): in the mean (2, 3), which the gradient of the next step is added to."""
    held(tmp_path, [{"error.w": [1.0, 2.0], "factor.w": [0.0]}, {"error.w": [3.0, 4.0]}])
    model = model_of([1.0, 1.0])
    core = SimpleNamespace(trained=model)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    said = []

    def go_on(layout, saved=tmp_path):
        plan = SimpleNamespace(communication={}, layout=layout)
        communicator = Communicator(plan, accelerator, seed=1)
        return communicator.begin(core, None, saved, None, 5, said.append)

    _, writer = go_on(Layout(shard=2))
    assert (model.w.grad, writer) == (None, None)
    go_on(Layout(), saved=None)
    assert model.w.grad is None
    go_on(Layout())
    (model.w * torch.tensor([10.0, 20.0])).sum().backward()
    assert model.w.grad.tolist() == [12.0, 23.0]
    lost, kept = said
    assert "is lost, for the model is sharded" in lost
    assert "what 2 processes had not sent yet goes into the next step" in kept


def test_a_lost_file_of_a_process_is_an_error(tmp_path):
    assert Held.of(tmp_path) is None
    held(tmp_path, [{"outer.w": [0.0]}, {"optimizer.w": [0.0]}])
    (tmp_path / "own.rank-00001.safetensors").unlink()
    with pytest.raises(LlmkitError, match="2 processes had for themselves, in 1 files"):
        Held.of(tmp_path)
