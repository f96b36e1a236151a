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
from llmkit.models import attention, kernels
from llmkit.models.attention import (
    block_mask,
    flex_documents_attention,
    matmul_softmax_attention,
    use_attention,
)
from llmkit.models.recompute import recompute_activations
from llmkit.plan import PlanError
from llmkit.plan.levers import check_levers
from llmkit.recipe.machine import Machine
from llmkit.train.kernels import frozen_garbage, pull_levers
from llmkit.train.sending import narrow, send

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 90}


torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


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
    layout = SimpleNamespace(is_sharded=False)
    facts = {"device": "cpu", "precision": "fp32", "compile": True, "choices": {}, "layout": layout}
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


class SamePlaces(torch.autograd.Function):
    """A product whose gradients are always written to the same memory, as CUDA graphs do."""

    memory = torch.zeros(3)

    @staticmethod
    def forward(ctx, weight, x):
        ctx.save_for_backward(x)
        return (weight * x).sum()

    @staticmethod
    def backward(ctx, gradient):
        SamePlaces.memory.copy_(ctx.saved_tensors[0] * gradient)
        return SamePlaces.memory.detach(), None


def test_gradients_of_graphs_are_added_up_in_tensors_of_their_own(monkeypatch):
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x):
            return (self.weight * x).sum()

    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(kernels, "_recorded", lambda _: lambda net, x: SamePlaces.apply(net.weight, x))
    module = Product().train()
    assert kernels.compile_module(module, graphs=True) == []
    for step in range(2):
        for x in ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]):
            module(torch.tensor(x)).backward()
        assert module.weight.grad.tolist() == [11.0, 22.0, 33.0]
        assert module.frozen.grad is None
        assert len(begun) == 2 * (step + 1)
        module.zero_grad()
    with torch.no_grad():
        module(torch.ones(3))
    module.eval()(torch.ones(3))
    assert len(begun) == 4
    assert module.weight.grad is None


def test_what_is_recorded_learns_the_same(monkeypatch):
    torch._dynamo.reset()
    found = CompileCounterWithBackend("aot_eager")
    recorded = cache(lambda function: torch.compile(function, dynamic=False, backend=found))
    monkeypatch.setattr(kernels, "_recorded", recorded)
    plain, model = llama(2).train(), llama(2).train()
    kernels.compile_module(model, graphs=True)
    for _ in range(2):
        learnt = learn(model)
    for ours, expected in zip(learnt, learn(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)
    assert found.frame_count == 1
    torch._dynamo.reset()


def test_graphs_are_refused_for_a_model_that_is_shared():
    shared = plan(layout=SimpleNamespace(is_sharded=True))
    with pytest.raises(UsageError, match="cannot be recorded of a model that processes share"):
        pull_levers(SimpleNamespace(model=llama()), shared, Machine(compile="graphs"), print)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "high"), ("fp8", "high"), ("fp32", "highest")])
def test_what_stays_in_fp32_is_exact_only_where_fp32_is_asked_for(precision, expected, monkeypatch):
    monkeypatch.setattr("llmkit.train.kernels.use_float8", lambda _: 7)
    told = []
    try:
        pull_levers(
            SimpleNamespace(model=None),
            plan(device="cuda", precision=precision, compile=False),
            Machine(),
            told.append,
        )
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any("TF32" in line for line in told) == (expected == "high")


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


@torchao
@pytest.mark.parametrize("length", [16, 13])
def test_8_bit_products_have_the_sides_that_a_gpu_asks_for(length, monkeypatch):
    """cuBLAS: inner sides and columns in multiples of 16, one factor by rows and the other by columns."""
    multiply, seen = torch._scaled_mm, []

    def strict(a, b, **options):
        assert a.shape[1] % 16 == b.shape[1] % 16 == 0
        assert a.stride(1) == b.stride(0) == 1
        seen.append(a.shape[0])
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    plain, model = llama(1).train(), llama(1).train()
    kernels.use_float8(model)
    found, expected = learn(model, length), learn(plain, length)
    assert len(seen) == 3 * 7
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        assert float((ours - wanted).norm() / wanted.norm()) < 0.1


@torchao
def test_rows_that_fill_up_change_no_8_bit_number():
    torch.manual_seed(0)
    model = llama(1).train()
    kernels.use_float8(model, emulate=True)
    layer = model.model.layers[0].self_attn.q_proj
    x, outer = torch.randn(2, 13, 32), torch.randn(2, 13, 32)
    filled = [torch.cat([one.flatten(0, 1), torch.zeros(6, 32)]) for one in (x, outer)]
    gradients = []
    for given, chosen in ((x, outer), filled):
        output = layer(given)
        (output * chosen).sum().backward()
        gradients.append((output.flatten(0, -2)[:26], layer.weight.grad.clone()))
        layer.weight.grad = None
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


@torchao
def test_adapters_stay_as_they_are():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "up_proj"])
    model = llama(2)
    peft.inject_adapter_in_model(config, model)
    assert kernels.use_float8(model) == 2 * 7
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer.lora_A["default"]) is type(layer.lora_B["default"]) is torch.nn.Linear
    assert type(layer.base_layer) is not torch.nn.Linear


@torchao
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


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "compiled", "flex"])
def test_the_mask_of_a_gpu_says_of_packed_rows_what_transformers_finds(kernel):
    """On a GPU it is made of positions, and given; on a processor each kernel finds the documents by itself."""
    positions = torch.tensor([[*range(7), *range(20), 0, 0, *range(11)], [*range(40)]])
    ids = torch.arange(80).view(2, 40)
    model = llama(2).eval()
    use_attention(model, "sdpa" if kernel == "flex" else kernel, isolate=True)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    use_attention(model, kernel, isolate=True)
    mask = attention.packed_mask(positions, in_blocks=kernel == "flex")
    ours = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    through = model(input_ids=ids, position_ids=positions[1:].expand(2, -1), use_cache=False).logits
    assert float((ours - through)[0].abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "compiled", "flex"])
def test_the_mask_of_whole_rows_says_nothing_and_makes_none(kernel, monkeypatch):
    seen = []
    model, ids = llama(2).eval(), torch.arange(80).view(2, 40)
    use_attention(model, kernel, isolate=False)
    expected = model(input_ids=ids, use_cache=False).logits
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, __, given: seen.append(given["attention_mask"]), with_kwargs=True
        )
    mask = torch.ones((1, 1), dtype=torch.bool).expand_as(ids)
    ours = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(ours, expected)
    assert seen == [None, None]


@torch.no_grad()
def test_flex_takes_autocasts_type_as_sdpa_does(monkeypatch):
    """Norms of queries and keys leave these in fp32, and not every torch casts them for FlexAttention."""
    seen = []

    def attend(query, key, value, **_):
        seen.append({query.dtype, key.dtype, value.dtype})
        return query

    monkeypatch.setattr(attention, "flex_attention", attend)
    query, key, value = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4).bfloat16()
    blocks, module = block_mask(torch.zeros(1, 8).long()), torch.nn.Module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flex_documents_attention(module, query, key, value, blocks)
    flex_documents_attention(module, query, key, value.float(), blocks)
    assert seen == [{torch.bfloat16}, {torch.float32}]


def test_flex_is_no_choice_for_a_model_that_drops_attention_weights():
    facts = {"batch": 1, "heads": 1, "kv_heads": 1, "seq_len": 8, "head_dim": 8, "compiled": False}
    assert attention.choose_attention(
        device="cuda", dtype=torch.float32, isolate=True, drops=True, **facts
    ) == ("sdpa", "the model drops attention weights, which FlexAttention cannot", {})
    assert attention.drops_attention(GPT2Config())
    assert attention.drops_attention(BertConfig())
    assert attention.drops_attention(LlamaConfig(attention_dropout=0.1))
    assert not attention.drops_attention(LlamaConfig())
    assert not attention.drops_attention(GPT2Config(attn_pdrop=0.0))


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


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_leaves_no_tensor_to_the_collector(recompute):
    """So nothing that is large waits for it meanwhile."""
    model = llama(2).train()
    recompute_activations(model, recompute)
    learn(model)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        learn(model)
        gc.collect()
        assert not [type(left) for left in gc.garbage if isinstance(left, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


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
