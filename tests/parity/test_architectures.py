"""The same loop trains what transformers offers: new models by configuration, and pretrained ones by folder."""

import gzip
import json

import pytest
from training import STEPS, losses, pretrain, weights

from llmkit.errors import UsageError

ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "qwen3": {**ENCODER, "num_key_value_heads": 1, "head_dim": 16},
    "mamba2": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "num_hidden_layers": 2,
               "chunk_size": 16},
    "rnn": {"hidden_size": 48, "embedding_size": 32},
    "lstm": {"hidden_size": 32},
    "gru": {"hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False},
    "cnn": {"hidden_size": 32, "num_hidden_layers": 3},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "bert": ENCODER,
    "roberta": ENCODER,
    "modernbert": ENCODER,
    "electra": {**ENCODER, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2},
    "bart": {"d_model": 32, **SIDES},
}  # fmt: skip
BUFFERS = {"final_logits_bias"}
"""What an export holds besides weights."""


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("architecture", "objective", "isolate"),
    [
        ("gpt2", "clm", False),
        ("qwen3", "clm", True),
        ("lstm", "clm", True),
        ("cnn", "clm", False),
        ("bert", "mlm", False),
        ("t5", "span", False),
        ("distilbert", "mlm", False),
        _slow("gpt2", "clm", True),
        _slow("qwen3", "clm", False),
        _slow("rnn", "clm", True),
        _slow("gru", "clm", True),
        _slow("cnn", "clm", True),
        _slow("mamba2", "clm", False),
        _slow("rwkv", "clm", False),
        _slow("roberta", "mlm", False),
        _slow("modernbert", "mlm", False),
        _slow("electra", "mlm", False),
        _slow("bert", "mlm+nsp", False),
        _slow("bart", "denoise", False),
    ],
)
def test_every_family_learns(tmp_path, architecture, objective, isolate):
    folder = pretrain(
        tmp_path,
        pretrain__objective=objective,
        pretrain__model={"architecture": architecture, "config": CONFIGS[architecture], "context": 32},
        pretrain__isolate_documents=isolate,
    )
    found = losses(folder)
    assert found[STEPS] < found[1] - 0.3
    counted = json.loads((folder / "plan.json").read_text())["num_parameters"]
    exported = {name: tensor.size for name, tensor in weights(folder).items() if name not in BUFFERS}
    assert counted == sum(exported.values()), "the plan counts what is built"


def test_an_architecture_that_cannot_keep_documents_apart_is_refused(tmp_path):
    with pytest.raises(UsageError, match="mamba2 does not keep documents in a row apart"):
        pretrain(
            tmp_path,
            pretrain__model={"architecture": "mamba2", "config": CONFIGS["mamba2"], "context": 32},
            pretrain__isolate_documents=True,
        )


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
