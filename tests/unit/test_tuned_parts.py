"""Whole runs in which a part of the model learns: what stays has the same bits, what is merged predicts the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tuning import STEPS, TASKS, finetune, model

from llmkit.errors import GateError, MissingError, UsageError

LORA = {"method": "lora", "rank": 2}


def weights(folder, name="model"):
    return load_file(folder / "model" / "model.safetensors") if name == "model" else load_file(folder / name)


def report(folder):
    return json.loads((folder / "report.json").read_bytes())


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def saved(folder, step=STEPS):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def test_what_is_frozen_has_the_bits_that_it_had(tmp_path):
    before = load_file(f"{model('bert')}/model.safetensors")
    run = finetune(tmp_path, "cls", finetune__freeze={"layers": 1})
    after = weights(run)
    frozen = {name for name in before if "embeddings" in name or ".layer.0." in name} & after.keys()
    learned = {name for name in before if ".layer.1." in name}
    assert len(frozen) == 21
    assert all(same(before[name], after[name]) for name in frozen)
    # A key's bias shifts all scores of a query alike, so it has no gradient but rounding's.
    assert not any(same(before[name], after[name]) for name in learned if "key.bias" not in name)
    assert not set(saved(run)) & frozen
    assert set(saved(run)) == set(after) - frozen
    assert report(run)["model"]["num_trained"] == sum(after[name].numel() for name in set(after) - frozen)
    assert report(run)["plan"]["num_trained"] == report(run)["model"]["num_trained"]


def test_with_all_but_the_head_frozen_only_the_head_moves(tmp_path):
    before = load_file(f"{model('bert')}/model.safetensors")
    run = finetune(tmp_path, "cls", finetune__freeze={"all_but": "head"})
    after = weights(run)
    assert all(same(before[name], after[name]) for name in before.keys() & after.keys())
    assert set(saved(run)) == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }


def test_layers_thaw_from_the_top_and_what_has_not_thawed_keeps_its_bits(tmp_path):
    before = load_file(f"{model('bert')}/model.safetensors")
    run = finetune(
        tmp_path,
        "cls",
        finetune__unfreeze={"every": "2 steps"},
        finetune__checkpoint={"every": "1 steps", "keep": 10},
    )

    def moved(step):
        now = saved(run, step)
        return {
            part
            for part in ("layer.0.", "layer.1.", "embeddings.")
            for name in before.keys() & now.keys()
            if part in name and not same(before[name], now[name])
        }

    assert [moved(step) for step in (2, 3, 4, 5, 6)] == [
        set(),
        {"layer.1."},
        {"layer.1."},
        {"layer.1.", "layer.0."},
        {"layer.1.", "layer.0."},
    ]
    notes = report(run)["plan"]["notes"]
    assert "unfreeze: never in these 6 steps: the embeddings" in notes


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_an_adapter_and_the_merged_model_predicts_as_with_it(tmp_path, task):
    short = {"finetune__train__length": "2 steps", "finetune__eval": {"every": "never"}}
    run = finetune(tmp_path, task, finetune__adapter=LORA, **short)
    found = report(run)
    assert 0 <= found["adapter"]["merged_kl"] < 1e-5
    assert found["plan"]["num_trained"] == found["model"]["num_trained"]
    assert found["model"]["num_trained"] < found["plan"]["num_parameters"] / 3
    assert not any("lora" in name or "original" in name for name in weights(run))


def test_peft_itself_reads_the_adapter_and_computes_what_the_merged_model_does(tmp_path):
    from peft import PeftModel

    run = finetune(tmp_path, "cls", finetune__adapter={**LORA, "method": "dora"})
    merged = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    base = AutoModelForSequenceClassification.from_pretrained(model("bert"), num_labels=5)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    rows = tokenizer(["the red cat lives in Rome", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(adapted(**rows).logits, merged(**rows).logits, atol=1e-5, rtol=1e-5)
    config = json.loads((run / "adapter" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == model("bert")


def test_a_merge_that_changes_the_model_is_not_exported(tmp_path, monkeypatch):
    from llmkit.models import merging

    plain = merging._merged

    def wrong(layer):
        found = plain(layer)
        layer.get_base_layer().weight.data *= -2
        return found

    monkeypatch.setattr(merging, "_merged", wrong)
    strict = {**LORA, "max_kl": 1e-7}  # of a model that has learned nothing yet, all predictions are near
    with pytest.raises(GateError, match="merging the adapter changes the model"):
        finetune(tmp_path, "cls", finetune__adapter=strict)
    folder = tmp_path / "runs" / "cls" / "finetune"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not (folder / "model").exists()
    # What the error offers exports the same checkpoints.
    last = folder / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors"
    before = last.stat().st_mtime_ns
    finetune(tmp_path, "cls", finetune__adapter={**strict, "merge": False})
    assert report(folder)["status"] == "done"
    assert not (folder / "model").exists()
    monkeypatch.undo()
    finetune(tmp_path, "cls", finetune__adapter={**LORA, "max_kl": 0.1})
    assert (folder / "model" / "model.safetensors").exists(), "a merged model was asked for, and is not there"
    assert last.stat().st_mtime_ns == before, "trained again"


@pytest.mark.parametrize(
    ("task", "targets"), [("sft", "lm_head|q_proj"), ("sft", "lm_head"), ("seq2seq", "lm_head")]
)
def test_an_adapter_of_the_output_layer_learns(tmp_path, task, targets):
    short = {"finetune__train__length": "2 steps", "finetune__eval": {"every": "never"}}
    run = finetune(tmp_path, task, finetune__adapter={**LORA, "targets": targets, "merge": False}, **short)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    second = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
    assert any("lm_head" in name for name in second)
    assert all(tensor.abs().max() > 0 for tensor in second.values())


def test_an_adapter_alone_is_a_finished_run(tmp_path, capsys):
    alone = {**LORA, "merge": False}
    run = finetune(tmp_path, "cls", finetune__adapter=alone)
    assert not (run / "model").exists()
    before = (run / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    finetune(tmp_path, "cls", finetune__adapter=alone)
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before, "trained again"


PARTS = {
    "adapter": {"finetune__adapter": {**LORA, "dropout": 0.1}},
    "thawing": {"finetune__unfreeze": {"every": "2 steps"}, "finetune__lr_decay": 0.5},
    "frozen": {"finetune__freeze": {"layers": 1}, "finetune__train__ema": 0.9},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_resumed_it_ends_with_the_same_bits(tmp_path, parts):
    whole = finetune(tmp_path, "cls", **parts)
    before = weights(whole)
    metrics = (whole / "metrics.jsonl").read_text().splitlines()
    (whole / "model" / "manifest.json").unlink()
    for step in (4, 6):
        shutil.rmtree(whole / "checkpoints" / f"step_{step:08d}")
    again = finetune(tmp_path, "cls", **parts)
    after = weights(again)
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)

    def losses(lines):
        return [json.loads(line).get("train/loss") for line in lines]

    assert losses(metrics) == losses((again / "metrics.jsonl").read_text().splitlines())


def test_few_bits_need_a_gpu_and_that_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(MissingError, match="qlora: a base in few bits needs an NVIDIA GPU") as caught:
        finetune(tmp_path, "cls", finetune__adapter={"method": "qlora"})
    assert caught.value.hint == "finetune.adapter.method=lora"
    assert not (tmp_path / "runs" / "cls" / "finetune" / "checkpoints").exists()


def test_a_schedule_of_thawing_needs_a_length_in_steps(tmp_path):
    with pytest.raises(UsageError, match=r"unfreeze\.every is 10% of a run whose length is a time"):
        finetune(tmp_path, "cls", finetune__unfreeze={}, finetune__train__length="5s")
