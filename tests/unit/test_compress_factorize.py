"""Linear layers as products of two smaller ones: the nearest there is, and a model that transformers loads again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapting import bert, gpt2, ids, llama, logits, t5
from transformers import AutoModel

from llmkit.compress import factorize
from llmkit.compress.given import Given
from llmkit.errors import UsageError
from llmkit.models.build import load_weights
from llmkit.models.lowrank import LowRankLinear
from llmkit.objectives.base import Loss, LossModule
from llmkit.recipe.compression import Step

MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "t5": t5}


class Rows:
    """An objective of the test's: the model runs, and there is a loss."""

    sums = ()

    def loss(self, model, batch, criterion=None):
        more = {"decoder_input_ids": ids(width=4)} if model.config.is_encoder_decoder else {}
        found = model(input_ids=batch["input_ids"], **more).logits
        return Loss({"num_targets": found.float().square().sum()})


def given(model, rows=12):
    chance = torch.Generator().manual_seed(8)
    read = torch.randint(1, 40, (3, rows, 9), generator=chance)
    # No targets: in decoders as in encoders every position is read.
    batches = [
        {"input_ids": one[:3] if model.config.is_encoder_decoder else one, "targets": one[0]} for one in read
    ]
    return Given(LossModule(model, Rows(), bf16=False).eval(), batches, Path(), 0, lambda _: None)


def step(**settings):
    return Step.model_validate({"method": "factorize", **settings})


def matrices():
    chance = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 20, generator=chance, dtype=torch.float64)
    states = torch.randn(300, 20, generator=chance, dtype=torch.float64) * torch.linspace(0.1, 4, 20)
    mixed = states @ torch.randn(20, 20, generator=chance, dtype=torch.float64)
    return weight, mixed


def test_the_error_is_the_sum_of_the_squares_of_dropped_singular_values():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    up, down, lost = factorize.factors(weight, 2)
    assert lost == pytest.approx(3**2 + 2**2)
    assert torch.allclose(
        up @ down, torch.diag(torch.tensor([5.0, 4.0, 0.0, 0.0], dtype=torch.float64)), atol=1e-6
    )
    weight, _states = matrices()
    up, down, lost = factorize.factors(weight, 5)
    assert up.shape == (12, 5)
    assert down.shape == (5, 20)
    assert float((up @ down - weight).square().sum()) == pytest.approx(lost)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_by_activation_no_product_of_that_rank_gives_nearer_outputs(rank):
    weight, states = matrices()
    up, down, lost = factorize.factors(weight, rank, states.T @ states)
    outputs = states @ weight.T
    error = float((states @ (up @ down).T - outputs).square().sum())
    assert error == pytest.approx(lost, rel=1e-4)
    # Eckart and Young: the outputs' own singular values say what is lost at least.
    values = torch.linalg.svdvals(outputs)
    assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)
    plain_up, plain_down, _ = factorize.factors(weight, rank)
    assert error < float((states @ (plain_up @ plain_down).T - outputs).square().sum())


def test_inputs_that_are_never_there_do_no_harm():
    weight, states = matrices()
    states[:, 3] = 0
    states[:, 4] = states[:, 5]
    up, down, _ = factorize.factors(weight, 12, states.T @ states)
    assert torch.allclose(states @ (up @ down).T, states @ weight.T, atol=1e-3)


def test_inputs_that_hardly_differ_are_no_bug():
    """Few rows of a young model: sums in 32 bits leave eigenvalues below zero, by more than the ridge."""
    weight, _ = matrices()
    states = 1 + 1e-5 * torch.randn(300, 20, generator=torch.Generator().manual_seed(2))
    gram = (states.T @ states).double()
    assert float(torch.linalg.eigvalsh(gram)[0]) < 0
    up, down, lost = factorize.factors(weight, 1, gram - 1e-5 * gram.diagonal().mean() * torch.eye(20))
    wanted = states.double() @ weight.T
    error = (states.double() @ (up @ down).T - wanted).square().sum() / wanted.square().sum()
    assert float(error) < 1e-4
    assert lost >= 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["weights", "activation"])
def test_at_full_rank_the_model_is_the_same(name, by, monkeypatch):
    model = MODELS[name]()
    before = logits(model)
    monkeypatch.setattr(factorize, "rank_for", lambda outputs, inputs, share: min(outputs, inputs))
    made = factorize.apply(given(model), step(share="10%", by=by))
    assert all(isinstance(made.model.get_submodule(layer), LowRankLinear) for layer in made.facts["ranks"])
    assert max(made.facts["errors"].values()) < 1e-8
    assert torch.allclose(logits(made.model), before, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_and_loaded_by_transformers(name, tmp_path):
    model = MODELS[name]()
    share = 0.4
    made = factorize.apply(given(model), step(share=share))
    assert not made.standard
    assert made.facts["num_parameters"] == made.model.num_parameters()
    for layer, rank in made.facts["ranks"].items():
        low = made.model.get_submodule(layer)
        numbers = low.in_features * low.out_features
        assert rank * (low.in_features + low.out_features) <= (1 - share) * numbers
        assert (rank + 1) * (low.in_features + low.out_features) > (1 - share) * numbers
    made.model.save_pretrained(tmp_path / "a")
    loaded, info = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(made.model))
    loaded.save_pretrained(tmp_path / "b")  # as a training of it does
    again = type(model).from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again), logits(made.model))


def test_llmkit_loads_and_trains_it(tmp_path):
    made = factorize.apply(given(llama(tied=True)), step(share="40%", keep=["q_proj"]))
    assert not any("q_proj" in name for name in made.facts["ranks"])
    made.model.save_pretrained(tmp_path)
    loaded = load_weights(str(tmp_path), "causal", trusted=False)
    assert torch.equal(logits(loaded), logits(made.model))
    loaded(input_ids=ids()).logits.square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    body = AutoModel.from_pretrained(tmp_path)  # its names lack the beginning
    assert isinstance(body.layers[0].mlp.down_proj, LowRankLinear)
    with torch.no_grad():
        hidden = body(input_ids=ids()).last_hidden_state
    assert torch.allclose(loaded.lm_head(hidden), logits(made.model), atol=1e-5)
    with pytest.raises(UsageError, match="llmkit_lowrank already"):
        factorize.apply(given(loaded), step(share="40%"))


@pytest.mark.slow
def test_another_process_loads_it_once_llmkit_is_imported(tmp_path):
    made = factorize.apply(given(llama()), step(share="40%"))
    made.model.save_pretrained(tmp_path)
    torch.save(logits(made.model), tmp_path / "logits.pt")
    code = (
        "import llmkit, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "found = AutoModelForCausalLM.from_pretrained({place!r})\n"
        "ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(5))\n"
        "with torch.no_grad(): got = found.eval()(input_ids=ids).logits\n"
        "print(torch.equal(got, torch.load({place!r} + '/logits.pt')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code.format(place=str(tmp_path))],
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "True", found.stderr


def test_activation_is_nearer_to_what_the_model_computed():
    before = logits(llama())
    lost = {}
    for by in ("weights", "activation"):
        made = factorize.apply(given(llama(), rows=40), step(share="40%", by=by))
        assert made.facts["by"] == by
        lost[by] = float((logits(made.model) - before).square().sum())
    assert lost["activation"] < lost["weights"]


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"leaves nothing of .*\n.*at most 8"):
        factorize.apply(given(llama()), step(share="95%"))
    with pytest.raises(UsageError, match="matches no layer"):
        factorize.apply(given(llama()), step(share="40%", keep=["nothing"]))
