"""Levers: blocks compiled once, gradients unchanged; 8-bit products, garbage, narrow numbers; what is refused."""

import copy
import gc
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmkit.errors import MissingError, UsageError
from llmkit.hardware import detect_cpu
from llmkit.models import kernels
from llmkit.models.attention import block_mask, flex_documents_attention, matmul_softmax_attention
from llmkit.models.recompute import recompute_activations
from llmkit.plan import PlanError
from llmkit.plan.levers import check_levers
from llmkit.recipe.machine import Machine
from llmkit.train.kernels import frozen_garbage, pull_levers
from llmkit.train.sending import narrow, send

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 90}


def llama(layers=4):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=layers, num_key_value_heads=1))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=90, bos_token_id=1, eos_token_id=1)
    )


def bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=3))


@pytest.fixture
def counter(monkeypatch):
    """Counts what is compiled; torch traces as ever, and computes the traced operations as they are."""
    torch._dynamo.reset()
    found = CompileCounterWithBackend("aot_eager")
    compiled = cache(lambda function: torch.compile(function, dynamic=False, backend=found))
    monkeypatch.setattr(kernels, "_compiled", compiled)
    yield found
    torch._dynamo.reset()


def learn(model, length=12):
    """Loss and gradient of a step, with dropout by a seed."""
    ids = (torch.arange(2 * length) * 7 % 90).view(2, length)
    caches = {} if model.config.model_type == "bert" else {"use_cache": False}
    torch.manual_seed(3)
    loss = model(input_ids=ids, **caches).logits.square().mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.detach(), gradient


@pytest.mark.parametrize(
    ("make", "recompute"), [(llama, "none"), (bert, "none"), (gpt2, "full"), (llama, "selective")]
)
def test_equal_blocks_are_compiled_once_and_learn_the_same(make, recompute, counter):
    plain, model = make().train(), make().train()
    recompute_activations(model, recompute)
    assert len(kernels.compile_module(model)) == model.config.num_hidden_layers
    for _ in range(3):
        found = learn(model)
        assert counter.frame_count == 1
    for ours, expected in zip(found, learn(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


def test_evaluations_and_copies_go_through_the_plain_layers(counter):
    model = llama(2)
    kernels.compile_module(model)
    with torch.no_grad():
        for length in (5, 6, 7):
            model.train()(input_ids=torch.ones(1, length, dtype=torch.int64), use_cache=False)
    model.eval()(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
    assert counter.frame_count == 0
    changed = copy.deepcopy(model)
    for p in changed.parameters():
        torch.nn.init.zeros_(p)
    assert learn(changed.train())[0] == 0  # of its own weights, not of those it was copied from
    assert learn(model.train())[0] > 0


def test_another_shape_is_another_form(counter):
    model = llama().train()
    kernels.compile_module(model)
    for length in (8, 12, 8, 12):
        learn(model, length)
    assert counter.frame_count == 2


def test_a_network_without_blocks_is_compiled_whole():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert kernels.compile_module(module) == []
    assert module._compiled_call_impl is not None


def plan(**changes):
    facts = {"device": "cpu", "precision": "fp32", "compile": True, "choices": {}}
    return SimpleNamespace(**{**facts, **changes})


def test_the_plan_says_how_is_compiled(monkeypatch):
    monkeypatch.setattr(
        "llmkit.train.kernels.replace", lambda plan, **new: SimpleNamespace(**{**vars(plan), **new})
    )
    core = torch.nn.Module()
    core.model = llama()
    before = plan(choices={"machine.compile": (True, "it saves 9 s")})
    told = pull_levers(core, before, Machine(), print).choices["machine.compile"]
    assert told == (
        True,
        "it saves 9 s; block by block (4 x LlamaDecoderLayer): equal blocks are compiled once",
    )


def test_graphs_are_for_small_models(monkeypatch):
    core = SimpleNamespace(model=SimpleNamespace(num_parameters=lambda: 10**9))
    with pytest.raises(UsageError, match=r"1,000,000,000 weights.*below 300,000,000"):
        pull_levers(core, plan(device="cpu"), Machine(compile="graphs"), print)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"precision": "fp8"}, "does not multiply in 8-bit floats.*8.9"),
        ({"liger": True}, "Liger's kernels are for NVIDIA GPUs"),
        ({"compile": "graphs"}, "CUDA graphs are for NVIDIA GPUs"),
        ({"attention": "flex"}, "FlexAttention has a backward pass on NVIDIA GPUs only"),
    ],
)
def test_what_a_processor_lacks_is_refused_with_the_reason(wanted, said):
    with pytest.raises(PlanError, match=said) as caught:
        check_levers(Machine(**wanted), detect_cpu())
    assert caught.value.hint.startswith("machine.")
    check_levers(Machine(), detect_cpu())


@pytest.mark.parametrize(("use", "package"), [(kernels.use_float8, "fp8"), (kernels.use_liger, "liger")])
def test_a_missing_package_is_named_with_its_command(use, package, monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    with pytest.raises(MissingError) as caught:
        use(llama())
    assert caught.value.hint == f'pip install "llmkit[{package}]"'


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_8_bit_products_are_near_in_training_and_absent_elsewhere():
    plain, model = llama().eval(), llama().eval()
    names = list(model.state_dict())
    assert kernels.use_float8(model, emulate=True) == 4 * 7
    assert list(model.state_dict()) == names
    ids = torch.arange(24).view(2, 12)
    expected = plain(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.train()
    near = model(input_ids=ids, use_cache=False).logits
    off = float((near - expected).norm() / expected.norm())
    assert 1e-4 < off < 0.1
    near.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# --- packed rows -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_flex_sees_what_a_mask_allows():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 40, 8) for heads in (4, 2, 2))
    documents = torch.tensor([[0] * 11 + [1] * 20 + [2] * 9, [0] * 40])
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    module = torch.nn.Module()
    ours, _ = flex_documents_attention(module, query, key, value, block_mask(documents), scaling=0.3)
    expected, _ = matmul_softmax_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_flex_refuses_dropout():
    states = torch.randn(1, 1, 8, 8)
    with pytest.raises(UsageError, match="cannot drop attention weights"):
        flex_documents_attention(
            torch.nn.Module(), states, states, states, block_mask(torch.zeros(1, 8).long()), dropout=0.1
        )


# --- garbage and numbers on their way --------------------------------------------------------------------------------


def test_garbage_is_looked_for_at_chosen_steps_and_as_before_afterwards(monkeypatch):
    looked = []
    monkeypatch.setattr(gc, "collect", lambda: looked.append(step))
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with frozen_garbage(lambda step: [step], every=3) as micro_batches:
        for step in range(10):
            assert micro_batches(step) == [step]
            assert gc.isenabled() == (step == 0)
            assert (gc.get_freeze_count() > frozen) == (step > 0)
    assert looked == [1, 4, 7]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_garbage_is_left_alone_by_a_run_of_one_step():
    with frozen_garbage(lambda step: [step]) as micro_batches:
        micro_batches(0)
        assert gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], torch.uint8),
        ([-100, 32767], torch.int16),
        ([0, 50000], torch.uint16),
        ([-100, 50000], torch.int32),
        ([0, 2**40], torch.int64),
    ],
)
def test_whole_numbers_travel_in_the_fewest_bytes(values, dtype):
    sent = narrow(torch.tensor(values))
    assert sent.dtype == dtype
    assert sent.to(torch.int64).tolist() == values


def test_a_batch_is_sent_and_its_counts_stay():
    batch = {"input_ids": torch.tensor([[1, 2]]), "num_targets": torch.tensor(2)}
    sent = send(batch, torch.device("meta"))
    assert sent["input_ids"].device.type == "meta"
    assert sent["input_ids"].dtype == torch.int64
    assert sent["num_targets"].item() == 2
    assert narrow(torch.tensor([0.5])).dtype == torch.float32
