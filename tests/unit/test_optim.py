"""Learning rates as functions of the step, parameter groups, AdamW against its algorithm."""

import math
from itertools import pairwise

import pytest
import torch

from llmkit.optim import lr_at, make_optimizer, parameter_groups, parameter_names, set_lr
from llmkit.recipe.schema import Optim


def rates(num_steps=10, warmup_steps=2, **settings):
    spec = Optim(lr=1.0, **settings)
    return [lr_at(s, spec, num_steps=num_steps, warmup_steps=warmup_steps) for s in range(num_steps)]


def test_warmup_reaches_the_peak_with_its_last_update():
    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_linear_by_hand():
    assert rates(schedule="linear", min_lr_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    )


def test_cosine_by_hand():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]
    assert rates(schedule="cosine", min_lr_ratio=0.1)[2:] == pytest.approx(expected)
    assert rates(schedule="cosine", min_lr_ratio=0.1)[-1] == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls_over_its_last_share():
    got = rates(num_steps=20, warmup_steps=0, schedule="wsd", decay=0.25, min_lr_ratio=0.0)
    assert got[:15] == [1.0] * 15
    assert got[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_exponential_falls_by_one_factor_a_step():
    got = rates(num_steps=8, warmup_steps=0, schedule="exponential", min_lr_ratio=0.01)
    factors = [b / a for a, b in pairwise(got)]
    assert factors == pytest.approx([0.01 ** (1 / 8)] * 7)
    assert got[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "exponential"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_every_schedule_stays_between_zero_and_the_peak(schedule, warmup_steps, num_steps):
    got = rates(num_steps, min(warmup_steps, num_steps), schedule=schedule, min_lr_ratio=0.0)
    assert all(0 <= lr <= 1 for lr in got)
    assert len(got) == num_steps


class Net(torch.nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.inner = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("tied", "decaying"), [(True, {"inner.weight"}), (False, {"inner.weight", "head.weight"})]
)
def test_matrices_decay_and_norms_biases_embeddings_do_not(tied, decaying):
    net = Net(tied)
    names = {id(p): name for name, p in net.named_parameters()}
    decays, spared = parameter_groups(net, 0.1)
    assert {names[id(p)] for p in decays["params"]} == decaying
    assert decays["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    total = len(decays["params"]) + len(spared["params"])
    assert total == len(list(net.parameters()))


def test_names_follow_the_optimizers_order():
    net = Net()
    optimizer = make_optimizer(net, Optim())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = dict(net.named_parameters())
    assert all(found[name] is p for name, p in zip(parameter_names(net, optimizer), parameters, strict=True))


def test_adamw_follows_its_algorithm():
    spec = Optim(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    net = torch.nn.Linear(3, 2, bias=False).double()
    optimizer = make_optimizer(net, spec)
    x = net.weight.detach().clone()
    m = v = torch.zeros_like(x)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        gradient = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        lr = 0.1 / step
        set_lr(optimizer, lr)
        net.weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.95**step)
        x = x - lr * 0.1 * x - lr * m_hat / (v_hat.sqrt() + 1e-8)
    torch.testing.assert_close(net.weight.detach(), x, rtol=1e-9, atol=1e-12)
