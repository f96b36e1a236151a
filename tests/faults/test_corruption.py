"""Damage to checkpoints: the one before is used and the damaged one named, or it is refused; never a wrong result."""

import json
import shutil

import pytest
import torch
from checkpoint_trials import made
from safetensors.torch import load_file, save_file
from training import losses, pretrain, same_bits, weights

from llmkit.durable import write_folder
from llmkit.errors import CorruptError, LlmkitError, RunError
from llmkit.train.checkpoint import Checkpoints
from llmkit.train.saving import BEST, Best, Keep, Saver

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def flip(where):
    """Flip a bit at a place between 0, the first byte, and 1, the last."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[round(where * (len(content) - 1))] ^= 1 << 2
        path.write_bytes(content)

    return damage


def cut(to):
    """Cut the file to a number of bytes; a negative number counts from the end."""
    return lambda path: path.write_bytes(path.read_bytes()[:to])


def grow(by):
    return lambda path: path.write_bytes(path.read_bytes() + by)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": cut(0),
    "cut in the first block": cut(100),
    "a byte short": cut(-1),
    "a byte long": grow(b"\0"),
    "a line long": grow(b"{}\n"),
    "twice": lambda path: path.write_bytes(path.read_bytes() * 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    **{f"a bit flipped at {i}/16": flip(i / 16) for i in range(17)},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of two steps; every number in them is the step."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    for step in (1, 2):
        save(folder, step)
    return folder


def save(folder, step):
    with Saver(Checkpoints(folder, {}), Keep(last=2), background=True) as saver:
        saver.save(*made(step))


def copy_of(two, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(two, folder)
    return Checkpoints(folder, {})


def resume(checkpoints):
    """The step gone on from, every number of it checked, and what was said."""
    said = []
    model, optimizer, _ = made(0)
    path = checkpoints.newest(said.append)
    state = checkpoints.load(path, model, optimizer)
    wanted, moments, _ = made(state.step)
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for kind, tensor in moments.state[theirs].items():
            assert torch.equal(optimizer.state[ours][kind], tensor)
    return state.step, said


@pytest.mark.parametrize("file", FILES)
def test_damage_to_any_file_is_named_and_the_one_before_is_used(tmp_path, two, file):
    for how, damage in DAMAGE.items():
        checkpoints = copy_of(two, tmp_path / "checkpoints")
        damage(checkpoints.path(2) / file)
        step, said = resume(checkpoints)
        assert step == 1, how
        (words,) = said
        assert words.startswith("checkpoint step_00000002 is damaged and not used: "), how
        assert file in words, how


def test_an_interrupted_writers_leftovers_are_not_taken_for_checkpoints(tmp_path, two):
    checkpoints = copy_of(two, tmp_path / "checkpoints")
    shutil.copytree(checkpoints.path(2), checkpoints.folder / ".step_00000003.tmp-host-1")
    (checkpoints.folder / "step_00000004").write_text("a file")
    checkpoints.path(5).mkdir()
    step, said = resume(checkpoints)
    assert step == 2
    assert ["step_00000005" in words for words in said] == [True]


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint_is_noticed(tmp_path, two, file):
    """Whole, of the same size, with a good hash of its own: but not of this checkpoint."""
    checkpoints = copy_of(two, tmp_path / "checkpoints")
    shutil.copy(checkpoints.path(1) / file, checkpoints.path(2) / file)
    step, said = resume(checkpoints)
    assert step == 1
    assert "step_00000002 is damaged" in said[0]


def test_every_checkpoint_damaged_is_an_error(tmp_path, two):
    checkpoints = copy_of(two, tmp_path / "checkpoints")
    for step in (1, 2):
        flip(0.5)(checkpoints.path(step) / "model.safetensors")
    with pytest.raises(CorruptError, match="every checkpoint is damaged"):
        checkpoints.newest(lambda words: None)


def swap(checkpoints):
    """Let the folders of two checkpoints change names."""
    aside = checkpoints.folder / "aside"
    checkpoints.path(1).rename(aside)
    checkpoints.path(2).rename(checkpoints.path(1))
    aside.rename(checkpoints.path(2))


def test_a_checkpoint_under_another_ones_name_is_not_used(tmp_path, two):
    """Else the checkpoint of that step would be taken for saved already, and never be written."""
    checkpoints = copy_of(two, tmp_path / "checkpoints")
    swap(checkpoints)
    shutil.rmtree(checkpoints.path(1))
    with pytest.raises(LlmkitError, match="step_00000002"):
        resume(checkpoints)


# --- whole runs ---------------------------------------------------------------------------------------------


def unfinish(folder):
    """Let a finished run look as if it had died before its model was exported."""
    (folder / "model" / "manifest.json").unlink()


def test_folders_that_change_names_never_give_a_wrong_result(tmp_path, capsys):
    folder = pretrain(tmp_path)
    before = weights(folder), losses(folder), losses(folder, "eval/loss")
    unfinish(folder)
    one, other = (folder / "checkpoints" / f"step_{step:08d}" for step in (15, 20))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    again = pretrain(tmp_path)
    assert same_bits(weights(again), before[0])
    assert (losses(again), losses(again, "eval/loss")) == before[1:]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    other = pretrain(tmp_path, "other", seed=8)
    folder = pretrain(tmp_path)
    unfinish(folder)
    newest = folder / "checkpoints" / "step_00000020"
    shutil.rmtree(newest)
    shutil.copytree(other / "checkpoints" / newest.name, newest)
    with pytest.raises(RunError, match=r"seed: 8 -> 7"):
        pretrain(tmp_path)


# --- tensors ------------------------------------------------------------------------------------------------


def rewrite(checkpoints, file, change):
    """Publish the checkpoint of step 2 again, with a good manifest, but with other tensors in one file."""
    path = checkpoints.path(2)
    tensors = {name: load_file(path / name) for name in ("model.safetensors", "optimizer.safetensors")}
    change(tensors[file])
    state = (path / "state.json").read_text()
    with write_folder(path, facts={"step": 2, "format": 1}) as folder:
        for name, held in tensors.items():
            save_file(held, folder / name)
        (folder / "state.json").write_text(state)


MODEL_CHANGES = {
    "bias": lambda tensors: tensors.pop("bias"),
    "extra": lambda tensors: tensors.update(extra=torch.ones(1)),
    r"bias.*\[31\]": lambda tensors: tensors.update(bias=torch.ones(31)),
    "bias.*float64": lambda tensors: tensors.update(bias=tensors["bias"].double()),
}
OPTIMIZER_CHANGES = {
    "bias": lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".bias")],
    "exp_avg.bias": lambda tensors: tensors.pop("exp_avg.bias"),
    "other.bias": lambda tensors: tensors.update({"other.bias": torch.ones(30)}),
    "exp_avg.extra": lambda tensors: tensors.update({"exp_avg.extra": torch.ones(30)}),
    "exp_avg_sq.weight": lambda tensors: tensors.update({"exp_avg_sq.weight": torch.ones(7)}),
    "exp_avg": lambda tensors: tensors.clear(),
}


@pytest.mark.parametrize("words", MODEL_CHANGES)
def test_missing_unexpected_and_unfit_weights_are_errors(tmp_path, two, words):
    checkpoints = copy_of(two, tmp_path / "checkpoints")
    rewrite(checkpoints, "model.safetensors", MODEL_CHANGES[words])
    with pytest.raises(RunError, match=words):
        resume(checkpoints)


@pytest.mark.parametrize("words", OPTIMIZER_CHANGES)
def test_missing_unexpected_and_unfit_tensors_of_the_optimizer_are_errors(tmp_path, two, words):
    checkpoints = copy_of(two, tmp_path / "checkpoints")
    rewrite(checkpoints, "optimizer.safetensors", OPTIMIZER_CHANGES[words])
    with pytest.raises(RunError, match=words):
        resume(checkpoints)


# --- best.json ----------------------------------------------------------------------------------------------

NOTED = 2.5


def another_number(path):
    path.write_bytes(path.read_bytes().replace(b"2.5", b"2.4"))


def another_json(path):
    path.write_text("3")


def no_value(path):
    held = json.loads(path.read_bytes())
    del held["value"]
    path.write_text(json.dumps(held))


@pytest.mark.parametrize("how", [*DAMAGE, "another number", "another JSON", "no value"])
def test_a_damaged_best_json_is_a_clear_error_or_is_not_used(tmp_path, how):
    """Else a worse checkpoint could be kept for the best one."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    with Saver(checkpoints, Keep(last=2, best="eval/loss"), background=True) as saver:
        assert saver.is_best(1, {"eval/loss": NOTED})
        saver.save(*made(1))
    damage = {"another number": another_number, "another JSON": another_json, "no value": no_value, **DAMAGE}
    damage[how](checkpoints.folder / BEST)
    best = best_or_words(checkpoints)
    if isinstance(best, str):
        assert BEST in best
    else:
        assert best.step is None or (best.step, best.value) == (1, NOTED)


def best_or_words(checkpoints):
    try:
        return Best.of(checkpoints, "eval/loss", up_to=2)
    except LlmkitError as error:
        return str(error)
