"""Parameter groups: what decays, patterns, learning rates of their own, and what Muon takes."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from llmkit.errors import UsageError
from llmkit.optim import describe_groups, make_optimizer, parameter_groups, parameter_names, set_lr
from llmkit.optim.groups import matches
from llmkit.recipe.training import Group, Optim


class Net(torch.nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.inner = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def grouped(model, *entries, **settings):
    """Pattern -> its groups, each with the parameters' names in place of the parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    spec = Optim(groups=[Group(**entry) for entry in entries], **settings)
    found = parameter_groups(model, spec)
    return [{**group, "params": {names[id(p)] for p in group["params"]}} for group in found]


@pytest.mark.parametrize(
    ("tied", "decaying"), [(True, {"inner.weight"}), (False, {"inner.weight", "head.weight"})]
)
def test_matrices_decay_and_norms_biases_embeddings_do_not(tied, decaying):
    net = Net(tied)
    decays, spared = grouped(net, weight_decay=0.1)
    assert decays["params"] == decaying
    assert decays["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert len(decays["params"]) + len(spared["params"]) == len(list(net.parameters()))


def test_names_follow_the_optimizers_order():
    net = Net()
    optimizer = make_optimizer(net, Optim(groups=[Group(match="embed")]))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = dict(net.named_parameters())
    assert all(found[name] is p for name, p in zip(parameter_names(net, optimizer), parameters, strict=True))


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("embed*", "model.embed_tokens.weight", True),
        ("embed", "model.embed_tokens.weight", False),
        ("lm_head", "lm_head.weight", True),
        ("lm_head|embed*", "model.embed_tokens.weight", True),
        ("a | b", "b.weight", True),
        ("layers.0", "model.layers.0.mlp.up.weight", True),
        ("layers.0", "model.layers.10.mlp.up.weight", False),
        ("layers.[0-3]", "model.layers.3.mlp.up.weight", True),
        ("*.bias", "norm.bias", True),
        ("orm", "norm.bias", False),
        ("*", "anything", True),
    ],
)
def test_what_a_pattern_means(pattern, name, meant):
    assert matches(pattern, name) is meant


def test_the_first_entry_that_matches_rules_and_all_else_is_as_ever():
    found = grouped(
        Net(tied=False),
        {"match": "norm.bias|head", "lr_ratio": 0.5},
        {"match": "norm", "lr_ratio": 0.0, "weight_decay": 0.3},
        weight_decay=0.1,
    )
    facts = [(g["params"], g["lr_ratio"], g["weight_decay"]) for g in found]
    assert facts == [
        ({"inner.weight"}, 1.0, 0.1),
        ({"embed.weight", "inner.bias"}, 1.0, 0.0),
        ({"head.weight"}, 0.5, 0.1),
        ({"norm.bias"}, 0.5, 0.0),
        ({"norm.weight"}, 0.0, 0.3),
    ]


def test_a_tied_weight_goes_by_all_its_names():
    for pattern in ("embed", "head"):
        *_, own = grouped(Net(), {"match": pattern, "lr_ratio": 0.5})
        assert own["params"] == {"embed.weight"}


def test_a_pattern_that_matches_nothing_names_what_is_near():
    with pytest.raises(UsageError, match="'embeding' matches no trained parameter") as caught:
        parameter_groups(Net(tied=False), Optim(groups=[Group(match="embeding")]))
    assert "near names: embed.weight" in caught.value.hint
    taken = Optim(groups=[Group(match="*"), Group(match="norm")])
    with pytest.raises(UsageError, match="'norm' matches only what entries before it have taken"):
        parameter_groups(Net(), taken)


def test_a_group_moves_at_its_own_rate():
    """With lr_ratio 0.5, a group moves as if all had half the learning rate; with 0 it stays."""
    moved = {}
    for ratio, lr in ((0.5, 0.1), (1.0, 0.05), (0.0, 0.1)):
        torch.manual_seed(0)
        net = Net(tied=False)
        before = net.head.weight.detach().clone()
        spec = Optim(groups=[Group(match="head", lr_ratio=ratio)], weight_decay=0.2)
        optimizer = make_optimizer(net, spec)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_lr(optimizer, lr)
        optimizer.step()
        moved[ratio] = net.head.weight.detach() - before
    assert torch.equal(moved[0.5], moved[1.0])
    assert moved[0.5].abs().min() > 0.04
    assert not moved[0.0].any()


def test_groups_in_words():
    optimizer = make_optimizer(
        Net(tied=False), Optim(groups=[Group(match="embed", lr_ratio=0.5, weight_decay=0.2)])
    )
    assert describe_groups(optimizer) == [
        "all others: 2 parameters (36 numbers), weight decay 0.1",
        "all others: 3 parameters (12 numbers), weight decay 0",
        "embed: 1 parameters (20 numbers), 0.5 x lr, weight decay 0.2",
    ]


SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BODY = {"q", "k", "v", "o", "gate", "up", "down", "wi", "wo"}


def muons(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, Optim(name="muon"))
    return {names[id(p)] for group in groups if group["muon"] for p in group["params"]}


def test_muon_takes_the_hidden_matrices_of_llama():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, **SMALL))
    layer = "model.layers.0."
    attention = {f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"}
    assert muons(model) == attention | {f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_muon_leaves_berts_heads_and_embeddings_to_adamw():
    model = BertForPreTraining(BertConfig(vocab_size=11, max_position_embeddings=7, **SMALL))
    found = muons(model)
    assert len(found) == 7  # query, key, value, output, two of the MLP, and the pooler
    assert all(name.startswith(("bert.encoder.layer.0.", "bert.pooler.")) for name in found)


def test_muon_leaves_t5s_embeddings_and_head_to_adamw():
    config = T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    found = muons(T5ForConditionalGeneration(config))
    assert found
    assert all(".layer." in name and "relative_attention_bias" not in name for name in found)
    assert not any("shared" in name or "lm_head" in name or "embed" in name for name in found)


def test_muons_matrices_have_a_rate_of_their_own():
    spec = Optim(name="muon", lr=1e-3, muon_scale="original")
    optimizer = make_optimizer(Net(tied=False), spec)
    set_lr(optimizer, 5e-4)  # half of the peak
    rates = {group["muon"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {True: pytest.approx(0.01), False: 5e-4}


def test_what_a_state_decays_by_does_not_decay_itself_and_is_not_muons():
    config = MambaConfig(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=2)
    model = MambaForCausalLM(config)
    assert model.backbone.layers[0].mixer.A_log.ndim == 2  # it looks like a matrix
    names = {id(p): name.removeprefix("backbone.layers.0.mixer.") for name, p in model.named_parameters()}
    [decaying, *others] = parameter_groups(model, Optim())
    found = {names[id(p)] for p in decaying["params"]}
    assert found == {f"{part}.weight" for part in ("conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")}
    assert all(group["weight_decay"] == 0 for group in others)
    matrices = {name.removeprefix("backbone.layers.0.mixer.") for name in muons(model)}
    assert matrices == found - {"conv1d.weight"}


def test_what_a_model_marks_does_not_decay_and_is_not_muons():
    net = Net(tied=False)
    net.inner.weight._no_weight_decay = True
    [decaying] = [group for group in grouped(net) if group["weight_decay"]]
    assert decaying["params"] == {"head.weight"}
    [mine] = [group["params"] for group in grouped(net, name="muon") if group["muon"]]
    assert mine == {"head.weight"}


@pytest.mark.parametrize("scale", ["original", "rms"])
def test_muon_moves_gpt2s_matrices_as_it_moves_the_same_linear_ones(scale):
    """GPT-2 stores inputs by outputs: the factor is of outputs over inputs all the same."""

    class Layers(torch.nn.Module):
        def __init__(self, make):
            super().__init__()
            self.wide, self.narrow = make(4, 12), make(12, 4)

    conv = Layers(lambda inputs, outputs: Conv1D(outputs, inputs))
    linear = Layers(torch.nn.Linear)
    generator = torch.Generator().manual_seed(0)
    for name in ("wide", "narrow"):
        stored, usual = getattr(conv, name).weight, getattr(linear, name).weight
        usual.data.copy_(stored.detach().T)
        stored.grad = torch.randn(stored.shape, generator=generator)
        usual.grad = stored.grad.T.clone()
    for layers in (conv, linear):
        optimizer = make_optimizer(layers, Optim(name="muon", muon_scale=scale, weight_decay=0.0))
        set_lr(optimizer, 1e-2)
        optimizer.step()
    for name in ("wide", "narrow"):
        moved = getattr(conv, name).weight.detach().T
        torch.testing.assert_close(moved, getattr(linear, name).weight.detach(), rtol=1e-6, atol=1e-7)
