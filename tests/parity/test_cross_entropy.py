"""The chunked loss against F.cross_entropy: value, gradients, and what it is used inside of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from llmkit.models.cross_entropy import linear_cross_entropy, linear_nll, nll_of_logits

NUM_ROWS, HIDDEN, VOCAB = 70, 24, 301


def make_case(*, masked=0.0, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    bias_V = torch.randn(VOCAB, generator=generator, dtype=dtype).requires_grad_() if bias else None
    targets = torch.randint(VOCAB, (NUM_ROWS,), generator=generator)
    targets[torch.rand(NUM_ROWS, generator=generator) < masked] = -100
    return hidden, weight, targets, bias_V


def reference(hidden, weight, targets, bias):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def gradients(loss, *tensors):
    return torch.autograd.grad(0.3 * loss, [t for t in tensors if t is not None])


def assert_near(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 32, NUM_ROWS])
def test_equals_the_reference(gather, masked, bias, chunk_rows):
    hidden, weight, targets, bias_V = make_case(masked=masked, bias=bias)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias_V, chunk_rows=chunk_rows, gather=gather)
    expected = reference(hidden, weight, targets, bias_V)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_near(gradients(loss, hidden, weight, bias_V), gradients(expected, hidden, weight, bias_V))


def smoothed(hidden, weight, targets, bias, *, smoothing, z):
    """torch's own smoothing, and the z-loss as it is written: z times the square of logsumexp, over the targets."""
    logits = F.linear(hidden, weight, bias)
    squares = torch.logsumexp(logits, 1).square()[targets != -100]
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) + z * squares.sum()


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2), (0.9, 1.0)])
def test_label_smoothing_and_z_loss_equal_the_reference(gather, masked, smoothing, z):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        hidden, weight, targets, bias_V = make_case(masked=masked, bias=True, dtype=dtype)
        options = {"label_smoothing": smoothing, "z_loss": z, "chunk_rows": 32, "gather": gather}
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias_V, **options)
        expected = smoothed(hidden, weight, targets, bias_V, smoothing=smoothing, z=z)
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        plain = reference(hidden, weight, targets, bias_V).item()
        assert abs(plain - expected.item()) > 1e-4 * plain
        theirs = gradients(expected, hidden, weight, bias_V)
        assert_near(gradients(loss, hidden, weight, bias_V), theirs, tolerance)
        logits = F.linear(hidden, weight, bias_V)  # the way of models that make their own
        own = nll_of_logits(logits, targets, label_smoothing=smoothing, z_loss=z)
        assert own.item() == pytest.approx(expected.item(), rel=tolerance)
        assert_near(gradients(own, hidden, weight, bias_V), theirs, tolerance)
        with torch.no_grad():  # the way without a gradient
            again = linear_cross_entropy(hidden, weight, targets, bias=bias_V, **options)
        assert again.item() == pytest.approx(expected.item(), rel=tolerance)


def test_double_precision_is_kept():
    hidden, weight, targets, _ = make_case(masked=0.2, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=16)
    expected = reference(hidden, weight, targets, None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert_near(gradients(loss, hidden, weight), gradients(expected, hidden, weight), 1e-13)


def test_no_target_at_all_gives_zero():
    hidden, weight, targets, _ = make_case(masked=1.1)
    for gather in (True, False):
        loss = linear_cross_entropy(hidden, weight, targets, gather=gather)
        assert loss.item() == 0
        assert all(not g.any() for g in gradients(loss, hidden, weight))


def test_unlikely_targets_stay_finite():
    hidden, weight, targets, _ = make_case()
    expected = reference(100 * hidden, weight, targets, None)
    assert expected / NUM_ROWS > 200  # exp(-200) underflows float32
    loss = linear_cross_entropy(100 * hidden, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_each_rows_nll(masked):
    hidden, weight, targets, bias_V = make_case(masked=masked, bias=True)
    nll = linear_nll(hidden, weight, targets, bias=bias_V, chunk_rows=32)
    expected = F.cross_entropy(F.linear(hidden, weight, bias_V), targets, reduction="none")
    assert not nll.requires_grad
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, targets, bias=bias_V)
    assert not total.requires_grad
    assert total.item() == pytest.approx(nll.sum().item(), rel=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(frozen):
    tensors = list(make_case()[:3])
    tensors[frozen] = tensors[frozen].detach()
    learning = tensors[1 - frozen]
    loss = linear_cross_entropy(*tensors)
    assert_near(gradients(loss, learning), gradients(reference(*tensors, None), learning))


def test_backward_twice_is_the_same():
    hidden, weight, targets, _ = make_case()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(0.5 * loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(0.5 * loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_computes_in_bf16_and_adds_up_in_float32():
    hidden, weight, targets, _ = make_case(masked=0.3)
    expected = reference(hidden, weight, targets, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-7)
    assert_near(gradients(loss, hidden, weight), gradients(expected, hidden, weight), 0.02)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, ids, targets, loss):
        return loss(torch.tanh(self.embedding(ids)), self.embedding.weight, targets)


def tied_gradient(module, ids, targets, loss):
    module.zero_grad()
    module(ids, targets, loss).backward()
    return next(module.parameters()).grad.clone()


def test_tied_weights_add_both_gradients():
    model, (_, _, targets, _) = Tied(), make_case()
    ids = torch.arange(NUM_ROWS)
    ours = tied_gradient(model, ids, targets, linear_cross_entropy)
    theirs = tied_gradient(model, ids, targets, lambda h, w, t: reference(h, w, t, None))
    assert_near([ours], [theirs])


def test_compiled_whole_and_never_again():
    """One graph, and no recompilation when the number of targets changes."""
    torch._dynamo.reset()
    model = Tied()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    ids = torch.arange(NUM_ROWS)
    for masked in (0.0, 0.3, 0.7):
        targets = make_case(masked=masked)[2]
        ours = tied_gradient(compiled, ids, targets, linear_cross_entropy)
        theirs = tied_gradient(model, ids, targets, lambda h, w, t: reference(h, w, t, None))
        assert_near([ours], [theirs])
    assert counter.frame_count == 1


def test_never_holds_more_logits_than_a_chunk(monkeypatch):
    widest = 0
    product = torch.mm

    def watched(a, b, **kwargs):
        nonlocal widest
        result = product(a, b, **kwargs)
        widest = max(widest, result.shape[0] if result.shape[1] == VOCAB else 0)
        return result

    monkeypatch.setattr(torch, "mm", watched)
    hidden, weight, targets, _ = make_case()
    linear_cross_entropy(hidden, weight, targets, chunk_rows=16).backward()
    assert widest == 16


def test_passes_torchs_checks_of_custom_operations():
    hidden, weight, targets, bias_V = make_case(masked=0.3, bias=True)
    inputs = (hidden, weight, targets, bias_V)
    torch.library.opcheck(
        torch.ops.llmkit.linear_cross_entropy.default,
        (*inputs, [True, True, True], 0.1, 1e-3, 32, True, None, 128, torch.float32),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_a_head_that_is_filled_up_gives_the_same(gather, bias, form):
    """301 entries become 384: what is added has no probability, no gradient and no share of the smoothing."""
    found = []
    for multiple in (1, 128):
        hidden, weight, targets, bias_V = make_case(masked=0.4, bias=bias)
        loss = linear_cross_entropy(
            hidden, weight, targets, bias=bias_V, gather=gather, multiple=multiple, **form
        )
        found.append((loss, *gradients(loss, hidden, weight, bias_V)))
    assert found[1][2].shape == (VOCAB, HIDDEN)
    assert_near(found[1], found[0], 1e-6)


def test_a_known_number_of_targets_gathers_the_same_rows():
    found = []
    for known in (False, True):
        hidden, weight, targets, _ = make_case(masked=0.4)
        count = (targets != -100).sum() if known else None
        loss = linear_cross_entropy(hidden, weight, targets, gather=True, num_targets=count)
        found.append((loss, *gradients(loss, hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
