"""The same loop trains what transformers offers: new models by configuration, and pretrained ones by folder."""

import gzip
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


def test_a_data_set_in_a_folder_and_compressed_text_train_although_their_size_says_little(tmp_path):
    import datasets

    rows = [f"row {n}: the number {n * n} is the square of {n}, and {n * n * n} its cube" for n in range(300)]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(tmp_path / "set" / "train-00000.parquet"))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps({"text": row}) + "\n" for row in rows).encode()))
    for source in ({"dataset": str(tmp_path / "set")}, {"files": str(packed)}):
        folder = pretrain(tmp_path, "set" if "dataset" in source else "packed", pretrain__data=source)
        assert losses(folder)[STEPS] < losses(folder)[1]
