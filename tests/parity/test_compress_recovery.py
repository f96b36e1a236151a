"""Recovery inside a chain: what a step did stays, killed = left alone, what is trained as rounded is stored so."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tuning
from safetensors.torch import load_file
from training import options, pretrain, start
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmkit.errors import UsageError
from llmkit.recipe import load_recipe
from llmkit.recipe.compression import Recover
from llmkit.report.console import make_reporter
from llmkit.run import compress
from llmkit.run.compression import artefacts, chain
from llmkit.run.compression.recover import _place_of, _taught

TRAIN = {"length": "6 steps", "batch": "4 samples", "optim": {"lr": 1e-3}}
HALF = {"method": "prune", "share": "50%", "by": "magnitude", "stages": 2, "recover": {"train": TRAIN}}
SHALLOW = {"method": "prune", "what": "layers", "share": "50%", "recover": {"train": TRAIN}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def run(folder):
    return pretrain(folder)


def section(*steps, **more):
    return {"llmkit": 1, "name": "c", "seed": 3, "compress": {"steps": list(steps), "speed": None, **more}}


def made(folder, target, *steps, **more):
    recipe = load_recipe(section(*steps, **more))
    return compress(str(target), recipe, options(folder), make_reporter(quiet=True))


def matrices(place):
    """The weights that pruning may take out."""
    tensors = load_file(place + "/model.safetensors")
    return {name: value for name, value in tensors.items() if value.ndim == 2 and "layers" in name}


def test_zeros_stay_through_this_recovery_and_those_after_it(folder, run):
    result = made(folder, "tiny", HALF, SHALLOW, {"method": "quantize"})
    _, pruned, shallow, rounded = result.summary["chain"]
    first, second = matrices(pruned["folder"]), matrices(shallow["folder"])
    assert sum(int((value == 0).sum()) for value in first.values()) == pytest.approx(
        0.5 * sum(value.numel() for value in first.values()), rel=0.01
    )
    assert len(second) == len(first) / 2
    assert all((value == 0).float().mean() > 0.45 for value in second.values())
    # It has learned: what was not zero has moved.
    before = matrices(str(run / "model"))
    assert any(not torch.equal(value[value != 0], before[name][value != 0]) for name, value in first.items())
    model = AutoModelForCausalLM.from_pretrained(shallow["folder"])
    assert model.config.num_hidden_layers == 1
    assert rounded["file_bytes"] < shallow["file_bytes"] < pruned["file_bytes"]
    # Of the way only what a person may read is left.
    assert not list(result.folder.glob("*.recover-*/model"))
    assert not list(result.folder.glob("*.before/model"))
    assert len(list(result.folder.glob("*.recover-*/report.html"))) == 3
    times = {path: path.stat().st_mtime_ns for path in result.folder.rglob("model.safetensors")}
    made(folder, "tiny", HALF, SHALLOW, {"method": "quantize"})
    assert times == {path: path.stat().st_mtime_ns for path in result.folder.rglob("model.safetensors")}


def dying(name, true):
    """Stops what writes or removes the file or folder of this name."""

    def call(path, *more):
        if path.name == name or path.parent.name == name:
            raise OSError("died")
        return true(path, *more)

    return call


def test_what_is_trained_as_rounded_is_stored_so(folder, run, monkeypatch):
    """Training's last evaluation was of the rounded weights; of the artefact all others are stored in 16 bits."""
    step = {"method": "quantize", "format": "int8", "recover": {"train": TRAIN}}
    with monkeypatch.context() as patch:  # ended between the artefact's model and what says that it is done
        patch.setattr(artefacts, "write_json", dying("1-quantize", artefacts.write_json))
        with pytest.raises(OSError, match="died"):
            made(folder, "tiny", step)
    with monkeypatch.context() as patch:  # and again before what led to it went
        patch.setattr(chain, "remove_folder", dying("model", chain.remove_folder))
        with pytest.raises(OSError, match="died"):
            made(folder, "tiny", step)
    result = made(folder, "tiny", step)
    facts = result.summary["chain"][1]["facts"]
    assert (facts["recovered"], facts["solver"]) == (True, "rtn")
    assert not list(result.folder.glob("1-quantize.*/model"))
    assert not (result.folder / "tokenize").exists()  # what the run made for itself is not left here again
    [report] = result.folder.glob("1-quantize.recover-*/report.json")
    trained = json.loads(report.read_text())["final"]["eval/loss"]
    assert result.summary["metrics"]["loss"] == pytest.approx(trained, abs=1e-3)
    assert result.summary["metrics"]["loss"] != result.summary["before"]["loss"]


def test_a_recovery_that_cannot_be_is_told_before_anything_is_done(folder, run):
    train = {"length": "4 steps", "batch": "16 tokens"}
    late = {"method": "prune", "share": "50%", "recover": {"train": train}}
    before = sorted(path for path in folder.rglob("*") if ".cache" not in path.parts)
    with pytest.raises(UsageError, match="batch 16 tokens is less than one row of"):
        made(folder, "tiny", {"method": "prune", "share": "10%"}, late)
    assert before == sorted(path for path in folder.rglob("*") if ".cache" not in path.parts)


def test_training_goes_into_the_folder_of_the_run_wherever_that_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs/tiny/compress-a/1-prune/compress-b/1-prune.recover-x"
    place.mkdir(parents=True)
    wanted = "tiny", "compress-a/1-prune/compress-b/1-prune.recover-x"
    for folder in (place, place.relative_to(tmp_path)):
        assert _place_of(folder, Path("runs")) == (Path("runs"), *wanted)
    (tmp_path / "runs/.cache").mkdir()
    assert _place_of(place, Path("elsewhere")) == (tmp_path / "runs", *wanted)


def test_who_cannot_learn_from_a_teacher_learns_from_the_data(tmp_path):
    material = SimpleNamespace(subject=SimpleNamespace(place=tmp_path))
    quiet = make_reporter(quiet=True)
    assert _taught(Recover(), material, "cls", quiet).teacher == str(tmp_path)
    assert _taught(Recover(), material, "clm", quiet).weight == Recover().distil.weight
    assert _taught(Recover(), material, "embed", quiet) is None
    assert _taught(Recover(), material, "electra", quiet) is None
    with pytest.raises(UsageError, match="`embed` cannot be compared"):
        _taught(Recover(distil={"weight": 0.3}), material, "embed", quiet)


@pytest.mark.slow
def test_a_chain_killed_in_a_recovery_ends_as_one_that_was_left_alone(folder, run, tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps(section(HALF, {"method": "quantize"})))
    found = {}
    for name, kills in (("alone", ()), ("killed", ("4",))):
        runs = tmp_path / name
        pretrain(tmp_path / name)
        words = [sys.executable, "-m", "llmkit", "compress", "tiny", str(path), "--runs", str(runs / "runs")]
        for kill in (*kills, None):
            process = start(words, **({"LLMKIT_KILL_AT": kill} if kill else {}))
            _, said = process.communicate(timeout=240)
            assert (process.returncode == 0) == (kill is None), said
        [place] = (runs / "runs" / "tiny").glob("compress*")
        found[name] = [
            (place / part / "model/model.safetensors").read_bytes() for part in ("1-prune", "2-quantize")
        ]
    assert found["alone"] == found["killed"]


@pytest.mark.slow
def test_a_classifier_of_fewer_layers_learns_from_the_whole_one(folder):
    more = {"finetune__train__length": "4 steps", "finetune__eval__every": "never"}
    whole = tuning.finetune(folder, "cls", finetune__checkpoint__every="never", **more)
    train = {**TRAIN, "length": "20 steps"}
    step = {"method": "distil", "layers": 1, "recover": {"train": train}}
    result = made(folder, whole.parent, step)
    student = AutoModelForSequenceClassification.from_pretrained(result.summary["model"])
    assert student.config.num_hidden_layers == 1
    [report] = result.folder.glob("1-distil.recover-*/report.json")
    final = json.loads(report.read_text())["final"]
    assert result.summary["metrics"]["accuracy"] == final["eval/accuracy"]
    # Training computes in bf16 where the machine can.
    assert result.summary["metrics"]["loss"] == pytest.approx(final["eval/loss"], abs=1e-4)
