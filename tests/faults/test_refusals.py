"""What cannot go on says why, loses nothing, and ends with the right code."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from training import command, losses, pretrain, same_bits, start, weights

from llmkit.durable import verify_folder
from llmkit.errors import RunError, UsageError
from llmkit.train.first_step import naming_out_of_memory

LONG = {"pretrain__train__length": "4000 steps", "pretrain__checkpoint__every": "100 steps"}


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    words = command(tmp_path, **LONG)
    first = start(words)
    folder = tmp_path / "runs" / "tiny" / "pretrain"
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 1
    assert f"another run writes here (pid {first.pid}" in second.stderr
    assert first.poll() is None
    first.terminate()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 75, err


def test_a_full_disk_is_named_and_when_there_is_room_the_run_goes_on(tmp_path, small_disk):
    changes = {"pretrain__checkpoint__every": "1 steps", "pretrain__checkpoint__keep": 100}
    whole = pretrain(tmp_path, "whole", **changes)
    words = command(tmp_path, "full", **changes)
    words[words.index("--runs") + 1] = str(small_disk)
    folder = small_disk / "full" / "pretrain"
    failed = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 1
    assert "no space left on the disk while writing" in failed.stderr
    saved = sorted((folder / "checkpoints").glob("step_*"))
    assert saved
    for path in saved:
        verify_folder(path)
    assert not list((folder / "checkpoints").glob(".*tmp*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"from {saved[-1].name}" in again.stderr
    assert same_bits(weights(whole), weights(folder))


def test_a_disk_that_will_not_hold_the_checkpoints_is_told_before_the_first_step(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300_000))
    pretrain(tmp_path)
    assert "0 MB are free on this disk, and checkpoints and model will take about" in capsys.readouterr().err


def test_a_run_that_failed_or_was_stopped_has_a_report_that_says_so(tmp_path):
    with pytest.raises(RunError):
        pretrain(tmp_path, pretrain__train__optim__lr=1e30, pretrain__train__grad_clip=None)
    report = json.loads((tmp_path / "runs/tiny/pretrain/report.json").read_text())
    assert report["status"] == "failed"
    assert "not finite" in report["error"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_was_tried_and_what_to_lower(error):
    plan = SimpleNamespace(
        micro_batch_size=8, context=512, device="cuda", memory=SimpleNamespace(total=12_000_000_000)
    )
    with (
        pytest.raises(RunError, match=r"with 8 rows of 512 tokens.*12\.0 GB") as caught,
        naming_out_of_memory(plan),
    ):
        raise error
    assert "machine.micro_batch=4" in caught.value.hint
    with pytest.raises(RuntimeError, match="something else"), naming_out_of_memory(plan):
        raise RuntimeError("something else")


def test_a_batch_that_processes_cannot_share_names_what_fits(tmp_path):
    words = command(tmp_path, "odd", "--processes", "3", machine__micro_batch="auto")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "8 rows" in done.stderr
    assert "3 processes" in done.stderr
    assert not (tmp_path / "runs" / "odd").exists(), "refused before anything was written"


def test_a_context_longer_than_the_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="fewer than the"):
        pretrain(tmp_path, pretrain__model__context=60_000)


def test_a_misspelt_field_of_the_models_configuration_is_refused(tmp_path):
    with pytest.raises(UsageError, match="llama has no field 'num_layers_hidden'"):
        pretrain(tmp_path, pretrain__model__config__num_layers_hidden=3)


def test_one_process_of_a_world_of_two_does_not_train_alone(tmp_path):
    """Started by hand with half an environment, it must not do half the work and call it done."""
    words = command(tmp_path)
    env = {**os.environ, "RANK": "0"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 1
    assert "WORLD_SIZE" in done.stderr


def test_a_length_in_seconds_becomes_steps_once(tmp_path):
    folder = pretrain(tmp_path, pretrain__train__length="2s", pretrain__train__optim__warmup="10%")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["num_steps"] > 3
    assert plan["warmup_steps"] == pytest.approx(plan["num_steps"] / 10, abs=1)
    assert max(losses(folder)) == plan["num_steps"]
