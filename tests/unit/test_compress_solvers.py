"""Solvers of one weight matrix, against their papers' equations written out slowly, and what must hold of each."""

import pytest
import torch

from llmkit.compress.solvers import (
    awq_clipped,
    awq_scales,
    check_pattern,
    gptq,
    magnitude,
    output_error,
    round_nearest,
    smooth_scales,
    sparsegpt,
    wanda,
)
from llmkit.errors import UsageError


class Steps:
    """Evenly spaced numbers around a zero point."""

    def __init__(self, columns=None, bits=4, symmetric=True):
        self.columns, self.bits, self.symmetric = columns, bits, symmetric

    def fit(self, weight):
        parts = weight.unflatten(1, (-1, self.columns or weight.shape[1]))
        most = 2**self.bits - 1
        if self.symmetric:
            return parts.abs().amax(2) * 2 / most, None
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scale = (high - low) / most
        return scale, torch.round(-low / scale)

    def rounded(self, weight, scale, zero):
        parts = weight.unflatten(1, (scale.shape[1], -1))
        if zero is None:
            half = 2 ** (self.bits - 1)
            return (torch.round(parts / scale[..., None]).clamp(-half, half - 1) * scale[..., None]).flatten(
                1
            )
        codes = (torch.round(parts / scale[..., None]) + zero[..., None]).clamp(0, 2**self.bits - 1)
        return ((codes - zero[..., None]) * scale[..., None]).flatten(1)


def layer(outputs=12, inputs=48, tokens=300, seed=0):
    """A weight, and inputs that go together, some of which are much larger than others."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=chance)
    mixed = torch.randn(inputs, inputs, generator=chance) * 0.3 + torch.eye(inputs)
    read = torch.randn(tokens, inputs, generator=chance) @ mixed
    return weight, read * (1 + 8 * (torch.arange(inputs) % 11 == 0))


def gram_of(read):
    return read.double().T @ read.double()


def damped(gram, damping):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def gptq_by_equations(weight, gram, grid, damping, order):
    """Each input in turn: the others move by -e / [H^-1]_00 * [H^-1]_0 over those that are left (equation 2)."""
    size = grid.columns or weight.shape[1]
    hessian, left, done = damped(gram, damping), weight.double(), torch.zeros_like(weight)
    scale, zero = grid.fit(weight)
    static = grid.columns is None or order != list(range(weight.shape[1]))
    for turn, i in enumerate(order):
        if not static and i % size == 0:
            own, own_zero = grid.fit(left[:, i : i + size].float())
            scale[:, i // size] = own[:, 0]
            if zero is not None:
                zero[:, i // size] = own_zero[:, 0]
        group = slice(i // size, i // size + 1)
        now = grid.rounded(
            left[:, i : i + 1].float(), scale[:, group], None if zero is None else zero[:, group]
        )
        done[:, i] = now[:, 0]
        rest = order[turn:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        left[:, rest] -= ((left[:, i] - now[:, 0].double()) / inverse[0, 0])[:, None] * inverse[0]
    return done


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("inputs", "columns", "act_order"),
    [(48, None, False), (48, 8, False), (192, 32, False), (192, None, False), (48, 8, True), (160, 32, True)],
)
def test_gptq_is_that_of_the_papers_equations(inputs, columns, act_order, symmetric):
    weight, read = layer(inputs=inputs, tokens=2 * inputs)
    gram, grid = gram_of(read), Steps(columns, symmetric=symmetric)
    made = gptq(weight, gram, grid, damping=0.02, act_order=act_order)
    order = list(range(inputs))
    if act_order:
        order = sorted(order, key=lambda i: -float(gram[i, i]))
    wanted = gptq_by_equations(weight, gram, grid, 0.02, order)
    assert torch.allclose(made.weight_OI, wanted, atol=1e-4)
    again = grid.rounded(made.weight_OI, made.scale_OG, made.zero_OG)
    assert torch.allclose(
        again, made.weight_OI, atol=1e-6
    )  # the scales that are told are those that were used


@pytest.mark.parametrize("columns", [None, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_changes_outputs_less_than_the_nearest_numbers_do(columns, bits):
    weight, read = layer(seed=bits)
    gram, grid = gram_of(read), Steps(columns, bits)
    nearest = output_error(round_nearest(weight, grid).weight_OI, weight, gram)
    assert output_error(gptq(weight, gram, grid).weight_OI, weight, gram) < 0.8 * nearest


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest():
    weight, _ = layer()
    grid = Steps()
    made = gptq(weight, torch.diag(torch.rand(48).double() + 0.1), grid)
    assert torch.equal(made.weight_OI, round_nearest(weight, grid).weight_OI)


def test_an_input_that_always_was_zero_changes_nothing_else():
    weight, read = layer()
    grid = Steps(bits=8)
    read[:, 5] = 0
    made = gptq(weight, gram_of(read), grid).weight_OI
    other = weight.clone()
    other[:, 5] = 0.5 * weight[:, 5]
    there = gptq(other, gram_of(read), grid).weight_OI
    rest = [i for i in range(48) if i != 5]
    assert torch.isfinite(made).all()
    assert torch.equal(made[:, rest], there[:, rest])


def test_the_error_of_outputs_is_that_of_the_outputs():
    weight, read = layer()
    changed = weight + 0.1 * weight.flip(0)
    wanted = (read.double() @ (changed - weight).double().T).square().sum()
    assert output_error(changed, weight, gram_of(read)) == pytest.approx(float(wanted), rel=1e-6)


# --- AWQ, SmoothQuant -----------------------------------------------------------------------------------------


def test_awq_finds_the_scales_of_the_smallest_error_of_the_outputs():
    weights, read = [layer(seed=1)[0], layer(seed=2)[0]], layer(seed=1)[1]
    grid, mean = Steps(16), read.abs().mean(0)
    errors = {}
    for step in range(20):
        scale = mean ** (step / 20)
        scale = scale / (scale.max() * scale.min()) ** 0.5
        outputs = [read @ (round_nearest(w * scale, grid).weight_OI / scale - w).T for w in weights]
        errors[step / 20] = sum(float(o.double().square().sum()) for o in outputs)
    found = awq_scales(weights, mean, gram_of(read), grid)
    assert found.alpha == min(errors, key=errors.get) > 0
    assert found.error == pytest.approx(errors[found.alpha], rel=1e-4)
    assert found.error_unscaled == pytest.approx(errors[0.0], rel=1e-4)
    assert found.error < found.error_unscaled
    assert torch.allclose(found.scale_I.max() * found.scale_I.min(), torch.tensor(1.0), atol=1e-5)


def test_awq_clips_each_group_where_its_own_error_is_smallest():
    weight, read = layer(outputs=5, inputs=32)
    grid = Steps(16, bits=3)
    weight[0, 3] = 9.0  # far from the rest of its group, and of an input that is small
    read[:, 3] *= 0.01
    made = awq_clipped(weight, gram_of(read), grid)
    for row in range(5):
        for group in range(2):
            part = slice(16 * group, 16 * group + 16)
            own, most = weight[row : row + 1, part], weight[row, part].abs().max()
            tried = [own.clamp(-most * (1 - i / 20), most * (1 - i / 20)) for i in range(10)]
            errors = [
                float((read[:, part] @ (round_nearest(t, grid).weight_OI - own).T).square().sum())
                for t in tried
            ]
            assert torch.equal(made[row : row + 1, part], tried[errors.index(min(errors))])
    assert made[0, 3] == pytest.approx(9.0 * 0.55)
    before = output_error(round_nearest(weight, grid).weight_OI, weight, gram_of(read))
    assert output_error(round_nearest(made, grid).weight_OI, weight, gram_of(read)) < before


def test_smoothquant_shares_the_range_between_inputs_and_weights():
    weight, read = layer()
    largest, most = read.abs().amax(0), weight.abs().amax(0)
    scale = smooth_scales(largest, most, 0.5)
    assert torch.allclose((read / scale).abs().amax(0), (weight * scale).abs().amax(0), rtol=1e-5)
    assert torch.allclose(smooth_scales(largest, most, 0.75), largest**0.75 / most**0.25, rtol=1e-5)
    assert torch.allclose((read / scale) @ (weight * scale).T, read @ weight.T, atol=1e-2)
    largest[4] = 0
    assert smooth_scales(largest, most, 0.5)[4] == 1


# --- weights that become zero ---------------------------------------------------------------------------------


def sparsegpt_by_equations(weight, gram, share, pattern, damping):
    """Weights cost w^2 / [H^-1]_00 over the inputs that are left; when one goes the others make up for it."""
    left, hessian = weight.double(), damped(gram, damping)
    num_inputs, num_gone = weight.shape[1], 0
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(num_inputs)]
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(num_inputs):
        if pattern is None and i % 128 == 0:
            stop = min(i + 128, num_inputs)
            costs = {
                (row, j): float(left[row, j] ** 2 / inverses[j][0, 0])
                for row in range(len(weight))
                for j in range(i, stop)
            }
            number = round(share * len(weight) * stop) - num_gone
            num_gone += number
            for row, j in sorted(costs, key=costs.get)[:number]:
                gone[row, j] = True
        if pattern is not None and i % pattern[1] == 0:
            for row in range(len(weight)):
                few = range(i, i + pattern[1])
                own = {j: float(left[row, j] ** 2 / inverses[j][0, 0]) for j in few}
                gone[row, sorted(own, key=own.get)[: pattern[0]]] = True
        lost = left[:, i] * gone[:, i]
        left[:, i:] -= (lost / inverses[i][0, 0])[:, None] * inverses[i][0]
    return left.masked_fill(gone, 0)


@pytest.mark.parametrize(
    ("inputs", "share", "pattern"),
    [(48, 0.5, None), (48, 0.3, None), (160, 0.6, None), (48, 0.5, (2, 4)), (160, 0.5, (4, 8))],
)
def test_sparsegpt_is_that_of_the_papers_equations(inputs, share, pattern):
    weight, read = layer(inputs=inputs, tokens=2 * inputs)
    made = sparsegpt(weight, gram_of(read), share, pattern, damping=0.02)
    wanted = sparsegpt_by_equations(weight, gram_of(read), share, pattern, 0.02)
    assert torch.equal(made == 0, wanted == 0)
    assert torch.allclose(made.double(), wanted, atol=1e-4)


def test_wanda_and_magnitude_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.5, 0.4, -0.3, 0.2]])
    squares = torch.tensor([1.0, 4.0, 100.0, 900.0])  # norms 1, 2, 10, 30
    # 4, 6, 20, 30 and 0.5, 0.8, 3, 6
    assert wanda(weight, squares, 0.5).tolist() == [
        [0, 0, 2, 1],
        [0, 0, pytest.approx(-0.3), pytest.approx(0.2)],
    ]
    assert (wanda(weight, squares, 0.25) == 0).tolist() == [[True, False, False, False]] * 2
    assert magnitude(weight, 0.5).tolist() == [[4, -3, 2, 1], [0, 0, 0, 0]]
    assert (magnitude(weight, 0.5, (2, 4)) == 0).tolist() == [[False, False, True, True]] * 2
    assert (wanda(weight, squares, 0.5, (2, 4)) == 0).tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("share", [0.1, 0.33, 0.5, 0.9])
def test_the_share_is_exact(share):
    weight, read = layer(outputs=10, inputs=160)
    weight[:3, :9] = weight[0, 0]  # equals
    gram = gram_of(read)
    assert int((magnitude(weight, share) == 0).sum()) == round(share * 1600)
    assert int((sparsegpt(weight, gram, share) == 0).sum()) == round(share * 1600)
    assert (wanda(weight, gram.diagonal(), share) == 0).sum(1).tolist() == [round(share * 160)] * 10


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_patterns_hold_in_each_few(pattern):
    weight, read = layer()
    gram = gram_of(read)
    for made in (
        magnitude(weight, 0.5, pattern),
        wanda(weight, gram.diagonal(), 0.5, pattern),
        sparsegpt(weight, gram, 0.5, pattern),
    ):
        assert (made.unflatten(1, (-1, pattern[1])) == 0).sum(2).unique().tolist() == [pattern[0]]


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_outputs_change_least_with_sparsegpt_and_most_by_magnitude(pattern):
    weight, read = layer()
    gram = gram_of(read)
    best = output_error(sparsegpt(weight, gram, 0.5, pattern), weight, gram)
    middle = output_error(wanda(weight, gram.diagonal(), 0.5, pattern), weight, gram)
    assert best < middle < output_error(magnitude(weight, 0.5, pattern), weight, gram)


@pytest.mark.parametrize("solve", [lambda w, g: gptq(w, g, Steps()), lambda w, g: sparsegpt(w, g, 0.5)])
def test_what_cannot_be_made_up_for_is_said(solve):
    weight, read = layer()
    gram = gram_of(read)
    gram[0, 1] = gram[1, 0] = 10 * gram.diagonal().max()  # no sum of squares
    with pytest.raises(UsageError, match=r"damping: 0\.01 is too little"):
        solve(weight, gram)
    gram[2, 2] = torch.inf
    with pytest.raises(UsageError, match="not finite"):
        solve(weight, gram)


def test_a_pattern_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match=r"h\.0\.mlp has 10 inputs, which the pattern 2:4 does not divide"):
        check_pattern(torch.zeros(3, 10), (2, 4), "h.0.mlp")
