"""The micro-batch found by trying: the right one in few trials, agreed on, and nothing else has changed."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import MISSING, fields
from types import SimpleNamespace

import objectives
import pytest
import torch
import training
import tuning
from accelerate import Accelerator

from llmkit.models.build import build_model
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import LossModule
from llmkit.plan import Plan
from llmkit.plan.batch import divisors
from llmkit.plan.memory import Memory
from llmkit.recipe.machine import Machine
from llmkit.recipe.schema import Model
from llmkit.train import pretrain, trial
from llmkit.train.trial import Try, largest_that_fits, sizes_of, try_sizes, wants_trial, with_rows


def plan(rows=96, micro=8, world=1, tokens=0, device="cuda", **changes):
    needed = (
        field for field in fields(Plan) if field.default is MISSING and field.default_factory is MISSING
    )
    numbers = {field.name: 0 for field in needed}
    memory = Memory(**{field.name: 10 for field in fields(Memory)})
    facts = {
        "device": device,
        "precision": "fp32",
        "compile": False,
        "attention": "sdpa",
        "context": 32,
        "world_size": world,
        "rows_per_step": rows,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": rows // micro // world,
        "tokens_per_step": rows * 32,
        "micro_batch_tokens": tokens,
        "deferred": {},
        "memory": memory,
        "choices": {"machine.micro_batch": (micro, "an estimate")},
        "notes": (),
    }
    return Plan(**{**numbers, **facts, **changes})


@pytest.mark.parametrize("limit", range(0, 97, 3))
@pytest.mark.parametrize("planned", [1, 8, 96])
def test_the_largest_size_that_fits_is_found_in_few_trials(limit, planned):
    sizes, tried = divisors(96), []

    def attempt(rows):
        tried.append(rows)
        return Try(rows <= limit)

    found, seen = largest_that_fits(sizes, planned, attempt)
    assert found == max((size for size in sizes if size <= limit), default=None)
    assert list(seen) == tried
    assert len(set(tried)) == len(tried) <= 1 + math.ceil(math.log2(len(sizes) + 1))
    assert tried[0] == planned


def test_sizes_are_what_divides_or_powers_of_two():
    assert sizes_of(plan(rows=24, micro=4)) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert sizes_of(plan(rows=24, micro=4, device="cpu")) == [1, 2, 3, 4]
    assert sizes_of(plan(rows=20, micro=9, tokens=3 * 32)) == [1, 2, 3, 4, 8, 16]


def test_a_size_changes_what_follows_from_it():
    one = with_rows(plan(rows=96, micro=8, world=2), 16)
    assert (one.micro_batch_size, one.gradient_accumulation_steps) == (16, 3)
    other = with_rows(plan(rows=96, micro=8, tokens=64), 8)
    assert other.micro_batch_tokens == 256
    assert other.gradient_accumulation_steps == 12


def test_a_trial_is_for_a_new_run_on_a_gpu_or_what_does_not_fit(monkeypatch):
    assert wants_trial(plan(), Machine(), resumes=False)
    assert not wants_trial(plan(), Machine(), resumes=True)
    assert not wants_trial(plan(), Machine(micro_batch=4), resumes=False)
    assert not wants_trial(plan(device="cpu"), Machine(), resumes=False)
    monkeypatch.setattr(trial, "usable_memory", lambda: 9)
    assert wants_trial(plan(device="cpu"), Machine(), resumes=False)


def core_that_holds(rows, error=torch.OutOfMemoryError):
    """A model with dropout that runs out of memory above so many rows: at once, or in its backward pass."""
    config = {**objectives.TINY["causal"], "attention_dropout": 0.1}
    spec = Model(config=config, context=objectives.CONTEXT)
    model = build_model(spec, "causal", vocab_size=objectives.VOCAB_SIZE, special_ids={}, seed=1)
    choose_heads(model, "causal")
    core = LossModule(model, objectives.make("clm"), bf16=False)

    def explode(_):
        raise error(
            "CUDA out of memory" if error is torch.OutOfMemoryError else "can't allocate memory: 9 TB"
        )

    def watch(module, given, output):
        if len(given[0]["targets"]) > rows:
            next(iter(output.totals.values())).register_hook(explode)

    core.register_forward_hook(watch)
    return core


def batch_of(asked):
    ids = torch.arange(asked.micro_batch_size * 32).view(-1, 32) % objectives.VOCAB_SIZE
    return {"input_ids": ids, "targets": ids, "num_targets": torch.tensor(ids.numel())}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("planned", [4, 48])
def test_the_trial_finds_the_size_and_leaves_no_trace(error, planned):
    core = core_that_holds(12, error)
    core.eval()
    before = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    state = torch.get_rng_state()
    found = try_sizes(plan(micro=planned), core, Accelerator(cpu=True), batch_of, state_bytes=8)
    assert found.micro_batch_size == 12
    assert found.gradient_accumulation_steps == 8
    assert found.choices["machine.micro_batch"] == (12, "tried: 12 rows fit, 16 do not")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in core.state_dict().items())
    assert all(p.grad is None for p in core.parameters())
    assert not core.training
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))).micro_batch_size == 12


def test_where_nothing_fits_the_smallest_is_left_to_the_first_step():
    found = try_sizes(plan(micro=8), core_that_holds(0), Accelerator(cpu=True), batch_of, state_bytes=8)
    assert found.micro_batch_size == 1
    assert found.choices["machine.micro_batch"][1].startswith("tried: not even 1 row(s) fit")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    core = core_that_holds(96)
    core.register_forward_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        try_sizes(plan(), core, Accelerator(cpu=True), batch_of, state_bytes=8)


def test_a_shared_model_is_not_tried():
    shared = plan(parallel={"replicate": 1, "shard": 2, "tensor": 1, "expert": 1, "context": 1}, world=2)
    found = try_sizes(shared, core_that_holds(1), SimpleNamespace(), batch_of, state_bytes=8)
    assert found.micro_batch_size == 8
    assert "meet in every layer" in found.choices["machine.micro_batch"][1]


@pytest.mark.parametrize("task", ["", pytest.param("cls", marks=pytest.mark.slow)])
def test_a_run_tells_what_fits_and_keeps_it_when_it_goes_on(task, tmp_path, monkeypatch):
    """Two rows of full length fit: the result is that of a run whose recipe says so."""
    context = tuning.CONTEXT if task else objectives.CONTEXT

    def attempt(core, device, make, held_bytes, limit):
        return Try(make()["input_ids"].numel() <= 2 * context)

    def run(name, **changes):
        if task:
            return tuning.finetune(tmp_path, task, name, **changes)
        return training.pretrain(tmp_path, name, **changes)

    pinned = run("pinned", machine__micro_batch=2)
    monkeypatch.setattr(trial, "_attempt", attempt)
    monkeypatch.setattr(
        pretrain,
        "wants_trial",
        lambda plan, machine, *, resumes: machine.micro_batch == "auto" and not resumes,
    )
    folder = run("tried", machine__micro_batch="auto")
    if not task:
        assert training.same_bits(training.weights(folder), training.weights(pinned))
    told = (folder / "resolved.yaml").read_text()
    assert "micro_batch: 2  # tried: 2 rows fit, 4 do not" in told
    plans = [json.loads((folder / "plan.json").read_text())]
    name, size = ("micro_batch_tokens", 2 * context) if task else ("micro_batch_size", 2)
    assert plans[0][name] == size
    before = training.weights(folder)
    shutil.rmtree(folder / "model")
    (folder / "report.json").unlink()
    shutil.rmtree(sorted((folder / "checkpoints").glob("step_*"))[-1])
    monkeypatch.setattr(trial, "_attempt", lambda *_: pytest.fail("tried again"))
    assert run("tried", machine__micro_batch="auto") == folder
    plans.append(json.loads((folder / "plan.json").read_text()))
    for key in ("micro_batch_size", "micro_batch_tokens", "gradient_accumulation_steps"):
        assert plans[1][key] == plans[0][key]
    assert plans[1]["choices"]["machine.micro_batch"] == plans[0]["choices"]["machine.micro_batch"]
    assert (folder / "resolved.yaml").read_text() == told
    assert training.same_bits(training.weights(folder), before)


WORKER = textwrap.dedent("""
    import sys, torch
    from accelerate import Accelerator
    from llmkit.train.trial import try_sizes
    import test_trial
    rank = int(sys.argv[1])
    torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    core = test_trial.core_that_holds((24, 6)[rank])
    found = try_sizes(
        test_trial.plan(world=2), core, Accelerator(cpu=True), test_trial.batch_of, state_bytes=8
    )
    print("found", found.micro_batch_size, found.gradient_accumulation_steps)
    torch.distributed.destroy_process_group()
""")


@pytest.mark.slow
def test_two_processes_take_what_fits_on_both(tmp_path):
    """One has room for 24 rows, the other for 6."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert [line for text in said for line in text.splitlines() if line.startswith("found")] == [
        "found 6 8"
    ] * 2
