"""Going on from models with more heads, tokens of configurations, and shapes whose numbers follow from each other."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForPreTraining

from llmkit.errors import UsageError
from llmkit.models.build import build_model, check_loaded, left_out, load_weights, make_config
from llmkit.plan import PRESETS, PlanError, model_fields, preset_fields, shape_of_config
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Model
from llmkit.run.planning import model_shape

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert(folder: Any) -> BertForPreTraining:
    model = BertForPreTraining(BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=32))
    model.save_pretrained(folder)
    return model


def test_masked_training_goes_on_from_a_bert_with_its_heads_for_pairs(tmp_path: Any) -> None:
    saved = bert(tmp_path)
    model = build_model(
        Model(name=str(tmp_path), context=16), "masked", vocab_size=50, special_ids={}, seed=0
    )
    assert set(left_out(model)) == {
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    }
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model.eval()(ids).logits, saved.eval()(ids).prediction_logits, rtol=0, atol=0)


def test_a_head_that_is_missing_and_what_nobody_knows_are_refused(tmp_path: Any) -> None:
    AutoModelForMaskedLM.from_config(BertConfig(**SIZES, intermediate_size=32)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"missing keys.*pooler"):
        load_weights(str(tmp_path), "pairs", trusted=False)
    with pytest.raises(
        UsageError, match=r"unexpected keys when loading the weights: bert\.spooler\.weight\n"
    ):
        check_loaded("m", {"unexpected_keys": {"bert.pooler.dense.weight", "bert.spooler.weight"}})
    assert left_out(torch.nn.Linear(1, 1)) == ()  # type: ignore[arg-type]


def test_a_new_models_tokens_are_those_of_its_tokenizer_and_never_beyond_its_vocabulary() -> None:
    spec = Model(preset="modernbert-tiny", context=32)
    ids = {"eos_token_id": 3, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
    config = make_config(spec, vocab_size=60, special_ids=ids)
    assert (config.cls_token_id, config.sep_token_id, config.pad_token_id, config.eos_token_id) == (
        2,
        3,
        0,
        3,
    )
    assert config.bos_token_id is None
    bare = make_config(spec, vocab_size=60, special_ids={})
    names = [name for name in bare.to_dict() if name.endswith("_token_id")]
    assert len(names) >= 5
    assert all((getattr(bare, name) or 0) < 60 for name in names)
    llama = make_config(Model(preset="gpt-tiny", context=32), vocab_size=60, special_ids=ids)
    assert "cls_token_id" not in llama.to_dict()


@pytest.mark.parametrize("pad", [None, 3, 900])
def test_the_plan_counts_the_robertas_positions_that_the_build_makes(pad: int | None) -> None:
    spec, ids = Model(preset="roberta-tiny", context=64), {} if pad is None else {"pad_token_id": pad}
    model = build_model(spec, "masked", vocab_size=1000, special_ids=ids, seed=0)
    shape = model_shape(spec, "mlm", 1000, pad_token_id=pad)
    assert shape.num_parameters == model.num_parameters()
    assert shape.max_length == 64


# --- shapes ---


def test_what_follows_from_width_and_heads_follows() -> None:
    def fields(architecture: str, **config: Any) -> dict[str, Any]:
        made = model_fields(Model(architecture=architecture, config=config))
        assert made is not None
        return made

    llama = fields("llama", num_attention_heads=5, hidden_size=320)
    assert (llama["num_key_value_heads"], llama["head_dim"], llama["intermediate_size"]) == (5, 64, 832)
    qwen = fields("qwen3", num_attention_heads=8)
    assert (qwen["num_key_value_heads"], qwen["head_dim"]) == (4, 32)
    assert fields("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=16)["head_dim"] == 16
    assert fields("mamba2", hidden_size=128)["num_heads"] == 8
    assert fields("bert", hidden_size=64)["intermediate_size"] == 256
    assert fields("t5", hidden_size=64, num_heads=2)["d_kv"] == 32
    assert fields("gpt2", hidden_size=128)["n_embd"] == 128
    assert fields("llama", num_hidden_layers=2) == {**PRESETS["gpt-mini"], "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llama", {"num_attention_heads": 8, "hidden_size": 320}), ("mamba2", {"hidden_size": 128}),
     ("qwen3", {"num_attention_heads": 3, "hidden_size": 96}), ("t5", {"hidden_size": 64, "num_layers": 1}),
     ("gpt2", {"hidden_size": 64}), ("electra", {"hidden_size": 64}), ("bart", {"hidden_size": 64})],
)  # fmt: skip
def test_each_of_these_is_as_large_as_planned_and_computes(architecture: str, config: dict[str, Any]) -> None:
    spec = Model(architecture=architecture, config={**config}, context=16)
    objective = {"t5": "span", "bart": "span", "electra": "mlm"}.get(architecture, "clm")
    kind: Any = {"span": "seq2seq", "mlm": "masked", "clm": "causal"}[objective]
    model = build_model(spec, kind, vocab_size=99, special_ids={"pad_token_id": 0}, seed=0)
    assert model_shape(spec, objective, 99).num_parameters == model.num_parameters()
    ids = torch.arange(1, 9)[None]
    more = {"decoder_input_ids": ids} if kind == "seq2seq" else {}
    assert torch.isfinite(model(input_ids=ids, **more).logits).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5},
         "64 is not a multiple of num_attention_heads 5"),
        ({"model_type": "llama", "hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 4},
         "num_attention_heads 5 is not a multiple of num_key_value_heads 4"),
        ({"model_type": "qwen2", "hidden_size": 60, "num_attention_heads": 4, "num_key_value_heads": 4}, "is 15 wide"),
        ({"model_type": "gpt2", "hidden_size": 64, "n_head": 5}, "n_embd 64 is not a multiple of n_head 5"),
        ({"model_type": "bart", "d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 7},
         "decoder_attention_heads 7"),
        ({"model_type": "mamba2", "hidden_size": 64, "num_heads": 3, "head_dim": 16},
         "is 48, but expand times hidden_size is 128"),
        ({"model_type": "mamba2", "hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 3},
         "multiple of n_groups 3"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size is 'wide'"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_go_together_are_refused_in_the_plan(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        shape_of_config({**config, "vocab_size": 99})
    assert caught.value.hint


def test_the_shipped_student_is_half_as_deep_as_its_teacher_and_else_the_same() -> None:
    section = load_recipe("distil").recipe.pretrain
    assert section is not None
    teacher = preset_fields("gpt-tiny")
    assert model_fields(section.model) == {**teacher, "num_hidden_layers": teacher["num_hidden_layers"] // 2}


def test_loaded_weights_lie_where_torch_would_have_put_them(tmp_path: Any) -> None:
    """A file's tensors begin at any byte; where products round by that, two models of the same weights would differ."""
    config = BertConfig(
        vocab_size=37, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    plain = BertForMaskedLM.from_pretrained(tmp_path)
    assert any(tensor.data_ptr() % 64 for tensor in plain.parameters()), (
        "the file is read as ever: test another way"
    )
    loaded = load_weights(str(tmp_path), "masked", trusted=False)
    assert not any(tensor.data_ptr() % 64 for tensor in (*loaded.parameters(), *loaded.buffers()))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
