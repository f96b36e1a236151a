"""The loop against a plain reference, against itself in other splits, and its export against transformers."""

import json
import socket
import subprocess

import pytest
import torch
from torch.nn import functional
from training import STEPS, command, losses, options, pretrain, recipe, start, weights

from llmkit.data.order import RowOrder
from llmkit.data.rows import Rows
from llmkit.data.shards import TokenShards
from llmkit.models.build import build_model
from llmkit.optim import lr_at, parameter_groups
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import evaluate


def rows_of(folder):
    """The run's training rows in order, as tokens [rows, context + 1]."""
    card = json.loads((folder / "data.json").read_text())
    shards = [TokenShards.open(folder.parents[1] / ".cache/shards" / s["address"]) for s in card["sources"]]
    return Rows([shard.split("train") for shard in shards], 32)


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    assert a.keys(), "no losses were recorded"
    worst = max(abs(a[step] - b[step]) for step in a)
    assert worst <= tolerance, f"losses differ by {worst}"


def test_twenty_steps_equal_a_plain_loop_in_pytorch(tmp_path):
    """Independent of the loop: whole-batch forward, full logits, mean loss, torch's own clipping and AdamW."""
    folder = pretrain(tmp_path, pretrain__model__dropout=0.0, machine__micro_batch=2)
    made = load_recipe(recipe(tmp_path, pretrain__model__dropout=0.0)).recipe
    section = made.pretrain
    vocabulary = json.loads((folder / "plan.json").read_text())["vocab_size"]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = build_model(section.model, "causal", vocab_size=vocabulary, special_ids=special, seed=7)
    optim = section.train.optim
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), lr=1.0, betas=optim.betas, eps=optim.eps)
    rows = rows_of(folder)
    order = RowOrder(rows.sizes, None, 7)
    expected = {}
    for step in range(STEPS):
        taken = rows.take(*order.locate(range(step * 8, step * 8 + 8)))
        ids = torch.stack([torch.from_numpy(row["ids"]) for row in taken])
        logits = model(input_ids=ids[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, optim, num_steps=STEPS, warmup_steps=2)
        optimizer.step()
        optimizer.zero_grad()
        expected[step + 1] = loss.item()
    close(losses(folder), expected, 1e-5)


def test_sixteen_rows_at_once_equal_four_times_four(tmp_path):
    batch = {"pretrain__train__batch": "16 samples", "pretrain__model__dropout": 0.0}
    once = pretrain(tmp_path, "once", machine__micro_batch=16, **batch)
    accumulated = pretrain(tmp_path, "accumulated", machine__micro_batch=4, **batch)
    close(losses(once), losses(accumulated), 1e-5)
    assert losses(once) != losses(accumulated), "the same to the last bit: was anything accumulated?"


@pytest.mark.parametrize("isolate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_equal_one(tmp_path, isolate):
    """With dropout, and with rows of unequal numbers of targets when documents are isolated."""
    changes = {"machine__micro_batch": 2, "pretrain__isolate_documents": isolate}
    one = pretrain(tmp_path, "one", **changes)
    words = command(tmp_path, "two", "--processes", "2", "-q", **changes)
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "runs" / "two" / "pretrain"
    assert done.stdout.strip() == str(two)
    assert json.loads((two / "plan.json").read_text())["world_size"] == 2
    close(losses(one), losses(two), 1e-5)
    close(losses(one, "eval/loss"), losses(two, "eval/loss"), 1e-5)


def test_the_export_loads_in_plain_transformers_with_the_loss_that_eval_reports(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pretrain(tmp_path)
    result = evaluate(str(folder), None, options(tmp_path), make_reporter(quiet=True))
    reported = result.summary["metrics"]["loss"]
    assert reported == pytest.approx(losses(folder, "eval/loss")[STEPS], abs=1e-6)

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) == model.config.vocab_size
    card = json.loads((folder / "data.json").read_text())
    stream = TokenShards.open(tmp_path / "runs/.cache/shards" / card["sources"][0]["address"]).split(
        "held_out"
    )
    tokens = torch.from_numpy(stream.read(0, stream.num_tokens).astype("int64"))
    total = targets = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            row = tokens[start : start + 33].unsqueeze(0)
            # transformers' own loss: the mean over the row's len - 1 shifted targets.
            total += float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
            targets += row.shape[1] - 1
    assert targets == len(tokens) - 1
    assert reported == pytest.approx(total / targets, abs=1e-4)


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    same = [weights(pretrain(tmp_path, name, pretrain__train__length="1 steps")) for name in ("a", "b")]
    other = weights(pretrain(tmp_path, "c", pretrain__train__length="1 steps", seed=8))
    assert all((same[0][key] == same[1][key]).all() for key in same[0])
    assert any((same[0][key] != other[key]).any() for key in other)


@pytest.mark.slow
def test_another_launchers_two_processes_do_the_whole_recipe_together(tmp_path):
    """As torchrun or srun would start them: one environment each, no parent of ours."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command(tmp_path, "pair", "--json", machine__micro_batch=2)
    words[words.index("pretrain")] = "run"
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pair = [start(words, RANK=str(n), LOCAL_RANK=str(n), GLOO_SOCKET_IFNAME="lo", **world) for n in (0, 1)]
    said = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert said[1][0] == "", "only the first speaks"
    result = json.loads(said[0][0])
    assert result["eval"]["metrics"]["loss"] == pytest.approx(
        result["pretrain"]["metrics"]["eval/loss"], abs=1e-5
    )
    one = pretrain(tmp_path, "one", machine__micro_batch=2)
    close(losses(one), losses(tmp_path / "runs" / "pair" / "pretrain"), 1e-5)
