"""A model's numbers without building it: against transformers' own models, for every family, size and head."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from llmkit.errors import UsageError
from llmkit.models.build import AUTO_CLASSES, make_config, max_length
from llmkit.models.count import kinds_of_type, shape_by_building
from llmkit.plan import (
    PRESETS,
    architecture_fields,
    flops_per_token,
    known_kinds,
    model_fields,
    preset_fields,
    shape_of_config,
    shape_of_preset,
    training_memory,
    with_lengths,
)
from llmkit.plan.families import FAMILIES
from llmkit.recipe.architectures import KINDS, family_of_preset
from llmkit.recipe.schema import Model

VOCABULARY, CONTEXT = 5003, 256
EVERY = [(preset, kind) for preset in PRESETS for kind in KINDS[family_of_preset(preset)]]
LINEAR = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.RNNBase, Conv1D)


def built(fields: dict[str, Any], kind: str, device: str = "meta") -> Any:
    fields = {"pad_token_id": 0, **fields}
    with torch.device(device):
        return AUTO_CLASSES[kind].from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def counted(model: Any) -> tuple[int, int]:
    """All parameters, and those of the layers that multiply, but a next-sentence head: it sees one token a row."""
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and not name.endswith(("pooler.dense", "seq_relationship"))
    ]
    matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
    return sum(p.numel() for p in model.parameters()), matrices


@pytest.mark.parametrize(("preset", "kind"), EVERY)
def test_a_presets_parameters_are_exact(preset: str, kind: Any) -> None:
    shape = shape_of_preset(preset, VOCABULARY, CONTEXT, kind)
    model = built(with_lengths(PRESETS[preset], VOCABULARY, CONTEXT), kind)
    assert (shape.num_parameters, shape.num_matmul_parameters) == counted(model)
    assert shape.max_length in (CONTEXT, None)
    assert (shape.hidden_size, shape.vocab_size) == (model.config.hidden_size, VOCABULARY)
    assert shape.num_non_embedding_parameters < shape.num_parameters


OTHERS: list[dict[str, Any]] = [
    {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 77,
     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    {"model_type": "qwen2", "num_hidden_layers": 1, "tie_word_embeddings": True},
    {"model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 1024, "num_attention_heads": 16,
     "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 100, "tie_word_embeddings": False},
    {"model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2,
     "num_hidden_layers": 2, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
    {"model_type": "bert", "tie_word_embeddings": False, "type_vocab_size": 3, "hidden_size": 24},
    {"model_type": "roberta", "max_position_embeddings": 514, "num_hidden_layers": 1},
    {"model_type": "electra", "embedding_size": 24, "num_hidden_layers": 2},
    {"model_type": "modernbert", "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True,
     "decoder_bias": False, "num_hidden_layers": 3},
    {"model_type": "t5", "d_model": 48, "d_kv": 5, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 3,
     "num_heads": 3},
    {"model_type": "t5", "tie_word_embeddings": False, "feed_forward_proj": "gated-silu", "hidden_size": 64},
    {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 50,
     "decoder_ffn_dim": 70, "encoder_attention_heads": 2, "decoder_attention_heads": 4},
    {"model_type": "llmkit-recurrent", "cell": "gru", "hidden_size": 24, "embedding_size": 16},
    {"model_type": "llmkit-recurrent", "embedding_size": 16, "tie_word_embeddings": False, "num_hidden_layers": 1},
    {"model_type": "llmkit-cnn", "hidden_size": 16, "kernel_size": 3, "tie_word_embeddings": False},
]  # fmt: skip


@pytest.mark.parametrize("fields", OTHERS, ids=lambda fields: fields["model_type"])
def test_configurations_written_out_are_exact_for_every_head(fields: dict[str, Any]) -> None:
    kinds = known_kinds(fields)
    assert kinds
    for kind in kinds:
        shape = shape_of_config(fields, kind)
        assert shape is not None
        assert (shape.num_parameters, shape.num_matmul_parameters) == counted(built(fields, kind))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_left_out_is_as_in_transformers(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, pad_token_id=1)
    for key, value in FAMILIES[model_type].defaults.items():
        found = getattr(config, key, value)  # an architecture without such a field is as if it had ours
        assert value in (found, None), key
    assert set(FAMILIES[model_type].aliases) <= set(config.attribute_map)


def test_shapes_that_are_not_known() -> None:
    assert shape_of_config({"model_type": "mamba"}) is None
    assert shape_of_config({}) is None
    assert shape_of_config({"model_type": "gpt2", "add_cross_attention": True}) is None
    assert shape_of_config({"model_type": "bert", "is_decoder": True}) is None
    assert shape_of_config({"model_type": "bert"}, "causal") is None
    with pytest.raises(UsageError, match=r"gpt-1b(.|\n)*did you mean 'gpt-small'"):
        preset_fields("gpt-smal")


def test_presets_are_a_ladder() -> None:
    gpt = [name for name in PRESETS if name.startswith("gpt-")]
    sizes = [shape_of_preset(name, 50257, 1024).num_parameters / 1e6 for name in gpt]
    small = [shape_of_preset(name, 4096, 512).num_parameters / 1e6 for name in gpt]
    assert small[:3] == [pytest.approx(1.2, abs=0.2), pytest.approx(6.5, abs=1.5), pytest.approx(28, abs=3)]
    assert sizes[3:] == [pytest.approx(124, abs=2), pytest.approx(350, abs=10), pytest.approx(760, abs=10),
                         pytest.approx(1200, abs=30)]  # fmt: skip


@pytest.mark.parametrize(("size", "low", "high"), [("tiny", 0.65, 1.15), ("mini", 4.4, 6.9), ("small", 22, 30),
                                                   ("base", 77, 100)])  # fmt: skip
def test_families_of_one_size_are_alike(size: str, low: float, high: float) -> None:
    for preset in (name for name in PRESETS if name.endswith(f"-{size}")):
        millions = shape_of_preset(preset, 4096, 512).num_non_embedding_parameters / 1e6
        assert low <= millions <= high, preset


def test_an_architecture_is_its_mini_preset_under_its_config() -> None:
    fields = model_fields(Model(architecture="bert", config={"hidden_size": 64}))
    assert fields == {**PRESETS["bert-mini"], "hidden_size": 64, "intermediate_size": 256}
    assert architecture_fields("llama", {}) == PRESETS["gpt-mini"]
    assert architecture_fields("gru", {})["cell"] == "gru"
    assert architecture_fields("gemma", {"hidden_size": 8}) == {"hidden_size": 8, "model_type": "gemma"}
    with pytest.raises(UsageError, match=r"cell is 'rnn', but model\.architecture is 'gru'"):
        architecture_fields("gru", {"cell": "rnn"})


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_a_new_robertas_positions_are_as_many_as_the_plan_says(pad: int) -> None:
    config = make_config(
        Model(preset="roberta-tiny", context=64), vocab_size=99, special_ids={"pad_token_id": pad}
    )
    assert max_length(config) == 64
    assert config.max_position_embeddings == 64 + max(2, pad + 1)
    planned = with_lengths({**PRESETS["roberta-tiny"], "pad_token_id": pad}, 99, 64)
    assert planned["max_position_embeddings"] == config.max_position_embeddings
    shape = shape_of_config(planned)
    assert shape is not None
    assert shape.max_length == 64


# --- architectures that only transformers knows ---


def test_any_other_architecture_is_counted_on_no_device() -> None:
    for architecture, config, kind in (
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, "causal"),
        ("gemma", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "head_dim": 16, "intermediate_size": 48}, "causal"),
        ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}, "masked"),
        ("mbart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "decoder_attention_heads": 2,
                   "encoder_attention_heads": 2}, "seq2seq"),
        ("megatron-bert", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "pairs"),
    ):  # fmt: skip
        assert kind in kinds_of_type(architecture)
        spec = Model(architecture=architecture, config=config, context=64)
        shape = shape_by_building(spec, kind, 300)  # type: ignore[arg-type]
        model = built({"model_type": architecture, "vocab_size": 300, **config}, kind)
        exact = sum(p.numel() for n, p in model.named_parameters() if "position" not in n)
        assert 0 <= shape.num_parameters - exact <= 2 * 66 * 32, architecture
        assert shape.num_encoder_layers == (2 if kind == "seq2seq" else 0)
        assert flops_per_token(shape, 64, 16) > 6 * 300 * 32 * (0.25 if kind == "seq2seq" else 1)


def test_counting_by_building_agrees_with_the_formulas() -> None:
    for preset, kind in (("gpt-tiny", "causal"), ("bert-tiny", "masked"), ("bart-tiny", "seq2seq")):
        spec = Model(preset=preset, context=64)
        built_, formula = shape_by_building(spec, kind, 999), shape_of_preset(preset, 999, 64)  # type: ignore[arg-type]
        same = ("num_parameters", "num_matmul_parameters", "hidden_size", "num_layers", "num_heads", "max_length",
                "tied", "num_encoder_layers")  # fmt: skip
        assert [getattr(built_, name) for name in same] == [getattr(formula, name) for name in same]


def test_what_transformers_can_train_an_architecture_as() -> None:
    assert kinds_of_type("rwkv") == ("causal",)
    assert kinds_of_type("mbart") == ("causal", "masked", "seq2seq")
    assert "pairs" in kinds_of_type("fnet")
    assert kinds_of_type("no-such-type") == ()


# --- FLOPs and memory of what is no decoder ---


def flops_counted(model: Any, **inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        output = model(**inputs)
        output.logits.sum().backward()
    return int(counter.get_total_flops())


def test_flops_of_an_encoder_decoder_against_torchs_counter() -> None:
    fields = {
        **PRESETS["bart-tiny"],
        "vocab_size": 600,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    model = built(fields, "seq2seq", "cpu")
    ids, short = torch.full((2, 48), 5), torch.full((2, 12), 5)
    found = flops_counted(model, input_ids=ids, decoder_input_ids=short)
    shape = shape_of_preset("bart-tiny", 600, 64)
    assert found == pytest.approx(2 * 48 * flops_per_token(shape, 48, 12), rel=1e-3)


@pytest.mark.parametrize("preset", ["bert-tiny", "cnn-tiny", "lstm-tiny", "gru-tiny", "rnn-tiny"])
def test_flops_of_other_networks_against_torchs_counter(preset: str) -> None:
    fields = {**PRESETS[preset], "vocab_size": 600}
    if preset == "bert-tiny":
        fields["attn_implementation"] = "eager"
    model = built(fields, known_kinds(fields)[0], "cpu")  # type: ignore[index]
    with torch.backends.mkldnn.flags(
        enabled=False
    ):  # its LSTM is one operation that the counter does not know
        found = flops_counted(model, input_ids=torch.full((2, 32), 5))
    shape = shape_of_preset(preset, 600, 32)
    assert found == pytest.approx(2 * 32 * flops_per_token(shape, 32), rel=0.02)


@pytest.mark.parametrize(
    "preset", ["bert-tiny", "bart-tiny", "t5-tiny", "cnn-tiny", "lstm-tiny", "gru-tiny", "rnn-tiny"]
)
def test_the_activation_estimate_is_near_what_torch_keeps(preset: str) -> None:
    fields = {**PRESETS[preset], "vocab_size": 600}
    model = built(
        {**fields, **({"dropout": 0.0} if preset == "bart-tiny" else {})}, known_kinds(fields)[0], "cpu"
    )  # type: ignore[index]
    model.train(preset != "bert-tiny")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    shape = shape_of_preset(preset, 600, 64)
    decoder = 24 if shape.num_encoder_layers else 0
    ids = torch.full((4, 64), 5)
    more = {"decoder_input_ids": ids[:, :decoder]} if decoder else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, **more)
    num_bytes = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    memory = training_memory(
        shape, context=64, decoder=decoder, micro_batch=4, precision="fp32", attention="sdpa"
    )
    assert memory.activations == pytest.approx(num_bytes, rel=0.35)


def test_the_numbers_of_an_encoder_decoder_by_hand() -> None:
    shape = shape_of_preset("t5-tiny", 1000, 512)
    block, mlp = 4 * 128 * 128, 3 * 128 * 320
    assert shape.num_encoder_parameters == 2 * (block + mlp) + 2 * 2 * 128 * 128
    assert shape.num_matmul_parameters == 2 * (block + mlp) + 2 * (2 * block + mlp) + 1000 * 128
    bare = dataclasses.replace(shape, num_heads=0)
    own = shape.num_matmul_parameters - shape.num_encoder_parameters
    assert flops_per_token(bare, 512, 128) == 6 * shape.num_encoder_parameters + 6 * own * 128 // 512
