"""Adapters against their published equations, what learns, several on one model, and what cannot be had."""

import sys

import pytest
import torch
from adapting import MODELS, bert, gpt2, ids, llama, logits, scrambled
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM

from llmkit.errors import MissingError, UsageError
from llmkit.models.adapter_files import adapter_tensors, save_adapter
from llmkit.models.adapters import (
    adapter_names,
    inject_adapter,
    load_adapter,
    modules_of,
    using_adapter,
)
from llmkit.recipe.parts import Adapter


def adapted(model, *, new=(), **settings):
    inject_adapter(model, Adapter(**{"rank": 3, **settings}), seed=1, new=new)
    return model


def with_weights(wanted):
    """The model that has these weights in its linear layers, as a plain one."""
    plain = llama()
    for name, weight in wanted.items():
        plain.get_submodule(name).weight.data = weight
    return plain


def parts(model):
    """Each target: its name, base weight W, and the thin matrices A and B."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module, module.lora_A["default"].weight, module.lora_B["default"].weight


@pytest.mark.parametrize(("method", "scale"), [("lora", 12 / 3), ("rslora", 12 / 3**0.5)])
def test_a_layer_computes_its_base_and_the_scaled_product(method, scale):
    model = scrambled(adapted(llama(), method=method, alpha=12.0))
    wanted = {name: m.base_layer.weight + scale * B @ A for name, m, A, B in parts(model)}
    assert len(wanted) == 14  # seven of each layer: q, k, v, o, gate, up, down
    torch.testing.assert_close(logits(model), logits(with_weights(wanted)), atol=1e-5, rtol=1e-5)
    assert Adapter(method=method, rank=3, alpha=12.0).scale == pytest.approx(scale)


def test_dora_learns_the_length_of_each_row_beside_its_direction():
    model = scrambled(adapted(llama(), method="dora", alpha=6.0))
    wanted = {}
    for name, m, A, B in parts(model):
        moved = m.base_layer.weight + 2 * B @ A
        lengths = m.lora_magnitude_vector["default"].weight
        assert lengths.requires_grad
        wanted[name] = lengths[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(logits(model), logits(with_weights(wanted)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_new_adapter_changes_nothing_and_only_it_learns(kind, method):
    model = MODELS[kind]()
    kept = type(model), logits(model)
    counts = inject_adapter(model, Adapter(method=method, rank=3), seed=1)
    assert type(model) is kept[0]
    torch.testing.assert_close(logits(model), kept[1], atol=1e-6, rtol=1e-5)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.frozen == sum(p.numel() for p in MODELS[kind]().parameters())


def test_automatic_targets_are_all_linear_layers_of_the_body_and_not_the_head():
    found = {name for name, *_ in parts(adapted(bert()))}
    layers = {
        name for name, m in bert().named_modules() if isinstance(m, nn.Linear) and "encoder.layer" in name
    }
    assert found == layers
    assert len(layers) == 12
    assert {name for name, *_ in parts(adapted(gpt2()))} == {
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_targets_by_pattern():
    found = {name for name, *_ in parts(adapted(llama(), targets="layers.1.*.q_proj|v_proj"))}
    assert found == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }


def test_the_seed_decides_where_an_adapter_begins_and_leaves_the_global_generator_alone():
    model, other, second = llama(), llama(), adapter_tensors(adapted(llama()))
    torch.manual_seed(11)
    wanted = torch.rand(1)
    torch.manual_seed(11)
    first = adapter_tensors(adapted(model))
    assert torch.equal(torch.rand(1), wanted)
    inject_adapter(other, Adapter(rank=3), seed=2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], value) for key, value in adapter_tensors(other).items())


def test_a_new_head_learns_whole():
    model = adapted(bert(), new=modules_of(["classifier.weight", "classifier.bias"]))
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert learning == {
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    }


def test_named_modules_learn_whole_and_tied_ones_stay_tied():
    model = adapted(llama(tied=True), whole="embed_tokens")
    learning = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert learning == ["model.embed_tokens.modules_to_save.default.weight"]
    scrambled(model, only="embed_tokens")
    states = model.model(input_ids=ids()).last_hidden_state
    table = model.get_parameter("model.embed_tokens.modules_to_save.default.weight")
    torch.testing.assert_close(model(input_ids=ids()).logits, states @ table.T)


def test_a_saved_adapter_beside_the_one_that_learns(tmp_path):
    first = scrambled(adapted(llama()))
    save_adapter(tmp_path / "first", first, facts={})
    plain = logits(llama())
    model = scrambled(adapted(llama(), alpha=3.0))
    mine = logits(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    load_adapter(model, tmp_path / "first", name="reference")
    assert adapter_names(model) == ["default", "reference"]
    assert torch.equal(logits(model), mine)
    with using_adapter(model, "reference"):
        assert torch.equal(logits(model), logits(first))
        with using_adapter(model, None):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), logits(first))
    assert torch.equal(logits(model), mine)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning


def test_without_its_adapter_a_model_has_the_head_it_began_with():
    plain = logits(bert())
    model = scrambled(scrambled(adapted(bert(), new=["classifier"])), only="classifier")
    with using_adapter(model, None):
        assert torch.equal(logits(model), plain)
    assert not torch.allclose(logits(model), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": "q_porj"}, ["adapter.targets", "q_porj", "q_proj"]),
        ({"whole": "lm_heda"}, ["adapter.whole", "lm_heda", "lm_head"]),
    ],
)
def test_a_pattern_that_fits_nothing_names_the_near_ones(settings, words):
    with pytest.raises(UsageError) as raised:
        adapted(llama(), **settings)
    assert all(word in f"{raised.value} {raised.value.hint}" for word in words)


def test_layers_whose_weights_are_read_past_them_are_left_out():
    def mamba():
        return Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=2,
                state_size=8,
                num_heads=4,
                head_dim=8,
                n_groups=1,
            )
        )

    assert {name.rpartition(".")[2] for name, *_ in parts(adapted(mamba()))} == {"in_proj"}
    with pytest.raises(UsageError, match="out_proj of mamba2 cannot"):
        adapted(mamba(), targets="out_proj")


def test_an_unknown_adapter_is_named():
    with (
        pytest.raises(UsageError, match="no adapter 'other'") as raised,
        using_adapter(adapted(llama()), "other"),
    ):
        pass
    assert "default" in raised.value.hint


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingError) as raised:
        adapted(llama())
    assert "llmkit[adapters]" in raised.value.hint
