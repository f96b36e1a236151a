"""What a run that goes on must share with the one that was begun."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import training
import tuning

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


def tuned(folder, **changes):
    """The identity of fine-tuning; a file that a setting names is in the folder."""
    module = importlib.import_module("llmkit.run.finetune")
    loaded = load_recipe(tuning.recipe(folder, "sft", **changes))
    rows = SimpleNamespace(folder=Path("rows"), context=64, labels=())
    return module._identity(loaded, SimpleNamespace(rows_per_step=12), rows, [])


def test_how_an_adapter_is_exported_is_not_what_it_learns(tmp_path):
    lora = {"method": "lora"}
    one = tuned(tmp_path, finetune__adapter=lora)
    assert tuned(tmp_path, finetune__adapter={**lora, "merge": False, "max_kl": 0.5}) == one
    assert tuned(tmp_path, finetune__adapter={**lora, "rank": 4}) != one


def test_what_stops_a_run_is_of_it_where_one_may_stop(tmp_path):
    stops = {"finetune__stop_early": {"patience": 2}}
    one = tuned(tmp_path, **stops)
    assert tuned(tmp_path, **stops, finetune__eval={"every": "2 steps"}) != one
    assert tuned(tmp_path, **stops, finetune__eval={"every": "3 steps", "rows": 4}) != one
    other = {"keep_best": "eval/accuracy"}
    assert tuned(tmp_path, **stops, finetune__checkpoint=other) != one
    assert tuned(tmp_path, finetune__eval={"every": "2 steps"}) == tuned(tmp_path)


def test_an_adapter_to_start_from_counts_by_its_files_not_by_its_place(tmp_path):
    def started(name, config, tensors):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text(config)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(tensors)
        return tuned(tmp_path, finetune__adapter={"method": "lora", "start": str(tmp_path / name)})

    one = started("a", "{}", b"1")
    assert started("b", "{}", b"1") == one
    assert started("a", "{}", b"2") != one
    assert started("a", '{"r": 1}', b"1") != one


@pytest.mark.parametrize("name", ["flat", "Made", "partial"])
def test_a_loss_of_ones_own_counts_by_its_code(tmp_path, monkeypatch, name):
    code = (
        "from functools import partial\n"
        "def flat(logits, targets):\n    return logits.sum()\n"
        "class Made:\n    __call__ = staticmethod(flat)\n"
        "partial = partial(flat)\n"
    )
    module = f"own_loss_{name}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = {"custom": f"{module}:{name}", "trust_custom_code": True}
    one = tuned(tmp_path, finetune__loss=loss)
    assert tuned(tmp_path, finetune__loss=loss) == one
    (tmp_path / f"{module}.py").write_text(code.replace(".sum()", ".mean()"))
    assert tuned(tmp_path, finetune__loss=loss) != one
