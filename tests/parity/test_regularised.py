"""Regularisation and averages in a whole run: against a plain loop, resumed, and on two processes."""

import json
import shutil
import subprocess

import pytest
import torch
from test_training import close, rows_of
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import STEPS, command, losses, options, pretrain, recipe, same_bits, weights

from llmkit.data.order import RowOrder
from llmkit.models.build import build_model
from llmkit.optim import add_noise, lr_at, parameter_groups
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import evaluate

ALL = {
    "pretrain__train__label_smoothing": 0.1,
    "pretrain__train__z_loss": 1e-3,
    "pretrain__train__l1": 1e-3,
    "pretrain__train__gradient_noise": 0.02,
    "pretrain__train__ema": 0.8,
}


def loss_of(model, ids, *, smoothing=0.0, z=0.0):
    logits = model(input_ids=ids[:, :-1]).logits.flatten(0, 1)
    plain = functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=smoothing)
    return plain + z * torch.logsumexp(logits, 1).square().mean()


def test_twenty_steps_with_everything_equal_a_plain_loop(tmp_path):
    """Smoothing, z-loss, clipping, L1, noise and the average, as torch has them or as they are written."""
    changes = {**ALL, "pretrain__model__dropout": 0.0}
    folder = pretrain(tmp_path, machine__micro_batch=2, **changes)
    section = load_recipe(recipe(tmp_path, **changes)).recipe.pretrain
    vocabulary = json.loads((folder / "plan.json").read_text())["vocab_size"]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = build_model(section.model, "causal", vocab_size=vocabulary, special_ids=special, seed=7)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optim = section.train.optim
    groups = parameter_groups(model, optim)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=optim.betas, eps=optim.eps)
    rows = rows_of(folder)
    order = RowOrder(rows.sizes, None, 7)
    expected = {}
    for step in range(STEPS):
        taken = rows.take(*order.locate(range(step * 8, step * 8 + 8)))
        ids = torch.stack([torch.from_numpy(row["ids"]) for row in taken])
        loss = loss_of(model, ids, smoothing=0.1, z=1e-3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter in groups[0]["params"]:
            parameter.grad += 1e-3 * parameter.detach().sign()
        add_noise(model, 0.02, seed=7, step=step)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, optim, num_steps=STEPS, warmup_steps=2)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        expected[step + 1] = loss.item()
    close(losses(folder), expected, 1e-5)
    exported = weights(folder)
    assert distance(exported, average.module) < 1e-4
    assert distance(exported, model) > 2e-3


def distance(exported, model):
    pairs = ((torch.from_numpy(exported[name]), p.detach()) for name, p in model.named_parameters())
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(ALL, id="adamw"),
        pytest.param({**ALL, "pretrain__train__optim": {"name": "muon", "lr": 1e-2}}, id="muon"),
        pytest.param({"pretrain__train__optim": {"name": "schedule_free", "lr": 1e-2}}, id="schedule_free"),
        pytest.param({"pretrain__train__optim": {"name": "adamw8bit", "lr": 1e-2}}, id="adamw8bit"),
    ],
)
def test_resumed_it_ends_with_the_same_bits(tmp_path, changes):
    folder = pretrain(tmp_path, **changes)
    whole = weights(folder), losses(folder), losses(folder, "eval/loss")
    shutil.rmtree(folder / "model")
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 10:
            shutil.rmtree(path)
    (folder / "report.json").unlink()
    assert pretrain(tmp_path, **changes) == folder
    assert same_bits(weights(folder), whole[0])
    assert (losses(folder), losses(folder, "eval/loss")) == whole[1:]


def test_the_average_is_what_is_measured_and_exported_and_by_the_plain_loss(tmp_path):
    changes = {"label_smoothing": 0.3, "z_loss": 0.1, "ema": 0.9}
    folder = pretrain(
        tmp_path, "all", **{f"pretrain__train__{name}": value for name, value in changes.items()}
    )
    exported = evaluate(str(folder), None, options(tmp_path), make_reporter(quiet=True))
    measured = losses(folder, "eval/loss")
    assert exported.summary["metrics"]["loss"] == pytest.approx(measured[STEPS], abs=1e-6)
    plain = losses(pretrain(tmp_path, "plain"), "eval/loss")
    assert measured[0] == plain[0]  # before the first step: the same weights, and no smoothing in it
    assert measured[STEPS] != pytest.approx(plain[STEPS], abs=0.01)
    assert losses(folder)[1] > measured[0] + 1  # the z-loss of 400 equal logits: 0.1 * 6 ** 2


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one = pretrain(tmp_path, "one", machine__micro_batch=2, **ALL)
    words = command(tmp_path, "two", "--processes", "2", "-q", machine__micro_batch=2, **ALL)
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "runs" / "two" / "pretrain"
    close(losses(one), losses(two), 1e-5)
    close(losses(one, "eval/loss"), losses(two, "eval/loss"), 1e-5)
