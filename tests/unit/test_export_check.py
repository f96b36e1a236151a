"""`export_check`: what could not be exported in the end ends a run before its first step."""

import json
import sys
from pathlib import Path

import pytest
import tuning
from training import options, pretrain, recipe, same_bits, weights

from llmkit.compress import export, gguf_export, onnx_export
from llmkit.errors import MissingError, RunError, UsageError
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import export_check
from llmkit.run import finetune as finetune_verb
from llmkit.run import pretrain as verb


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines = []
        self.inner = make_reporter(quiet=True)

    def phase(self, name, detail=""):
        self.lines.append(f"{name}: {detail}")

    def note(self, text):
        self.lines.append(text)

    def warn(self, text):
        self.lines.append(f"warning: {text}")

    def __getattr__(self, name):
        return getattr(self.inner, name)


def train(folder, **changes):
    """Train as a person would; what was told, the folder, and how it ended."""
    told = Told()
    found = verb(load_recipe(recipe(folder, **changes)), options(folder), told)
    return told.lines, found.folder


def no_training(monkeypatch):
    def never(*args, **more):
        raise AssertionError("training began")

    monkeypatch.setattr(sys.modules["llmkit.run.pretrain"], "train_job", never)


def nothing_left(folder):
    """Whether a refused run left no record, so that another recipe may begin there."""
    return [path.name for path in folder.glob("runs/*/pretrain/*")] in ([], [".lock"])


@pytest.mark.parametrize("form", ["gguf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_what_can_be_exported_is_trained_as_without_the_check(form, tmp_path, monkeypatch):
    pytest.importorskip("gguf" if form == "gguf" else "onnxruntime")
    exported = []
    real = export.apply

    def watched(given, step):
        made = real(given, step)
        exported.append(
            (step.to, made.facts["difference"]["places"], len(list(given.place.parent.iterdir())))
        )
        return made

    monkeypatch.setattr(export, "apply", watched)
    lines, folder = train(tmp_path, pretrain__train__length="4 steps", pretrain__export_check=[form])
    assert [to for to, places, _ in exported] == [form]
    assert exported[0][1] > 32
    (said,) = (line for line in lines if line.startswith("checked: the new model can be exported"))
    assert f"to: {form}" in said
    before = next(number for number, line in enumerate(lines) if line.startswith("prove"))
    assert lines.index(said) < before
    plain = pretrain(tmp_path, "plain", pretrain__train__length="4 steps")
    assert same_bits(weights(folder), weights(plain))
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".gguf", ".onnx"))]
    assert left == []
    assert not list(folder.glob(".*tmp*")) + list(folder.glob("*scratch*"))


def test_an_architecture_without_an_exporter_ends_the_run_before_text_is_read(tmp_path, monkeypatch):
    no_training(monkeypatch)
    monkeypatch.setattr(
        sys.modules["llmkit.run.pretrain"], "prepare_job", lambda *args: pytest.fail("text was read")
    )
    with pytest.raises(UsageError, match="no exporter for bert") as caught:
        pretrain(
            tmp_path,
            pretrain__objective="mlm",
            pretrain__model={"preset": "bert-tiny", "context": 32},
            pretrain__export_check="gguf",
        )
    assert caught.value.exit_code == 2
    assert "pretrain.export_check" in caught.value.message
    assert "leave `gguf` out" in caught.value.hint
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("hidden_act", ["gelu"])
def test_what_only_the_model_tells_ends_the_run_before_it_is_trained(hidden_act, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    no_training(monkeypatch)
    with pytest.raises(UsageError, match=r"pretrain\.export_check: to: gguf: llama\.cpp knows no llama with"):
        pretrain(tmp_path, pretrain__export_check=["gguf"], pretrain__model__config__hidden_act=hidden_act)
    assert nothing_left(tmp_path)


def test_a_fault_of_the_exporter_ends_the_run_too(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    no_training(monkeypatch)
    real = gguf_export._laid
    monkeypatch.setattr(gguf_export, "_laid", lambda value, tensor: real(value, tensor)[::-1].copy())
    with pytest.raises(RunError, match=r"pretrain\.export_check: export: model\.gguf: .* does not hold"):
        pretrain(tmp_path, pretrain__export_check=["gguf"])


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    def missing():
        raise MissingError("`to: onnx` needs onnx (no module)", hint='pip install "llmkit[onnx]"')

    no_training(monkeypatch)
    monkeypatch.setattr(onnx_export, "need_onnx", missing)
    with pytest.raises(MissingError, match=r"pretrain\.export_check: `to: onnx` needs onnx") as caught:
        pretrain(tmp_path, pretrain__export_check=["onnx"])
    assert caught.value.exit_code == 3
    assert caught.value.hint == 'pip install "llmkit[onnx]"; or leave `onnx` out'


def test_a_resumed_run_does_not_check_again(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    folder = pretrain(tmp_path, pretrain__train__length="10 steps", pretrain__export_check=["gguf"])
    (folder / "report.json").unlink()  # not all was done
    for path in sorted((folder / "model").iterdir()):
        path.unlink()
    (folder / "model").rmdir()
    monkeypatch.setattr(export_check, "_fresh", lambda job: pytest.fail("checked again"))
    lines, again = train(tmp_path, pretrain__train__length="10 steps", pretrain__export_check=["gguf"])
    assert any("from step_00000010" in line for line in lines)
    assert (again / "model" / "model.safetensors").is_file()
    # The setting is not part of what a run is: one that was begun without it goes on with it.
    assert (
        verb(
            load_recipe(recipe(tmp_path, pretrain__train__length="10 steps")), options(tmp_path), Told()
        ).folder
        == again
    )


def test_counted_models_have_no_such_check(tmp_path):
    with pytest.raises(UsageError, match=r"pretrain\.export_check: an n-gram model is counted"):
        pretrain(
            tmp_path,
            pretrain__model={"architecture": "ngram", "context": 32},
            pretrain__export_check=["torch"],
        )


def tuned(folder, **changes):
    written = tuning.recipe(folder, "sft")
    section = written["finetune"] | changes
    return load_recipe({**written, "finetune": section})


def test_fine_tuning_checks_the_model_without_its_adapter(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("peft")

    class StopHereError(Exception):
        pass

    def stop(*args, **more):
        raise StopHereError

    monkeypatch.setattr(sys.modules["llmkit.run.finetune"], "train_job", stop)
    told, adapter = Told(), {"method": "lora"}
    with pytest.raises(StopHereError):
        finetune_verb(tuned(tmp_path, export_check=["gguf"], adapter=adapter), options(tmp_path), told)
    assert any("can be exported `to: gguf`" in line for line in told.lines)
    with pytest.raises(UsageError, match=r"finetune\.export_check: an adapter that is not merged"):
        finetune_verb(
            tuned(tmp_path, export_check=["gguf"], adapter={**adapter, "merge": False}),
            options(tmp_path),
            told,
        )


def test_the_type_of_an_architecture_is_known_ahead(tmp_path):
    from llmkit.recipe.schema import Model

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "electra"}))
    assert export_check._type_of(Model(preset="gpt-tiny")) == "llama"
    assert export_check._type_of(Model(name=str(tmp_path))) == "electra"
    assert export_check._type_of(Model(name=str(Path(tmp_path) / "none"))) is None
