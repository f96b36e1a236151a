"""From the command line: a sharded run whose worker is killed goes on by the same command, and leaves a plain model."""

import os

import pytest
import torch
from layouts import LLAMA, SHORT, figures, plan_of
from training import command, same_bits, start, weights
from transformers import AutoModelForCausalLM

SETTINGS = {**SHORT, "machine__background_save": False}
"""What was saved before a worker is killed is on the disk by then."""


def run(folder, name, *words, **env):
    """The command's exit code, and its words."""
    process = start(command(folder, name, "-q", "--processes", "2", *words, **SETTINGS), **env)
    try:
        _, said = process.communicate(timeout=280)
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "{tensor: 2}"])
def test_a_killed_worker_of_a_shared_model(tmp_path, layout):
    words = [f"machine.parallel={layout}"]
    code, said = run(tmp_path, "whole", *words)
    assert code == 0, said
    code, said = run(tmp_path, "killed", *words, LLMKIT_KILL_AT="3")
    assert code == 1, said
    assert "the same command goes on from step 2" in said
    cut = tmp_path / "runs/killed/pretrain"
    assert (cut / "checkpoints/step_00000002/model.rank-00001.safetensors").exists()
    code, said = run(tmp_path, "killed", *words)
    assert code == 0, said
    whole = tmp_path / "runs/whole/pretrain"
    shared = {"shard": 2} if layout == "fsdp" else {"tensor": 2}
    assert plan_of(cut)["parallel"] == plan_of(whole)["parallel"]
    assert plan_of(cut)["parallel"].items() >= shared.items()
    assert figures(cut, "train/loss") == figures(whole, "train/loss")
    assert same_bits(weights(cut), weights(whole))
    model = AutoModelForCausalLM.from_pretrained(cut / "model", dtype=torch.float32, trust_remote_code=False)
    assert model.config.num_attention_heads == LLAMA["num_attention_heads"]
    assert model(torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.slow
def test_processes_that_do_not_come_to_the_layout_are_refused(tmp_path):
    code, said = run(tmp_path, "refused", "machine.parallel={shard: 3}")
    assert code == 2, said
    assert "{shard: 3} does not come to 2 processes" in said
    assert not os.path.exists(tmp_path / "runs/refused/pretrain/checkpoints")
