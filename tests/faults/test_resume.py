"""A run that is stopped in any way and started again ends with the weights of one that was not stopped."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from training import STEPS, command, losses, pretrain, same_bits, start, weights

from llmkit.durable import verify_folder
from llmkit.errors import CorruptError, RunError

SLOW = {
    "pretrain__train__length": "150 steps",
    "pretrain__checkpoint__every": "15 steps",
    "pretrain__eval__every": "50 steps",
}
CELLS = [
    pytest.param({"machine__micro_batch": 8}, id="whole"),
    pytest.param({"machine__micro_batch": 2}, id="accumulated", marks=pytest.mark.slow),
]


def wait_for_checkpoint(folder, process, at_least):
    """Wait until a checkpoint of that many steps is there, while the run goes on."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step_*")]
        if steps and max(steps) >= at_least:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint: {process.communicate(timeout=10)}")


def run_to_the_end(words):
    process = start(words)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize("changes", CELLS)
def test_killed_at_any_step_it_ends_with_the_same_bits(tmp_path, changes):
    whole = pretrain(tmp_path, "whole", **SLOW, **changes)
    words = command(tmp_path, "killed", **SLOW, **changes)
    folder = tmp_path / "runs" / "killed" / "pretrain"
    for at_least in (15, 60):
        process = start(words)
        wait_for_checkpoint(folder, process, at_least)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "model").exists()
    left_by_a_kill = folder / "checkpoints" / ".step_00000999.tmp-1"
    left_by_a_kill.mkdir()
    _, err = run_to_the_end(words)
    assert not left_by_a_kill.exists()
    assert re.search(r"from step_\d{8}", err), err
    assert same_bits(weights(whole), weights(folder))
    assert losses(whole) == losses(folder)
    assert losses(whole, "eval/loss") == losses(folder, "eval/loss")


NEVER = {**SLOW, "pretrain__checkpoint__every": "never"}  # so what is there, a signal saved


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The weights of a run that nothing happened to."""
    return weights(pretrain(tmp_path_factory.mktemp("untouched"), **NEVER))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_saves_and_leaves_with_its_code_and_the_same_command_goes_on(
    tmp_path, untouched, signum, code
):
    words = command(tmp_path, "stopped", **NEVER)
    folder = tmp_path / "runs" / "stopped" / "pretrain"
    process = start(words)
    deadline = time.monotonic() + 120
    while len(losses(folder) if (folder / "metrics.jsonl").exists() else ()) < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "everything is saved" in err
    (saved,) = (folder / "checkpoints").glob("step_*")
    verify_folder(saved)
    run_to_the_end(words)
    assert same_bits(untouched, weights(folder))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys, file):
    whole = pretrain(tmp_path)
    before = weights(whole)
    (whole / "report.json").unlink()
    (whole / "model" / "manifest.json").unlink()
    path = whole / "checkpoints" / f"step_{STEPS:08d}" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        verify_folder(path.parent)
    again = pretrain(tmp_path)
    err = capsys.readouterr().err
    assert f"step_{STEPS:08d} is damaged and not used" in err
    assert file in err
    assert same_bits(before, weights(again))


def test_when_every_checkpoint_is_damaged_nothing_is_trained_over_them(tmp_path):
    folder = pretrain(tmp_path, pretrain__checkpoint__keep=1)
    (folder / "model" / "manifest.json").unlink()
    for path in (folder / "checkpoints").glob("*/state.json"):
        path.unlink()
    with pytest.raises(CorruptError, match="every checkpoint is damaged"):
        pretrain(tmp_path, pretrain__checkpoint__keep=1)


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path):
    pretrain(tmp_path)
    with pytest.raises(RunError, match=r"pretrain\.train\.optim\.lr: 0\.01 -> 0\.02") as caught:
        pretrain(tmp_path, pretrain__train__optim__lr=0.02)
    assert "--fresh" in caught.value.hint
    pretrain(tmp_path, pretrain__train__optim__lr=0.02, fresh=True)


def test_what_does_not_matter_may_change(tmp_path):
    folder = pretrain(tmp_path)
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    pretrain(tmp_path, pretrain__checkpoint__keep=1, pretrain__prompts=["other"])
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before, "trained again"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text('{"num_steps": 7}')])
def test_the_numbers_a_run_began_with_stand_in_its_checkpoints(tmp_path, damage):
    """A length in seconds is settled once, by measuring: measured again it would be another run."""
    timed = {"pretrain__train__length": "1s", "pretrain__checkpoint": {"every": "20%", "keep": 10}}
    whole = pretrain(tmp_path, **timed)
    before, steps = weights(whole), max(losses(whole))
    (whole / "model" / "manifest.json").unlink()
    for path in sorted((whole / "checkpoints").glob("step_*"))[2:]:
        shutil.rmtree(path)
    damage(whole / "plan.json")
    again = pretrain(tmp_path, **timed)
    assert max(losses(again)) == steps
    assert same_bits(before, weights(again))


def test_oldest_checkpoints_go_and_the_newest_stay(tmp_path):
    folder = pretrain(tmp_path, pretrain__checkpoint__keep=2)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000015", "step_00000020"]


def test_numbers_that_are_not_finite_end_the_run_and_keep_the_last_good_state(tmp_path):
    with pytest.raises(RunError, match=r"step \d+: the loss is .* not finite"):
        pretrain(tmp_path, pretrain__train__optim__lr=1e30, pretrain__train__grad_clip=None)
    folder = tmp_path / "runs" / "tiny" / "pretrain"
    assert not (folder / "model").exists()


def test_a_pretrained_model_resumes_exactly_too(tmp_path):
    """A loaded model comes in evaluation mode: without care its dropout is off until the first evaluation."""
    shape = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "attn_pdrop": 0.2,
        "resid_pdrop": 0.2,
    }
    first = pretrain(tmp_path, "first", pretrain__model={"config": shape, "context": 32})
    changes = {"tokenize": None, "pretrain__model": {"name": str(first / "model"), "context": 32}}
    whole = pretrain(tmp_path, "second", **changes)
    before = weights(whole), losses(whole), losses(whole, "eval/loss")
    (whole / "model" / "manifest.json").unlink()
    for step in (15, 20):
        shutil.rmtree(whole / "checkpoints" / f"step_{step:08d}")
    again = pretrain(tmp_path, "second", **changes)
    assert same_bits(before[0], weights(again))
    assert before[1:] == (losses(again), losses(again, "eval/loss"))


def test_a_refused_recipe_leaves_the_record_of_the_run_alone(tmp_path):
    folder = pretrain(tmp_path)
    names = ("recipe.yaml", "resolved.yaml", "plan.json", "data.json", "report.json", "metrics.jsonl")
    before = {name: (folder / name).read_bytes() for name in names}
    for done in (True, False):
        if not done:
            (folder / "model" / "manifest.json").unlink()
        with pytest.raises(RunError, match="length"):
            pretrain(tmp_path, pretrain__train__length="17 steps")
        assert {name: (folder / name).read_bytes() for name in names} == before


def test_after_the_last_checkpoint_only_the_measurement_is_repeated(tmp_path):
    folder = pretrain(tmp_path)
    before = weights(folder), (folder / "metrics.jsonl").read_bytes(), (folder / "samples.jsonl").read_bytes()
    (folder / "model" / "model.safetensors").unlink()
    again = pretrain(tmp_path)
    assert same_bits(before[0], weights(again))
    after = (folder / "metrics.jsonl").read_bytes(), (folder / "samples.jsonl").read_bytes()
    assert after == before[1:]


def test_the_order_of_sources_is_part_of_a_run(tmp_path):
    sources = [
        {"name": name, "files": str(tmp_path / "corpus" / f"{number}-*.txt")}
        for number, name in enumerate(("one", "two"))
    ]
    pretrain(tmp_path, pretrain__data=sources)
    with pytest.raises(RunError, match="text"):
        pretrain(tmp_path, pretrain__data=sources[::-1])
