"""Each optimizer against its published equations in numpy, and against torch's or its authors' own code."""

import math

import numpy as np
import pytest
import schedulefree
import torch
from torch import nn
from transformers.optimization import Adafactor

from llmkit.optim import averaged, like, make_optimizer, rules, set_lr
from llmkit.optim.eight_bit import BLOCK, code_values, dequantize, quantize
from llmkit.recipe.schema import Optim

STEPS = 12
RATES = [1e-2 * min(1.0, (t + 1) / 4) * (1 - t / 24) for t in range(STEPS)]


class Net(nn.Module):
    """A matrix, which decays, and a vector, which does not."""

    def __init__(self, shape=(6, 4)):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))

    def matrix_only(self):
        del self.vector
        return self


def gradients(model, step):
    """Of very different sizes from number to number and step to step."""
    generator = torch.Generator().manual_seed(100 + step)
    made = []
    for parameter in model.parameters():
        size = torch.exp(2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        made.append(
            (size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(parameter)
        )
    return made


def run(model, optimizer, *, set_rate=set_lr, steps=STEPS, start=0):
    for step in range(start, steps):
        set_rate(optimizer, RATES[step])
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def values(model):
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def ours(*, model=None, **settings):
    model = Net() if model is None else model
    return run(model, make_optimizer(model, Optim(**settings)))


def by_hand(update, weight_decay, model=None):
    """`update(x, g, t, lr, decay, state) -> x`, with t from 1; the vector does not decay."""
    found = []
    model = Net() if model is None else model
    for place, parameter in enumerate(model.parameters()):
        x, state = parameter.detach().numpy().copy(), {}
        decay = weight_decay if x.ndim == 2 else 0.0
        for step in range(STEPS):
            g = gradients(model, step)[place].numpy()
            x = update(x, g, step + 1, RATES[step], decay, state)
        found.append(x)
    return found


def assert_same(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def adam_direction(g, t, state, b1, b2, eps):
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def adamw(x, g, t, lr, decay, state):
    return x - lr * decay * x - lr * adam_direction(g, t, state, 0.9, 0.95, 1e-8)


def adam(x, g, t, lr, decay, state):
    return x - lr * adam_direction(g + decay * x, t, state, 0.8, 0.9, 1e-6)


def sgd(x, g, t, lr, decay, state):
    g = g + decay * x
    m = state["m"] = 0.9 * state["m"] + g if state else g
    return x - lr * m


def nesterov(x, g, t, lr, decay, state):
    g = g + decay * x
    m = state["m"] = 0.9 * state["m"] + g if state else g
    return x - lr * (g + 0.9 * m)


def plain(x, g, t, lr, decay, state):
    return x - lr * (g + decay * x)


def lion(x, g, t, lr, decay, state):
    m = state.get("m", np.zeros_like(x))
    state["m"] = 0.99 * m + 0.01 * g
    return x - lr * (np.sign(0.9 * m + 0.1 * g) + decay * x)


def adafactor(x, g, t, lr, decay, state):
    """Algorithms 4 (matrices) and 5 (vectors), with sums as in the paper."""
    beta, square = 1 - t**-0.8, g**2 + 1e-30
    if x.ndim == 2:
        r = state["r"] = beta * state.get("r", 0) + (1 - beta) * square.sum(1)
        c = state["c"] = beta * state.get("c", 0) + (1 - beta) * square.sum(0)
        v = np.outer(r, c) / r.sum()
    else:
        v = state["v"] = beta * state.get("v", 0) + (1 - beta) * square
    u = g / np.sqrt(v)
    u = u / max(1.0, math.sqrt((u**2).mean()))
    return x - lr * decay * x - max(1e-3, math.sqrt((x**2).mean())) * lr * u


CASES = {
    "adamw": (adamw, {"name": "adamw", "weight_decay": 0.3}),
    "adam": (adam, {"name": "adam", "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}),
    "sgd": (sgd, {"name": "sgd", "weight_decay": 0.3}),
    "nesterov": (nesterov, {"name": "sgd", "weight_decay": 0.3, "nesterov": True}),
    "plain": (plain, {"name": "sgd", "weight_decay": 0.3, "momentum": 0.0}),
    "lion": (lion, {"name": "lion", "weight_decay": 0.3}),
    "adafactor": (adafactor, {"name": "adafactor", "weight_decay": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_follows_its_published_equations(case):
    update, settings = CASES[case]
    assert_same(ours(**settings), by_hand(update, settings["weight_decay"]))


def groups_of(model, **settings):
    """The matrix decays by 0.3 and the vector does not, for other people's optimizers."""
    return [
        {"params": [model.matrix], "weight_decay": 0.3, **settings},
        {"params": [model.vector], "weight_decay": 0.0, **settings},
    ]


def theirs(kind, **settings):
    model = Net()
    return run(model, kind(groups_of(model), **settings))


def test_adafactor_equals_torchs_and_transformers():
    found = ours(name="adafactor", weight_decay=0.3)
    # torch's epsilon is a floor under the second moment; nothing here is near it.
    assert_same(found, theirs(torch.optim.Adafactor, eps=(1e-30, 1e-3)), 1e-6)
    model = Net()
    hugging_face = Adafactor(groups_of(model), lr=1.0, relative_step=False, scale_parameter=True)
    without_decay = [{**group, "weight_decay": 0.0} for group in hugging_face.param_groups]
    hugging_face.param_groups = without_decay  # it scales the decay by the parameter's size
    assert_same(ours(name="adafactor"), run(model, hugging_face), 1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("rms", "match_rms_adamw"), ("original", "original")])
def test_muon_is_torchs_on_hidden_matrices_and_adamw_on_the_rest(monkeypatch, scale, theirs, nesterov):
    monkeypatch.setitem(rules.ORTHOGONALISED_IN, "cpu", torch.bfloat16)  # as torch's
    model = Net().float()
    settings = {"muon_scale": scale, "muon_lr": 6e-4, "weight_decay": 0.3, "nesterov": nesterov}
    found = ours(model=model, name="muon", **settings)
    matrix, vector = Net().float(), Net().float()
    muon = torch.optim.Muon([matrix.matrix], weight_decay=0.3, adjust_lr_fn=theirs, nesterov=nesterov)
    adamw_ = torch.optim.AdamW([vector.vector], weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    run(matrix, muon)
    run(vector, adamw_)
    assert_same(found, [values(matrix)[0], values(vector)[1]], 1e-6)


def muon(x, g, t, lr, decay, state):
    """Jordan 2024: momentum in Nesterov's form, then each singular value s -> five times the quintic of s / norm."""
    momentum = state["m"] = 0.95 * state.get("m", 0) + 0.05 * g
    u, s, vh = np.linalg.svd(0.05 * g + 0.95 * momentum, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rate = lr * 0.02 / 6e-4
    return x - rate * (decay * x + math.sqrt(6 / 4) * (u * s) @ vh)


def test_muon_is_as_published():
    found, _ = ours(name="muon", muon_scale="original", weight_decay=0.3)
    [expected] = by_hand(muon, 0.3, model=Net().matrix_only())
    assert_same([found], [expected], 1e-9)


def test_muon_by_rms_moves_as_far_as_adamw():
    """Liu 2025, section 2.2: a step's root mean square is about 0.2 to 0.4 of the learning rate, as AdamW's is."""
    model = Net((64, 32)).float()
    before = model.matrix.detach().clone()
    optimizer = make_optimizer(model, Optim(name="muon", weight_decay=0.0))
    set_lr(optimizer, 1e-2)
    for parameter, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
        parameter.grad = gradient
    optimizer.step()
    moved = float((model.matrix - before).detach().square().mean().sqrt()) / 1e-2
    assert 0.1 < moved < 0.4


def schedule_free(x, g, t, lr, decay, state):
    """Algorithm 1 with its three sequences; x here is y, where gradients are taken."""
    y, b1, b2 = x, 0.9, 0.999
    z, average = state.get("z", y), state.get("x", y)
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    z = state["z"] = z - lr * (g / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * y)
    most = state["most"] = max(lr, state.get("most", 0))
    total = state["total"] = state.get("total", 0) + most**2
    average = state["x"] = (1 - most**2 / total) * average + most**2 / total * z
    return (1 - b1) * z + b1 * average


def test_schedule_free_follows_its_algorithm_and_its_authors_package():
    found = ours(name="schedule_free", weight_decay=0.3)
    assert_same(found, by_hand(schedule_free, 0.3), 1e-7)
    model = Net()
    package = schedulefree.AdamWScheduleFree(groups_of(model), foreach=False)
    package.train()
    assert_same(found, run(model, package), 1e-6)


def test_the_schedule_free_average_is_what_its_package_evaluates():
    model, other = Net(), Net()
    optimizer = make_optimizer(model, Optim(name="schedule_free", weight_decay=0.3))
    package = schedulefree.AdamWScheduleFreeReference(groups_of(other))
    package.train()
    run(model, optimizer)
    run(other, package)
    package.eval()
    between = [p.detach().clone() for p in model.parameters()]
    with averaged(optimizer):
        assert_same(values(model), values(other), 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(between, model.parameters(), strict=True))


def test_the_256_values_of_a_code():
    """Dettmers 2022, section 1.3 (dynamic tree quantisation), as figures: ends, signs, and how dense they lie."""
    for signed in (True, False):
        values = np.asarray(code_values(signed))
        assert len(values) == 256
        assert (np.diff(values) > 0).all()
        assert values[-1] == 1.0
    signed, unsigned = np.asarray(code_values(True)), np.asarray(code_values(False))
    assert (signed[0], signed[127], signed[128]) == pytest.approx((-0.99297, 0.0, 5.5e-7), rel=1e-5)
    assert np.array_equal(-signed[:127], signed[128:255][::-1])
    assert (unsigned[0], unsigned[1], unsigned[-2]) == pytest.approx((0.0, 3.25e-7, 0.996484), rel=1e-5)
    assert [int((unsigned >= 10.0**-k).sum()) for k in (1, 2, 3)] == [129, 193, 225]


@pytest.mark.parametrize("count", [1, 255, 256, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_each_number_becomes_the_nearest_of_its_block(count, signed):
    generator = torch.Generator().manual_seed(count)
    numbers = torch.exp(3 * torch.randn(count, generator=generator)) * (
        1 - 2 * torch.rand(count, generator=generator)
    )
    numbers = numbers if signed else numbers.abs()
    found = dequantize(*quantize(numbers, signed=signed), signed=signed).numpy()
    values = np.asarray(code_values(signed), dtype=np.float32)
    for start in range(0, count, BLOCK):
        block = numbers[start : start + BLOCK].numpy()
        largest = np.abs(block).max()
        distances = np.abs(block[:, None] / largest - values[None, :])
        error = np.abs(found[start : start + BLOCK] - block) / largest
        np.testing.assert_allclose(error, distances.min(1), atol=1e-6)


def adamw_in_blocks(x, g, t, lr, decay, state):
    """AdamW that stores its moments as the nearest of 256 values between steps."""

    def stored(moment, signed):
        values = np.asarray(code_values(signed), dtype=np.float32)
        blocks = moment.reshape(-1, BLOCK)
        scale = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-12)
        nearest = values[np.abs((blocks / scale)[..., None] - values).argmin(-1)]
        return (nearest * scale).reshape(moment.shape)

    m = 0.9 * state.get("m", np.zeros_like(x)) + 0.1 * g
    v = 0.95 * state.get("v", np.zeros_like(x)) + 0.05 * g**2
    state["m"], state["v"] = stored(m, True), stored(v, False)
    return x - lr * decay * x - lr * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)


def test_adamw_in_8_bits_by_hand():
    model = Net((64, 64)).float()
    steps = 4
    optimizer = make_optimizer(model, Optim(name="adamw8bit", weight_decay=0.3))
    x, state = model.matrix.detach().numpy().copy(), {}
    for step in range(steps):
        x = adamw_in_blocks(x, gradients(model, step)[0].numpy(), step + 1, RATES[step], 0.3, state)
    found, _ = run(model, optimizer, steps=steps)
    # Once in a while a number lies halfway between two values, and rounding decides: its moment then is another.
    assert np.isclose(found, x, rtol=1e-5, atol=1e-6).mean() > 0.999
    assert {t.dtype for name, t in optimizer.state[model.matrix].items() if "codes" in name} == {torch.uint8}
    held = sum(t.numel() * t.element_size() for t in optimizer.state[model.matrix].values())
    assert held / model.matrix.numel() == pytest.approx(2 + 8 / 256, abs=0.01)


def test_adamw_in_8_bits_keeps_small_parameters_in_full():
    assert_same(ours(name="adamw8bit", weight_decay=0.3), by_hand(adamw, 0.3))


NAMES = ["adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw8bit", "schedule_free"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_goes_on_to_the_last_bit(name):
    spec = Optim(name=name)
    model = Net((64, 80)).float()
    optimizer = make_optimizer(model, spec, ema=0.9)
    run(model, optimizer, steps=5)
    second = Net((64, 80)).float()
    second.load_state_dict(model.state_dict())
    resumed = make_optimizer(second, spec, ema=0.9)
    fresh = resumed.state_dict()["param_groups"]
    state = {i: {k: t.clone() for k, t in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    resumed.load_state_dict({"state": state, "param_groups": fresh})
    assert_same_state(optimizer, model, resumed, second)
    run(model, optimizer, start=5)
    run(second, resumed, start=5)
    assert_same_state(optimizer, model, resumed, second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def assert_same_state(optimizer, model, other, other_model):
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert optimizer.state[a].keys() == other.state[b].keys()
        for kind, tensor in optimizer.state[a].items():
            assert torch.equal(tensor, other.state[b][kind]), kind
            assert tensor.dtype == other.state[b][kind].dtype, kind


@pytest.mark.parametrize("name", NAMES)
def test_one_of_its_kind_of_no_content_has_the_same_state(name):
    """How a checkpoint's tensors are checked before they are read."""
    model = Net((64, 80)).float()
    optimizer = make_optimizer(model, Optim(name=name), ema=0.9)
    run(model, optimizer, steps=1)
    groups = [{**group, "fused": False, "params": []} for group in optimizer.param_groups]
    stand_ins = {}
    for mine, group in zip(groups, optimizer.param_groups, strict=True):
        for parameter in group["params"]:
            stand_ins[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"))
            stand_ins[parameter].grad = torch.empty_like(stand_ins[parameter])
            mine["params"].append(stand_ins[parameter])
    twin = like(optimizer, groups)
    twin.step()
    for parameter, stand_in in stand_ins.items():
        forms = [
            {kind: (t.shape, t.dtype) for kind, t in state.items()}
            for state in (optimizer.state[parameter], twin.state[stand_in])
        ]
        assert forms[0] == forms[1]
        assert "ema" in forms[0]
