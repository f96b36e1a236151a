"""Adapters on disk and in the weights: PEFT reads ours and we read PEFT's; merged equals adapter."""

import json
import shutil

import peft
import pytest
import torch
from adapting import MODELS, bert, llama, logits, scrambled
from safetensors.torch import load_file, save_file

from llmkit.errors import CorruptError, GateError, MissingError, UsageError
from llmkit.models.adapter_files import CONFIG, WEIGHTS, save_adapter
from llmkit.models.adapters import inject_adapter, load_adapter, using_adapter
from llmkit.models.merging import divergence, merge_adapters
from llmkit.recipe.parts import Adapter

HEADS = {"bert": ["classifier"]}


def trained(kind="llama", **settings):
    """A model with an adapter that has learned something, its new head too."""
    model = MODELS[kind]()
    inject_adapter(model, Adapter(**{"rank": 3, **settings}), seed=1, new=HEADS.get(kind, []))
    return scrambled(scrambled(model), only="modules_to_save")


def saved(folder, kind="llama", **settings):
    model = trained(kind, **settings)
    save_adapter(folder / "adapter", model, facts={"kind": "adapter"})
    return folder / "adapter", logits(model)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", MODELS)
def test_plain_peft_loads_what_is_saved_to_the_same_logits(tmp_path, kind, method):
    folder, wanted = saved(tmp_path, kind, method=method)
    assert {path.name for path in folder.iterdir()} >= {CONFIG, WEIGHTS}
    found = peft.PeftModel.from_pretrained(MODELS[kind](), str(folder))
    assert torch.equal(logits(found), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_loaded_to_the_same_logits(tmp_path, kind):
    folder, wanted = saved(tmp_path, kind)
    model = MODELS[kind]()
    load_adapter(model, folder)
    assert torch.equal(logits(model), wanted)
    with using_adapter(model, None):
        assert torch.equal(logits(model), logits(MODELS[kind]()))
    assert torch.equal(logits(model), wanted)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_peft_saved_is_loaded_to_the_same_logits(tmp_path):
    config = peft.LoraConfig(r=5, target_modules=["query", "value"], task_type="SEQ_CLS", use_rslora=True)
    theirs = scrambled(scrambled(peft.get_peft_model(bert(), config)), only="classifier")
    theirs.save_pretrained(tmp_path)
    model = bert()
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(theirs))


def test_only_the_adapter_is_saved(tmp_path):
    folder, _ = saved(tmp_path, "bert")
    tensors = load_file(folder / WEIGHTS)
    whole = {key for key in tensors if "lora_" not in key}
    assert whole == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert sum("lora_" in key for key in tensors) == 2 * 12


def test_an_adapter_goes_on_from_one_that_was_saved(tmp_path):
    folder, wanted = saved(tmp_path, rank=4, alpha=2.0)
    model = llama()
    inject_adapter(model, Adapter(rank=4, alpha=2.0, start=str(folder)), seed=9)
    assert torch.equal(logits(model), wanted)
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match=r"adapter.start: .* has lora_alpha 2.0, this recipe 8.0"):
        inject_adapter(llama(), Adapter(rank=4, start=str(folder)), seed=9)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", MODELS)
def test_merged_the_model_is_a_plain_one_and_says_the_same(kind, method, tmp_path):
    model, plain = trained(kind, method=method), MODELS[kind]()
    wanted = logits(model)
    apart = merge_adapters(model, lambda: logits(model).flatten(0, -2), max_kl=1e-6)
    assert 0 <= apart < 1e-9
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(plain), wanted, atol=1e-2)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_merging_keeps_tied_weights_tied(tmp_path):
    model = llama(tied=True)
    inject_adapter(model, Adapter(rank=3, whole="embed_tokens"), seed=1)
    scrambled(scrambled(model), only="embed_tokens")
    wanted = logits(model)
    merge_adapters(model, lambda: logits(model).flatten(0, -2), max_kl=1e-6)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert read.lm_head.weight is read.model.embed_tokens.weight
    torch.testing.assert_close(logits(read), wanted, atol=1e-5, rtol=1e-5)


def test_a_merge_that_changes_predictions_is_an_error():
    model = trained()
    answers = iter([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    with pytest.raises(GateError, match=r"0.12 nats apart, more than `adapter.max_kl: 0.001`"):
        merge_adapters(model, lambda: next(answers), max_kl=1e-3)


def test_nan_after_a_merge_is_an_error():
    answers = iter([torch.zeros(1, 2), torch.full((1, 2), torch.nan)])
    with pytest.raises(GateError, match="nan nats"):
        merge_adapters(trained(), lambda: next(answers), max_kl=1e9)


def test_divergence_by_hand():
    before = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[0.0, 3.0]]).log().nan_to_num(neginf=0.0) * torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    # KL of (1/2, 1/2) and (1/4, 3/4) is log 2 - log(3) / 2, and that of the second row 0.
    assert divergence(before, after, classes=True) == pytest.approx((0.6931472 - 0.5493061) / 2, abs=1e-6)
    ruled_out = torch.tensor([[1.0, -torch.inf]])
    assert divergence(ruled_out, ruled_out, classes=True) == 0.0
    values = torch.tensor([1.0, 3.0])  # variance 2
    assert divergence(values, values + 0.2, classes=False) == pytest.approx(0.04 / 2 / 2)


@pytest.fixture
def adapter(tmp_path):
    return saved(tmp_path)[0]


def edited(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_adapter_of_another_model_is_refused(adapter):
    with pytest.raises(UsageError, match="does not belong to this BertForSequenceClassification"):
        load_adapter(bert(), adapter)
    with pytest.raises(UsageError, match=r"does not belong.*layers.2"):
        load_adapter(llama(layers=3), adapter)
    with pytest.raises(UsageError, match="does not belong"):
        load_adapter(llama(layers=1), adapter)


def test_a_tensor_of_another_shape_is_refused(adapter):
    tensors = load_file(adapter / WEIGHTS)
    key = sorted(tensors)[0]
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, adapter / WEIGHTS)
    with pytest.raises(UsageError, match=r"is \[3, 23\], wanted \[3, 24\]"):
        load_adapter(llama(), adapter)


def test_folders_that_hold_no_adapter(tmp_path, adapter):
    with pytest.raises(MissingError, match=r"adapter_config\.json is missing"):
        load_adapter(llama(), tmp_path)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(MissingError, match=r"adapter_model\.bin is a pickle"):
        load_adapter(llama(), adapter)
    (adapter / CONFIG).write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        load_adapter(llama(), adapter)
    shutil.rmtree(adapter)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "begins by 'pissa', which changes the base itself"),
    ],
)
def test_adapters_that_cannot_be_read_say_why(adapter, fields, words):
    edited(adapter, **fields)
    with pytest.raises(UsageError, match=words):
        load_adapter(llama(), adapter)


def test_a_second_adapter_of_the_same_name_is_refused(adapter):
    model = llama()
    load_adapter(model, adapter)
    with pytest.raises(UsageError, match="has an adapter 'default' already"):
        load_adapter(model, adapter)
