"""A base in few bits under an adapter. bitsandbytes computes it on a CPU too, slowly: enough to compare numbers."""

import pytest
import torch
from adapting import ids, llama, logits

from llmkit.errors import UsageError
from llmkit.models.adapter_files import save_adapter
from llmkit.models.adapters import inject_adapter, load_adapter, quantize_base
from llmkit.models.freezing import count_learning, frozen_hash
from llmkit.models.merging import divergence, merge_adapters
from llmkit.models.quantized import bits_of
from llmkit.recipe.parts import Adapter, quantizing_needs

CPU = torch.device("cpu")


def test_what_a_base_in_few_bits_needs_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("llmkit.recipe.parts.find_spec", lambda name: None)
    assert "this run computes on cpu" in quantizing_needs("cpu")
    assert "llmkit[qlora]" in quantizing_needs("cuda")
    monkeypatch.setattr("llmkit.recipe.parts.find_spec", lambda name: object())
    assert quantizing_needs("cuda") == ""
    assert "mps" in quantizing_needs("mps")


def test_layers_of_another_kind_are_refused():
    from adapting import gpt2

    with pytest.raises(UsageError, match=r"attn.c_attn is a Conv1D, which cannot be held in few bits"):
        quantize_base(gpt2(), 4, device=CPU)


def held(bits):
    model = llama(layers=1, head_dim=32)
    quantize_base(model, bits, device=CPU)
    return model


def trained(bits):
    model = held(bits)
    inject_adapter(model, Adapter(method="qlora", rank=4, bits=bits), seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def packages():
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("bits", "apart"), [(4, 1e-2), (8, 1e-4)])
def test_a_base_in_few_bits_says_nearly_the_same_and_counts_the_same(bits, apart):
    model, plain = held(bits), llama(layers=1, head_dim=32)
    kl = divergence(logits(plain).flatten(0, -2), logits(model).flatten(0, -2), classes=True)
    assert 0 < kl < apart
    assert sum(bits_of(module) == bits for module in model.modules()) == 7
    assert sum(count_learning(model).__dict__.values()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_in_few_bits_stays_the_adapter_learns_and_is_loaded_again(bits, tmp_path):
    before = held(bits)
    inject_adapter(before, Adapter(method="qlora", rank=4), seed=1)
    model = trained(bits)
    assert frozen_hash(model) == frozen_hash(before)
    assert not torch.allclose(logits(model), logits(before), atol=1e-2)
    save_adapter(tmp_path / "adapter", model, facts={})
    second = held(bits)
    load_adapter(second, tmp_path / "adapter")
    assert torch.equal(logits(second), logits(model))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("bits", [4, 8])
def test_merged_it_is_a_plain_model_in_full_precision(bits):
    model = trained(bits)
    learned = logits(model)
    apart = merge_adapters(model, lambda: logits(model).flatten(0, -2), max_kl=1e-4)
    assert apart < 1e-4
    torch.testing.assert_close(logits(model), learned, atol=0.03, rtol=0.01)
    assert list(model.state_dict()) == list(llama(layers=1, head_dim=32).state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
