"""Weights in few bits: the numbers on disk, in plain transformers and in llmkit are those that were computed with."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from llmkit.compress import quantize
from llmkit.compress.calibrate import linear_layers, reads_of
from llmkit.compress.folding import find_folds, move
from llmkit.compress.given import Given, Made
from llmkit.compress.mixed import Unit, assigned, sensitivities
from llmkit.errors import MissingError, UsageError
from llmkit.models.build import load_weights
from llmkit.models.grid import Grid, group_size, round_inputs
from llmkit.models.rounded import RoundedLinear, Rounding, plain, round_weights, roundings, set_rounding
from llmkit.models.tasks import build_task_model
from llmkit.objectives.base import Loss, LossModule
from llmkit.recipe.compression import Step
from llmkit.recipe.training import Rounded

SIZE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


class Words:
    """The smallest objective: the next token of a decoder, or the class of a row."""

    def loss(self, model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = batch["input_ids"]
        logits = model(**inputs).logits
        if logits.ndim == 2:
            return Loss(
                {"num_targets": torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")}
            )
        targets = batch["targets"]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
        )
        return Loss({"num_targets": total})


def tiny(kind="llama", **fields):
    torch.manual_seed(0)
    given = {**SIZE, **HEADS, **fields}
    if kind == "bert":
        config = BertConfig(**{**given, "num_labels": 3})
        model = BertForSequenceClassification(config)
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4))
    elif kind == "t5":
        sizes = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 64}
        model = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**given, num_local_experts=2))
    elif kind == "modernbert":
        marks = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
        fields = {"num_attention_heads": 4, "pad_token_id": 0, "num_labels": 3, **marks}
        model = ModernBertForSequenceClassification(ModernBertConfig(**SIZE, **fields))
    else:
        configs = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig}
        config = configs[kind](**{"tie_word_embeddings": True, "head_dim": 16, **given})
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that are all ones would hide what moves through them
                parameter.add_(torch.rand_like(parameter))
    return model.eval()


def batches(number=4, rows=4, length=24):
    torch.manual_seed(1)
    found = []
    for _ in range(number):
        ids = torch.randint(1, 64, (rows, length))
        targets = ids.roll(-1, 1)
        targets[:, -1] = -100
        found.append({"input_ids": ids, "targets": targets, "labels": torch.randint(0, 3, (rows,))})
    return found


def given(model, place=Path("nowhere"), **more):
    return Given(LossModule(model, Words(), bf16=False), batches(), place, 0, lambda _: None, **more)


def step(**settings):
    return Step.model_validate({"method": "quantize", **settings})


def done(model, **settings) -> Made:
    return quantize.apply(given(model), step(**settings))


def logits(model):
    ids = batches(1)[0]["input_ids"]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


FORMATS = {
    "int8": {"format": "int8"},
    "int8 offset": {"format": "int8", "symmetric": False},
    "int4": {"format": "int4"},
    "int4 rtn": {"format": "int4", "solver": "rtn", "group": 16},
    "int4 awq": {"format": "int4", "solver": "awq"},
    "w8a8": {"format": "w8a8"},
    "w8a8 rtn": {"format": "w8a8", "solver": "rtn", "smooth": 0},
    "fp8": {"format": "fp8"},
    "mixed": {"format": "mixed", "bits": 6},
}


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS.keys())
def test_plain_transformers_and_llmkit_compute_what_was_made(settings, tmp_path):
    model = tiny()
    before = logits(model)
    made = done(model, **settings)
    after = logits(made.model)
    gap = float((after - before).norm() / before.norm())
    assert 1e-4 < gap < (0.05 if settings["format"] in ("int8", "w8a8", "fp8") else 0.3)
    made.write(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits(loaded), after)
    own = load_weights(str(tmp_path), "causal", trusted=False)
    assert torch.equal(logits(own), after)
    assert own.state_dict().keys() == made.model.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[name]), name
    # Without the head, whose body has no prefix.
    body = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, made.model.model(ids).last_hidden_state)


def test_files_are_as_small_as_promised(tmp_path):
    model = tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    num_rest = sum(p.numel() for p in model.parameters()) - sum(
        layer.weight.numel() for layer in linear_layers(model, ()).values()
    )
    made = done(model, format="int4", solver="rtn", group=64)
    made.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    weights = made.facts["num_weights"]
    shapes = 16 * made.facts["num_layers"]
    assert size == weights // 2 + 2 * weights // 64 + 2 * num_rest + shapes
    assert made.facts["bits"] == 4
    assert made.facts["group"] == 64
    assert "lm_head.weight" not in tensors
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["quantization_config"]["format"] == "pack-quantized"
    assert not hasattr(made.model.config, "quantization_config")


def test_a_fresh_process_without_llmkit_loads_it(tmp_path):
    made = done(tiny(), format="w8a8")
    made.write(tmp_path)
    torch.save((batches(1)[0]["input_ids"], logits(made.model)), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "assert 'llmkit' not in sys.modules\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(input_ids=ids).logits, expected)\n"
    )
    done_process = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done_process.returncode == 0, done_process.stderr


@pytest.mark.slow
def test_a_fresh_process_without_llmkit_loads_every_format_and_solver(tmp_path):
    more = {
        "int8 gptq": {"format": "int8", "solver": "gptq"},
        "int8 awq": {"format": "int8", "solver": "awq"},
        "mixed rtn": {"format": "mixed", "solver": "rtn"},
    }
    cases = [("llama", name, settings) for name, settings in {**FORMATS, **more}.items()]
    cases += [
        (kind, name, FORMATS[name]) for kind in ("bert", "qwen3", "t5") for name in ("int8", "w8a8", "fp8")
    ]
    cases += [(kind, "int4", FORMATS["int4"]) for kind in ("bert", "qwen3", "gemma")]
    for kind, name, settings in cases:
        made, folder = done(tiny(kind), **settings), tmp_path / f"{kind}-{name}"
        made.write(folder)
        ids = batches(1)[0]["input_ids"]
        torch.save((type(made.model).__name__, ids, logits(made.model)), folder / "expected.pt")
    script = (
        "import pathlib, sys, torch, transformers\n"
        "for place in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    kind, ids, expected = torch.load(place / 'expected.pt')\n"
        "    model = getattr(transformers, kind).from_pretrained(place, dtype=torch.float32)\n"
        "    more = {'decoder_input_ids': ids} if model.config.is_encoder_decoder else {}\n"
        "    with torch.no_grad():\n"
        "        assert torch.equal(model(input_ids=ids, **more).logits, expected), place.name\n"
        "    print(place.name)\n"
        "assert 'llmkit' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == len(cases)


@pytest.mark.parametrize("kind", ["qwen3", "bert", "t5"])
def test_other_architectures(kind, tmp_path):
    made = done(tiny(kind), format="w8a8")
    made.write(tmp_path)
    after = logits(made.model)
    loaded = type(made.model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), after)
    assert made.facts["num_layers"] == {"qwen3": 14, "bert": 12, "t5": 2 * 7 + 2 * 11}[kind]


@pytest.mark.parametrize("kind", ["t5", "modernbert"])
def test_architectures_that_transformers_cannot_load_packed(kind, tmp_path):
    made = done(tiny(kind), format="int8")
    made.write(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "int-quantized"
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.dtype == torch.int8 for tensor in stored.values()) == made.facts["num_layers"]
    loaded = type(made.model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(made.model))
    for few in ("int4", "mixed"):
        with pytest.raises(UsageError, match=f"{kind} with weights of fewer than 8 bits"):
            done(tiny(kind), format=few)


@pytest.mark.parametrize("settings", [{"format": "int4"}, {"format": "w8a8"}])
def test_a_classifier_goes_on_as_a_plain_model(settings, tmp_path):
    made = done(tiny("bert"), **settings)
    made.write(tmp_path)
    model, new = build_task_model(str(tmp_path), "sequence", labels=["a", "b", "c"])
    assert new == ()
    assert model.state_dict().keys() == made.model.state_dict().keys()
    assert torch.equal(logits(model.eval()), logits(made.model))
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "plain")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    expected = {n: t for n, t in made.model.state_dict().items() if n.endswith("weight")}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in expected.items())
    _, new = build_task_model(str(tmp_path), "sequence", labels=["a", "b"])
    assert sorted(new) == ["classifier.bias", "classifier.weight"]


def test_gptq_loses_less_than_rounding_to_the_nearest():
    whole = tiny()
    names, core = list(linear_layers(whole, ())), LossModule(whole, Words(), bf16=False)
    reads = reads_of(core, batches(), names)
    errors = {}
    for solver in ("rtn", "gptq", "awq"):
        made = done(copy.deepcopy(whole), format="int4", solver=solver)
        first = names[0]  # what it reads does not depend on the others
        gap = (made.model.get_submodule(first).weight - whole.get_submodule(first).weight).detach().double()
        if solver != "awq":  # there the norm before it has changed, too
            errors[solver] = float(((gap @ reads[first].gram_II) * gap).sum())
    assert errors["gptq"] < 0.9 * errors["rtn"]
    gaps = {
        solver: float(
            (logits(done(copy.deepcopy(whole), format="int4", solver=solver).model) - logits(whole)).norm()
        )
        for solver in ("rtn", "gptq", "awq")
    }
    assert gaps["gptq"] < gaps["rtn"]
    assert gaps["awq"] < gaps["rtn"]


def test_gptq_with_few_bits_cuts_off_the_largest_weights(monkeypatch):
    model = tiny()
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.copy_(30 * layer.weight * layer.weight.abs())  # few are large
    cut = done(copy.deepcopy(model), format="int4").model
    monkeypatch.setattr(quantize, "awq_clipped", lambda weight, gram, grid: weight)
    whole = done(model, format="int4").model
    name = next(iter(linear_layers(whole)))
    most = [one.get_submodule(name).weight.abs().amax(1).mean() for one in (cut, whole)]
    assert most[0] < 0.98 * most[1]


def test_training_goes_on_from_where_gptq_left_off(tmp_path):
    done(tiny(hidden_size=128, intermediate_size=256), format="int4", group=64).write(tmp_path)
    model = load_weights(str(tmp_path), "causal", trusted=False)
    stored = {name: layer.weight.detach().clone() for name, layer in linear_layers(model, ()).items()}
    grids = round_weights(model, Rounded.model_validate({"bits": 4, "group": 64}))
    same = [(grids[name].nearest(weight) == weight).float().mean() for name, weight in stored.items()]
    assert min(same) > 0.97  # all but groups whose largest number is neither 7 nor -8


# What factors can move through.


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("llama", 6), ("qwen3", 6), ("gemma", 6), ("bert", 0), ("t5", 4 + 6 + 4), ("gpt2", 0)],
)
def test_factors_move_and_the_model_computes_the_same(kind, expected):
    model = tiny(kind)
    before = logits(model)
    layers = {n: m for n, m in linear_layers(model, ()).items() if isinstance(m, torch.nn.Linear)}
    folds = find_folds(LossModule(model, Words(), bf16=False), batches(1)[0], layers)
    assert len(folds) == expected
    assert {fold.offset for fold in folds if "norm" in fold.source} <= ({1.0} if kind == "gemma" else {0.0})
    torch.manual_seed(2)
    for fold in folds:
        width = layers[fold.layers[0]].in_features
        weight = layers[fold.layers[0]].weight.clone()
        move(model, fold, torch.rand(width) + 0.5, torch.float32)
        assert not torch.allclose(layers[fold.layers[0]].weight, weight)
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_a_norm_that_something_else_reads_takes_no_factors():
    model = tiny()
    layers = dict(linear_layers(model, ("layers.0.*.k_proj",)))
    folds = find_folds(LossModule(model, Words(), bf16=False), batches(1)[0], layers)
    assert "model.layers.0.input_layernorm" not in {fold.source for fold in folds}
    assert "model.layers.1.input_layernorm" in {fold.source for fold in folds}


def test_smoothing_helps_where_a_channel_is_large():
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[3] = 60.0
            block, feed = layer.self_attn, layer.mlp
            for reader in (block.q_proj, block.k_proj, block.v_proj, feed.gate_proj, feed.up_proj):
                reader.weight[:, 3] /= 60
    before = logits(model)
    gaps = {
        smooth: float(
            (logits(done(copy.deepcopy(model), format="w8a8", smooth=smooth).model) - before).norm()
        )
        for smooth in (0.0, 0.5)
    }
    assert gaps[0.5] < 0.6 * gaps[0.0]


def test_layers_that_could_not_be_smoothed_are_named():
    made = done(tiny("bert"), format="w8a8")
    assert any("12 of 12" in warning and "query" in warning for warning in made.warnings)


# Mixed bits.


def test_sensitivities_are_half_the_square_of_what_a_change_costs():
    model = tiny(num_hidden_layers=1)
    core, data, grid = LossModule(model, Words(), bf16=False), batches(1, rows=1, length=8)[0], Grid(4)
    layers = dict(linear_layers(model, ()))
    units = sensitivities(core, [data], layers, [grid])
    by_name = {tuple(n.rpartition(".")[2] for n in unit.layers): unit for unit in units}
    assert list(by_name) == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    # By hand: the gradient of the loss by the layer's output at each position, times the change of that output.
    layer, seen = model.model.layers[0].mlp.down_proj, {}
    hook = layer.register_forward_hook(
        lambda _, args, out: (out.retain_grad(), seen.update(read=args[0], gave=out))[1:] and None
    )
    core.objective.loss(model, data).total.backward()
    hook.remove()
    change = torch.nn.functional.linear(
        seen["read"][0], grid.nearest(layer.weight.detach()) - layer.weight.detach()
    )
    expected = float((change * seen["gave"].grad[0]).sum(1).square().sum().detach() / 2)
    assert by_name["down_proj",].loss[grid] == pytest.approx(expected, rel=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def test_bits_go_where_they_count():
    few, many = Grid(4), Grid(8)
    units = [Unit([name], size, {few: loss, many: 0.0}) for name, size, loss in (
        ("cheap", 100, 1.0), ("dear", 100, 50.0), ("large", 200, 4.0), ("small", 40, 0.7)
    )]  # fmt: skip
    # A mean of 6 bits: half of the 440 weights. The cheapest a weight: cheap (0.01), small (0.0175), large (0.02);
    # then small need not be: cheap and large are 300.
    found = assigned(units, few, many, 6)
    assert {name for name, grid in found.items() if grid == few} == {"cheap", "large"}
    assert set(assigned(units, few, many, 8).values()) == {many}
    assert set(assigned(units, few, many, 4).values()) == {few}


def test_mixed_keeps_to_its_bits_and_spares_what_matters():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(40)
    made = done(model, format="mixed", bits=5.5)
    assert 4 < made.facts["bits"] <= 5.5
    assert not any("layers.1.mlp.down_proj" in name for name in made.facts["few_bits"])


# Training with rounded weights.


@pytest.mark.parametrize(
    ("settings", "like"),
    [
        ({"bits": 4}, {"format": "int4", "solver": "rtn"}),
        ({"bits": 8}, {"format": "int8"}),
        ({"bits": 8, "symmetric": False}, {"format": "int8", "symmetric": False}),
        ({"activations": True}, {"format": "w8a8", "solver": "rtn", "smooth": 0}),
        ({"float8": True, "activations": True}, {"format": "fp8"}),
    ],
)
def test_what_is_trained_with_is_what_is_stored(settings, like):
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter is model.model.embed_tokens.weight:
                parameter.copy_(parameter.bfloat16())
    fine, names = copy.deepcopy(model.state_dict()), list(model.state_dict())
    round_weights(model, Rounded.model_validate(settings))
    assert list(model.state_dict()) == names
    assert all(torch.equal(fine[name], tensor) for name, tensor in model.state_dict().items())
    trained = logits(model)
    plain(model)
    assert not roundings(model)
    assert not torch.equal(logits(model), trained)
    assert torch.equal(logits(done(model, **like).model), trained)


def test_gradients_are_as_if_nothing_were_rounded():
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    states = torch.randn(3, 16, requires_grad=True)
    set_rounding(layer, Rounding(Grid(4), inputs=True))
    layer(states).square().sum().backward()
    weight, read = Grid(4).nearest(layer.weight.detach()), round_inputs(states.detach(), float8=False)
    output = read @ weight.T + layer.bias.detach()
    assert torch.equal(layer(states), torch.nn.functional.linear(read, weight, layer.bias))
    assert torch.allclose(layer.weight.grad, 2 * output.T @ read, atol=1e-4)
    assert torch.allclose(states.grad, 2 * output @ weight, atol=1e-4)


def test_rounded_layers_are_those_that_quantize_treats():
    for kind in ("llama", "bert", "t5"):
        model = tiny(kind)
        expected = set(linear_layers(model, ()))
        assert set(round_weights(model, Rounded())) == expected
        assert {n for n, m in model.named_modules() if isinstance(m, RoundedLinear)} == expected
    model = tiny()
    kept = round_weights(model, Rounded.model_validate({"keep": ["down_proj"]}))
    assert not any("down_proj" in name for name in kept)


# The grid, by hand.


def test_the_grid_by_hand():
    # A scale of 1 loses 0.2² + 0.4² + 0.4² = 0.36; 8 / 7 loses 0.5, 8 / 7.5 loses 0.66.
    weight = torch.tensor([[-8.0, 3.2, 0.4, 0.6]])
    scale, zero = Grid(4).fit(weight)
    assert scale.tolist() == [[1.0]]
    assert zero is None
    assert Grid(4).rounded(weight, scale, None).tolist() == [[-8.0, 3.0, 0.0, 1.0]]
    weight = torch.tensor([[0.0, 15.0, 3.4, 7.6]])
    scale, zero = Grid(4, symmetric=False).fit(weight)
    assert (scale.tolist(), zero.tolist()) == ([[1.0]], [[-8.0]])
    assert Grid(4, symmetric=False).codes(weight, scale, zero).tolist() == [[-8.0, 7.0, -5.0, 0.0]]
    assert Grid(4, symmetric=False).rounded(weight, scale, zero).tolist() == [[0.0, 15.0, 3.0, 8.0]]
    # Between 16 and 32 floats with 3 bits of mantissa are 2 apart; a scale of 1 since the largest is 448.
    weight = torch.tensor([[448.0, 17.5, -21.5, 0.0]])
    assert Grid(8, float8=True).nearest(weight).tolist() == [[448.0, 18.0, -22.0, 0.0]]
    assert Grid(4, 2).nearest(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("most", [7, -8])
def test_what_is_rounded_stays_what_it_is(most):
    torch.manual_seed(0)
    codes = torch.randint(-6, 7, (5, 64)).float()
    codes[:, ::32] = most
    weight = codes * torch.rand(5, 1).bfloat16().float()
    assert torch.equal(Grid(4, 32).nearest(weight), weight)


@pytest.mark.parametrize(
    ("widths", "expected"), [((576, 1536), 64), ((128, 256), 128), ((96, 160), 32), ((256,), 128)]
)
def test_the_largest_group_that_divides(widths, expected):
    assert group_size({str(n): w for n, w in enumerate(widths)}, 4, "auto") == expected
    assert group_size({str(n): w for n, w in enumerate(widths)}, 8, "auto") is None


# What is refused.


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("llama", {"format": "int4", "group": 48}, "64 inputs, which 48 does not divide"),
        ("llama", {"format": "int4", "symmetric": False}, "offset"),
        ("llama", {"format": "int8", "keep": ["nothing"]}, "'nothing' matches no layer"),
        ("gpt2", {"format": "int8"}, "Conv1D"),
        ("mixtral", {"format": "int8"}, "MixtralExperts"),
        ("mixtral", {"format": "int8", "keep": ["experts|gate"]}, "fails to load the weights of experts"),
    ],
)
def test_what_cannot_be_is_refused(kind, settings, said):
    with pytest.raises(UsageError, match=said):
        done(tiny(kind), **settings)


def test_a_quantised_model_is_refused(tmp_path):
    done(tiny(), format="int8").write(tmp_path)
    model = load_weights(str(tmp_path), "causal", trusted=False)
    with pytest.raises(UsageError, match="in few bits already"):
        quantize.apply(given(model, tmp_path), step(format="int8"))


def test_nothing_to_look_at_is_refused():
    with pytest.raises(UsageError, match="0 tokens"):
        quantize.apply(
            Given(LossModule(tiny(), Words(), bf16=False), [], Path("x"), 0, print), step(format="int4")
        )


def test_a_missing_package_says_how_to_get_it(monkeypatch, tmp_path):
    done(tiny(), format="int8").write(tmp_path)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MissingError, match="compressed-tensors") as caught:
        load_weights(str(tmp_path), "causal", trusted=False)
    assert "llmkit[compress]" in str(caught.value.hint)
    with pytest.raises(MissingError):
        done(tiny(), format="int8")


def test_layers_that_stay(tmp_path):
    model = tiny()
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    made = done(model, format="int4", solver="rtn", keep=["layers.0.*.down_proj"])
    made.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["model.layers.0.mlp.down_proj.weight"], before.bfloat16())
    assert "model.layers.1.mlp.down_proj.weight_packed" in tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(made.model))
