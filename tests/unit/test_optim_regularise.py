"""L1, noise on gradients, the average of weights; and what the recipe says of optimizers."""

import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from llmkit.errors import RecipeError
from llmkit.optim import add_noise, averaged, make_optimizer, set_lr
from llmkit.optim import average as module
from llmkit.recipe import load_recipe
from llmkit.recipe.optimizers import OPTIMIZERS, state_bytes_per_parameter
from llmkit.recipe.schema import Optim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)


def set_gradients(net, step=0):
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(net, optimizer, steps, after=lambda: None):
    for step in range(steps):
        set_gradients(net, step)
        set_lr(optimizer, 0.1)
        optimizer.step()
        after()


def copied(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_l1_is_the_gradient_of_the_sum_of_sizes_for_what_decays():
    net = Net()
    with torch.no_grad():
        net.first.weight[0, 0] = 0.0
    before = net.first.weight.detach().clone(), net.first.bias.detach().clone()
    optimizer = make_optimizer(net, Optim(name="sgd", momentum=0.0), l1=0.03)
    set_gradients(net)
    gradients = net.first.weight.grad.clone(), net.first.bias.grad.clone()
    set_lr(optimizer, 0.5)
    optimizer.step()
    expected = before[0] - 0.5 * (gradients[0] + 0.03 * before[0].sign())
    torch.testing.assert_close(net.first.weight.detach(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net.first.bias.detach(), before[1] - 0.5 * gradients[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_equals_torchs(name):
    net = Net()
    optimizer = make_optimizer(net, Optim(name=name), ema=0.8)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    run(net, optimizer, 6, after=lambda: theirs.update_parameters(net))
    plain = copied(net)
    with averaged(optimizer):
        for ours, expected in zip(net.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
        assert not same(copied(net), plain)
    assert same(copied(net), plain)


def test_weights_come_back_also_after_an_error():
    net = Net()
    optimizer = make_optimizer(net, Optim(), ema=0.5)
    run(net, optimizer, 3)
    plain = copied(net)
    with pytest.raises(ValueError, match="in between"), averaged(optimizer):
        raise ValueError("in between")
    assert same(copied(net), plain)


def test_nothing_is_averaged_before_the_first_update_or_where_none_is_kept():
    for ema in (0.5, None):
        net = Net()
        optimizer = make_optimizer(net, Optim(), ema=ema)
        if ema is None:
            run(net, optimizer, 2)
        plain = copied(net)
        with averaged(optimizer):
            assert same(copied(net), plain)


def test_the_average_does_not_change_training():
    moved = []
    for ema in (None, 0.9):
        net = Net()
        run(net, make_optimizer(net, Optim(), ema=ema), 5)
        moved.append(copied(net))
    assert same(*moved)


def noise_on(net, *, sigma=1.0, seed=3, step=0):
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_noise(net, sigma, seed=seed, step=step)
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def test_noise_is_a_function_of_seed_step_and_name():
    net = Net()
    first = noise_on(net)
    torch.manual_seed(99)
    assert same(first.values(), noise_on(net).values())
    assert not torch.equal(first["first.bias"], noise_on(net, seed=4)["first.bias"])
    assert not torch.equal(first["first.bias"], noise_on(net, step=1)["first.bias"] * 2**0.275)
    assert not torch.equal(first["first.weight"][0, :3], first["second.weight"][0])
    alone = nn.ModuleDict({"second": nn.Linear(3, 2)})  # what else there is does not matter
    assert torch.equal(noise_on(alone)["second.weight"], first["second.weight"])


def test_noise_has_the_published_size():
    net = nn.Linear(400, 250, bias=False)
    for step, deviation in ((0, 0.3), (9, 0.3 * 10**-0.275), (999, 0.3 * 1000**-0.275)):
        noise = noise_on(net, sigma=0.3, step=step)["weight"]
        assert float(noise.std()) == pytest.approx(deviation, rel=0.01)
        assert abs(float(noise.mean())) < 0.01 * deviation
    net.weight.grad = torch.ones_like(net.weight)
    add_noise(net, 0.0, seed=1, step=1)
    assert torch.equal(net.weight.grad, torch.ones_like(net.weight))


def recipe(**train):
    data = {"data": {"files": "a.txt"}, "tokenizer": "t"}
    return {"llmkit": 1, "pretrain": {**data, "train": {"length": "9 steps", **train}}}


def settings(**optim):
    loaded = load_recipe(recipe(optim=optim)).recipe
    assert loaded.pretrain is not None
    return loaded.pretrain.train.optim


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_has_its_own_defaults_and_can_be_made(name):
    found = settings(name=name)
    for setting, value in OPTIMIZERS[name].defaults.items():
        assert getattr(found, setting) == value
    net = Net()
    optimizer = make_optimizer(net, found)
    run(net, optimizer, 1)
    moments = sum(t.numel() for p in net.parameters() for t in optimizer.state[p].values() if t.ndim == 2)
    assert moments > 0 or name == "adafactor"


def test_what_is_written_is_kept_and_null_is_the_default():
    found = settings(name="lion", betas=None, lr=3e-4)
    assert (found.betas, found.lr, found.weight_decay) == ((0.9, 0.99), 3e-4, 0.5)
    assert settings(name="muon", muon_scale="original").muon_lr == 0.02
    assert settings(name="muon").muon_lr is None
    assert settings(schedule="polynomial").power == 2
    assert settings(schedule="wsd", decay=None).decay == 0.2
    assert settings(name="schedule_free").schedule == "constant"
    assert settings(name="schedule_free", schedule="linear").schedule == "linear"


@pytest.mark.parametrize(
    ("optim", "said", "hint"),
    [
        ({"momentum": 0.9}, "`momentum`: `adamw` has no such setting", "it belongs to `sgd` or `muon`"),
        (
            {"name": "sgd", "betas": [0.9, 0.99]},
            "`betas`: `sgd` has no such setting",
            "the settings of `sgd` are `momentum` or `nesterov`",
        ),
        ({"decay": 0.3}, "`decay`: `cosine` has no such setting", "it belongs to `wsd`"),
        (
            {"name": "schedule_free", "power": 2},
            "`power`: `constant` has no such setting",
            "it belongs to `polynomial`",
        ),
    ],
)
def test_a_setting_that_the_optimizer_does_not_have_is_an_error(optim, said, hint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(optim=optim))
    [problem] = caught.value.problems
    assert said in problem
    assert hint in problem


def test_two_averages_are_an_error():
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(optim={"name": "schedule_free"}, ema=0.99))
    assert "an average of its own" in caught.value.problems[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_as_large_as_the_plan_takes_it_to_be(name):
    net = nn.Linear(256, 512, bias=False)
    optimizer = make_optimizer(net, Optim(name=name), ema=0.9)
    set_gradients(net)
    optimizer.step()
    held = (
        sum(t.numel() * t.element_size() for t in optimizer.state[net.weight].values()) / net.weight.numel()
    )
    planned = state_bytes_per_parameter(name, ema=True) - (4 if name == "muon" else 0)
    assert held == pytest.approx(planned, abs=0.1)


def test_one_copy_of_the_weights_is_made_to_put_the_average_in_their_place(monkeypatch):
    """As many bytes as the gradients, which are free by then: the plan counts no more."""
    alive, most = weakref.WeakSet(), []
    average = module.schedule_free_average

    def counted(*args):
        made = average(*args)
        alive.add(made)
        most.append(len(alive))
        return made

    monkeypatch.setattr(module, "schedule_free_average", counted)
    net = Net()
    optimizer = make_optimizer(net, Optim(name="schedule_free"))
    run(net, optimizer, 3)
    before = copied(net)
    with averaged(optimizer):
        assert not same(copied(net), before)
    assert same(copied(net), before)
    assert len(most) == 4
    assert max(most) <= 2  # the next one is made while the last is still named
