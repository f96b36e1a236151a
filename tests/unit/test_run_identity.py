"""What a run that goes on must share with the one that was begun."""

import importlib
from types import SimpleNamespace

import pytest
import training

from llmkit.errors import RunError
from llmkit.recipe import load_recipe
from llmkit.train.checkpoint import check_identity

NEW = (
    "pretrain.train.l1",
    "pretrain.train.label_smoothing",
    "pretrain.train.optim.betas",
    "tokenize.algorithm",
)


@pytest.fixture(scope="module")
def module():
    return importlib.import_module("llmkit.run.pretrain")  # `llmkit.run` has a verb of this name


def identity(module, folder, begun, **changes):
    loaded = load_recipe(training.recipe(folder, **changes))
    return module._identity(loaded, SimpleNamespace(rows_per_step=8), "t", [], None, begun)


@pytest.mark.parametrize("optim", [{}, {"name": "muon"}, {"name": "lion"}, {"name": "schedule_free"}])
def test_a_setting_that_the_begun_run_did_not_know_may_be_as_if_unwritten(module, tmp_path, optim):
    changes = {"pretrain__train__optim": {"lr": 1e-2, "warmup": "2 steps", **optim}}
    full = identity(module, tmp_path, {}, **changes)
    assert set(NEW) <= set(full)
    begun = {key: value for key, value in full.items() if key not in NEW}
    now = identity(module, tmp_path, begun, **changes)
    assert now == begun
    check_identity(tmp_path, begun, now)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"pretrain__train__l1": 0.1}, "pretrain.train.l1"),
        ({"pretrain__train__optim": {"lr": 1e-2, "warmup": "2 steps", "betas": [0.8, 0.9]}},
         "pretrain.train.optim.betas"),
        ({"tokenize__algorithm": "unigram"}, "tokenize.algorithm"),
    ],
)  # fmt: skip
def test_another_value_of_it_is_another_run(module, tmp_path, change, key):
    begun = {name: value for name, value in identity(module, tmp_path, {}).items() if name not in NEW}
    with pytest.raises(RunError, match=f"{key}: "):
        check_identity(tmp_path, begun, identity(module, tmp_path, begun, **change))


def test_a_run_of_a_version_with_fewer_settings_is_gone_on_with(module, tmp_path, monkeypatch):
    made = module._identity

    def older(*args):
        return {key: value for key, value in made(*args).items() if key not in NEW}

    with monkeypatch.context() as patch:
        patch.setattr(module, "_identity", older)
        folder = training.pretrain(tmp_path, pretrain__train__length="4 steps")
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    training.pretrain(tmp_path, pretrain__train__length="4 steps")
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before, "trained again"
    with pytest.raises(RunError, match="l1"):
        training.pretrain(tmp_path, pretrain__train__length="4 steps", pretrain__train__l1=0.5)
