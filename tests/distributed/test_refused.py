"""What processes cannot share is refused before anything is trained; what each draws for itself is its own."""

import functools
import re

import pytest
import torch
from layouts import FSDP2, LLAMA, MIXTRAL, SHORT, TP2, FailedError, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from worlds import together

from llmkit.errors import RunError, UsageError
from llmkit.objectives.base import LossModule
from llmkit.optim import add_noise
from llmkit.plan.parallel import Layout
from llmkit.train import alike
from llmkit.train.experts import split_experts
from llmkit.train.parallel import check_alike, check_layout
from llmkit.train.tensor import check_splits, drops_something, split_layers

ONE_LEFT = {key: value for key, value in SHORT.items() if "config" not in key}


@pytest.mark.parametrize(
    ("config", "processes", "words"),
    [
        (LlamaConfig(num_attention_heads=4, num_key_value_heads=1), 2, "cannot share num_key_value_heads 1"),
        (
            LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=6),
            4,
            "cannot share num_attention_heads 6",
        ),
        (LlamaConfig(intermediate_size=63), 2, "cannot share intermediate_size 63"),
        (GPT2Config(), 2, "transformers has no plan by which gpt2 is split"),
        (BertConfig(), 2, "transformers has no plan by which bert is split"),
        (MixtralConfig(), 2, "packed_colwise, which is not built"),
    ],
)
def test_an_architecture_that_cannot_be_split_says_why_and_what_would_work(config, processes, words):
    with pytest.raises(UsageError, match=words) as caught:
        check_splits(config, processes)
    assert caught.value.hint


def test_a_run_that_cannot_be_split_ends_before_the_first_step(tmp_path):
    with pytest.raises(FailedError, match="2 processes cannot share num_key_value_heads 1"):
        train(tmp_path, TP2, **ONE_LEFT)
    assert not list((tmp_path / "runs/tensor2/pretrain").glob("checkpoints/*"))


def tiny(seed=1, **changes):
    torch.manual_seed(seed)
    fields = {**LLAMA, "vocab_size": 20, "max_position_embeddings": 16, **changes}
    fields.pop("model_type")
    return LlamaForCausalLM(LlamaConfig(**fields))


def _split_something_else(rank):
    model = tiny()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(
        UsageError, match=r"layers\.1\.mlp\.up_proj is a Identity, and only plain linear layers"
    ):
        split_layers(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)))


def _other_weights(rank):
    core = LossModule(tiny(seed=rank), None, bf16=False)
    with pytest.raises(
        RunError, match=r"processes have built different weights: model\.model\.embed_tokens\.weight"
    ):
        check_alike(core)
    core = LossModule(tiny(), None, bf16=False)
    with pytest.raises(RunError, match=r"model\.model\.embed_tokens\.weight is shared by no processes"):
        check_layout(core, Layout(shard=2))
    with pytest.raises(RunError, match="no layer is split over 2 processes"):
        check_layout(core, Layout(tensor=2))


def _draw(rank):
    """What goes into the sum over heads, and what is drawn behind it."""
    model = tiny(attention_dropout=0.5, num_key_value_heads=2)
    for layer in model.model.layers:  # all heads alike: what differs is what they drew
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            with torch.no_grad():
                projection.weight.copy_(projection.weight[:8].repeat(len(projection.weight) // 8, 1))
    assert drops_something(model.config)
    split_layers(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)))
    model.train()
    mixed = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, given: mixed.append(given[0].detach().numpy().copy())
        )
    torch.manual_seed(5)
    logits = model(torch.arange(10)[None]).logits
    return mixed, logits.detach().numpy(), torch.rand(3).numpy()


def test_split_heads_draw_masks_of_their_own_and_all_else_is_drawn_alike(tmp_path):
    (ours, logits, after), (theirs, other_logits, other_after) = together(tmp_path, 2, _draw)
    assert len(ours) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine != other).any(), "the masks of one process are those of the other"
    assert (logits == other_logits).all(), "processes that read the same rows have parted"
    assert (after == other_after).all()
    assert (ours[0] != ours[1]).any(), "two layers drew the same"


@pytest.mark.parametrize("work", [_split_something_else, _other_weights], ids=["split", "weights"])
def test_what_is_not_as_it_should_be_is_found(tmp_path, work):
    together(tmp_path, 2, work)


# --- of one mind --------------------------------------------------------------------------------------------------


def _settings(rank, given):
    """A job whose settings are `given` on the second process."""

    class Job:
        plan = {"world_size": 2, "notes": [str(rank)], "memory": {"total": rank}}
        recipe = {"name": "x", "pretrain": {"train": {"optim": {"lr": 1e-3, **(given if rank else {})}}}}
        identity = {"data": "abc"}

    try:
        return alike.check_processes(Job, torch.device("cpu"))
    except RunError as error:
        return f"{error}"


def test_a_process_with_another_recipe_is_named_by_all(tmp_path):
    """What is only told of a plan may differ, as on machines with more memory."""
    assert together(tmp_path, 2, functools.partial(_settings, given={})) == ["", ""]
    words = together(tmp_path, 2, functools.partial(_settings, given={"lr": 2e-3}))
    assert words[0] == words[1]
    assert "process 1 is about to do something else than process 0" in words[0]
    assert "recipe.pretrain.train.optim.lr: 0.001 in process 0, 0.002" in words[0]


def test_a_process_with_another_version_is_named(monkeypatch):
    class Job:
        plan, recipe, identity = {}, {}, {}

    ours = alike.settings_of(Job)
    assert set(ours) == {"version.llmkit", "version.torch", "version.transformers", "version.accelerate"}
    words = alike.differing([ours, ours, {**ours, "version.torch": "2.11"}])
    assert re.search(r'process 2 .*\n  version\.torch: ".*" in process 0, "2\.11"', words)


def test_several_kinds_of_devices_are_told():
    assert alike.told_devices(["A", "A"]) == ""
    assert "process 2 computes on B, process 0 on A" in alike.told_devices(["A", "A", "B"])


@pytest.mark.slow
def test_the_run_itself_asks(tmp_path, monkeypatch):
    asked = alike.settings_of
    other = lambda job: asked(job) | {"version.torch": torch.distributed.get_rank()}  # noqa: E731
    monkeypatch.setattr(alike, "settings_of", other)
    with pytest.raises(FailedError, match=r"version\.torch: 0 in process 0, 1"):
        train(tmp_path, FSDP2, **SHORT)


# --- experts ------------------------------------------------------------------------------------------------------


def _deal_out_what_cannot_be(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
    with pytest.raises(UsageError, match="transformers has no plan by which experts of llama are dealt out"):
        split_experts(tiny(), mesh)
    fields = {**MIXTRAL, "vocab_size": 20}
    fields.pop("model_type")
    three = MixtralForCausalLM(MixtralConfig(**{**fields, "num_local_experts": 3}))
    with pytest.raises(UsageError, match="2 processes cannot share 3 experts equally"):
        split_experts(three, mesh)
    held = MixtralForCausalLM(MixtralConfig(**fields))
    split_experts(held, mesh)
    experts = held.model.layers[0].mlp.experts
    assert experts.gate_up_proj.to_local().shape[0] == experts.num_experts == 2


def test_experts_that_cannot_be_dealt_out_say_why(tmp_path):
    together(tmp_path, 2, _deal_out_what_cannot_be)


# --- noise --------------------------------------------------------------------------------------------------------


def _noise(rank):
    """Of a gradient that two processes share, in full."""
    mesh = init_device_mesh("cpu", (2,))
    layer = nn.Linear(5, 3, bias=False)
    whole = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)])
    layer.weight = nn.Parameter(whole)
    layer.weight.grad = distribute_tensor(torch.zeros(3, 5), mesh, [Shard(0)])
    add_noise(layer, 1.0, seed=3, step=2)
    return layer.weight.grad.full_tensor().numpy()


def test_noise_on_shards_is_that_of_the_whole(tmp_path):
    layer = nn.Linear(5, 3, bias=False)
    layer.weight.grad = torch.zeros(3, 5)
    add_noise(layer, 1.0, seed=3, step=2)
    for found in together(tmp_path, 2, _noise):
        assert (found == layer.weight.grad.numpy()).all()
