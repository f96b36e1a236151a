"""`llmkit verify-resume` passes a run that resumes exactly, and finds one that does not."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from training import recipe

from llmkit.errors import CorruptError, GateError, UsageError
from llmkit.report.console import make_reporter
from llmkit.run import Options
from llmkit.run.compare import compare_records, compare_samples, compare_tensors, read_tensors
from llmkit.run.verify import Verified, verify_resume

HISTORY = """
# What exact runs must not have: dropout seeds that follow from how often this process has asked for one.
import itertools
import llmkit.train.state as state
real, asked = state.mix_seed, itertools.count()
state.mix_seed = lambda *parts: real(parts[0], next(asked))
"""


@pytest.fixture
def project(tmp_path):
    """A recipe file with dropout; what its runs leave is in `runs`."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(recipe(tmp_path)))
    return path


def left_in(runs):
    return sorted(path.name for path in runs.iterdir())


@pytest.mark.slow
def test_an_exact_run_passes_and_leaves_nothing_but_the_prepared_text(project, llmkit):
    done = llmkit("verify-resume", project.name, "--steps", "8", "--json", cwd=project.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert (found["steps"], found["killed_at"]) == (8, 7)
    assert found["resumed_from"] in (4, 6)
    checks = {one["what"]: one for one in found["resumed"]}
    assert all(one["same"] for one in checks.values())
    assert {what: one["compared"] for what, one in checks.items()} == {
        "losses": "8 records",
        "held-out": "3 records",
        "weights": "20 tensors",
        "optimizer": "60 tensors",
        "export": "20 tensors",
        "samples": "3 texts",
    }
    assert left_in(project.parent / "runs") == [".cache"]


def test_a_run_with_a_history_is_found_and_kept(project, llmkit):
    hook = project.parent / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HISTORY)
    env = {"PYTHONPATH": str(hook)}
    done = llmkit("verify-resume", project.name, "--steps", "8", cwd=project.parent, env=env)
    assert done.returncode == 4, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert all("DIFFERS" in lines[what] for what in ("losses", "weights", "optimizer", "export"))
    assert "from step 5 on" in done.stderr or "from step 7 on" in done.stderr, done.stderr
    assert "weights: lm_head" in done.stderr or "weights: model." in done.stderr, done.stderr
    kept = project.parent / "runs" / "tiny" / "verify-resume"
    assert str(kept.relative_to(project.parent)) in done.stderr
    assert left_in(kept) == ["killed", "whole"]
    assert (kept / "whole" / "tiny" / "pretrain" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_on_another_number_of_processes_losses_are_equal_to_rounding(project, llmkit):
    words = ("--steps", "8", "--other-processes", "2", "--json", "machine.micro_batch=2")
    done = llmkit("verify-resume", project.name, *words, cwd=project.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["other_processes"] == 2
    losses = next(one for one in found["elsewhere"] if one["what"] == "losses")
    assert losses["largest"] <= found["tolerances"]["losses"]


def test_a_run_that_fails_by_itself_says_why(project, llmkit):
    words = ("pretrain.train.optim.lr=1e30", "pretrain.train.grad_clip=null")
    done = llmkit("verify-resume", project.name, *words, cwd=project.parent)
    assert done.returncode == 1
    assert "1 of 3: without a break: the run ended by itself with exit code 1" in done.stderr
    assert "not finite" in done.stderr
    assert left_in(project.parent / "runs") == [".cache"]


@pytest.mark.parametrize(
    ("word", "changes", "said"),
    [
        ("-", {}, "stdin cannot hold it"),
        ("tiny.json", {"steps": 7}, "--steps 7: at least 8"),
        ("tiny.json", {"other_processes": 3}, "cannot share the 8 rows"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_anything_runs(project, monkeypatch, word, changes, said):
    monkeypatch.chdir(project.parent)
    monkeypatch.setattr("llmkit.run.verify.load_recipe", load_anything(project))
    with pytest.raises(UsageError, match=said):
        verify_resume(word, (), Options(), make_reporter(quiet=True), **{"steps": 8, **changes})
    assert not (project.parent / "runs").exists()


def load_anything(project):
    from llmkit.recipe import load_recipe

    return lambda *_, **words: load_recipe(project, **words)


# The comparison.


def folder_of(path, tensors, records=(), samples=()):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    for name, rows in (("metrics.jsonl", records), ("samples.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(4, np.float32),
    "c": np.arange(3),
}


@pytest.mark.parametrize(
    ("change", "first", "largest"),
    [
        ({}, "", 0.0),
        ({"b": np.float32([0, 0, -0.0, 0])}, "b differs by 0.00e+00", 0.0),
        ({"b": np.float32([0, 0, 0.5, 0])}, "b differs by 5.00e-01", 0.5),
        ({"a": TENSORS["a"] + 2, "b": np.ones(4, np.float32)}, "a differs by 2.00e+00, and 1 more", 2.0),
        ({"b": np.float32([0, 0, np.nan, 0])}, "b differs by inf", math.inf),
        ({"b": np.zeros(4, np.float16)}, "b differs by inf", math.inf),
        ({"a": TENSORS["a"].reshape(3, 2)}, "a differs by inf", math.inf),
        ({"c": np.array([0, 1, 3])}, "c differs by inf", math.inf),
        ({"d": np.zeros(1)}, "only one of the runs has d", math.inf),
    ],
)
def test_every_bit_of_a_tensor_counts(tmp_path, change, first, largest):
    one = folder_of(tmp_path / "one", TENSORS)
    other = folder_of(tmp_path / "other", {**TENSORS, **change})
    found = compare_tensors(one, other, what="weights", files="model*.safetensors")
    assert (found.first, found.largest, found.same) == (first, largest, not first)


def test_bfloat16_is_compared_as_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    for name, value in (("one", 1.0), ("other", 1.5)):
        (tmp_path / name).mkdir()
        save({"a": torch.full((3,), value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    found = compare_tensors(tmp_path / "one", tmp_path / "other", what="weights", files="*.safetensors")
    assert found.largest == 0.5


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = folder_of(tmp_path / "one", TENSORS)
    (folder / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{nope")
    with pytest.raises(CorruptError, match=r"model\.safetensors: not readable"):
        read_tensors(folder, "model*.safetensors")
    with pytest.raises(CorruptError, match="there is no optimizer"):
        read_tensors(folder, "optimizer*.safetensors")


RECORDS = [{"step": s, "elapsed_s": s * 1.5, "train/loss": 5.0 - s, "train/lr": 0.1} for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "first", "step"),
    [
        ({"elapsed_s": 99.0, "tokens_per_s": 1.0}, "", None),
        ({"train/loss": 3.5}, "step 2: train/loss is 3.0 and 3.5", 2),
        ({"train/lr": 0.2}, "step 2: train/lr is 0.1 and 0.2", 2),
        ({"train/loss": None}, "step 2: train/loss is 3.0 and None", 2),
        ({"step": 7}, "only one of the runs has a record of step 2", 2),
    ],
)
def test_every_figure_but_times_counts(tmp_path, change, first, step):
    one = folder_of(tmp_path / "one", TENSORS, RECORDS)
    other = folder_of(tmp_path / "other", TENSORS, [RECORDS[0], {**RECORDS[1], **change}, RECORDS[2]])
    found = compare_records(one, other, what="losses", key="train/loss")
    assert (found.first, found.step) == (first, step)
    assert found.compared == "3 records"


def test_samples_are_compared_in_order(tmp_path):
    made = [{"step": 4, "prompt": "a", "text": "b"}, {"step": 8, "prompt": "a", "text": "c"}]
    one = folder_of(tmp_path / "one", TENSORS, samples=made)
    assert compare_samples(one, one).same
    other = folder_of(tmp_path / "other", TENSORS, samples=[made[0], {**made[1], "text": "d"}])
    assert compare_samples(one, other).step == 8
    shutil.rmtree(other)
    assert not compare_samples(one, folder_of(tmp_path / "other", TENSORS, samples=made[:1])).same


def test_elsewhere_counts_what_has_a_tolerance(tmp_path):
    one = folder_of(tmp_path / "one", TENSORS, RECORDS)
    near = folder_of(
        tmp_path / "near", TENSORS, [{**row, "train/loss": row["train/loss"] * 1.00001} for row in RECORDS]
    )
    finding = compare_records(one, near, what="losses", key="train/loss")
    facts = {"steps": 8, "saved_at": 4, "killed_at": 7, "processes": 1, "resumed": [], "other_processes": 2}
    within = Verified(**facts, elsewhere=[finding], tolerances={"losses": 1e-4})
    within.check()
    with pytest.raises(GateError, match=r"from step 1 on: losses: step 1: train/loss is 4\.0"):
        Verified(**facts, elsewhere=[finding], tolerances={"losses": 1e-6}).check()
    with pytest.raises(GateError):
        Verified(**{**facts, "resumed": [finding]}, elsewhere=[], tolerances={"losses": 1.0}).check()
