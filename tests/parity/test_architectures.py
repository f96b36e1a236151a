"""The same loop trains what transformers offers: new models by configuration, and pretrained ones by folder."""

import json

import pytest
from training import STEPS, losses, pretrain, weights

SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
}


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("model_type", sorted(SHAPES))
def test_other_architectures_learn(tmp_path, model_type, isolate):
    folder = pretrain(
        tmp_path,
        pretrain__model={
            "config": {"model_type": model_type, **SHAPES[model_type]},
            "context": 32,
        },
        pretrain__isolate_documents=isolate,
    )
    found = losses(folder)
    assert found[STEPS] < found[1] - 0.4
    counted = json.loads((folder / "plan.json").read_text())["num_parameters"]
    assert counted == sum(tensor.size for tensor in weights(folder).values()), "the plan counts what is built"


def test_training_goes_on_from_a_model_in_a_folder(tmp_path):
    first = pretrain(tmp_path, "first")
    second = pretrain(
        tmp_path,
        "second",
        tokenize=None,
        pretrain__model={"name": str(first / "model"), "context": 32},
    )
    start, end = losses(second, "eval/loss")[0], losses(first, "eval/loss")[STEPS]
    assert start == pytest.approx(end, abs=0.05), "the same weights on nearly the same held-out rows"
    assert losses(second, "eval/loss")[STEPS] < start


def test_dropout_is_set_where_the_architecture_has_it_and_refused_elsewhere():
    from transformers import AutoConfig

    from llmkit.errors import UsageError
    from llmkit.models.build import set_dropout

    config = AutoConfig.for_model("gpt2")
    set_dropout(config, 0.25)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    with pytest.raises(UsageError, match="no dropout"):
        set_dropout(AutoConfig.for_model("mamba"), 0.1)
