"""What test_tpu.py leaves out: every other run that a TPU is refused, and the device layer on a processor."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_hardware import AUTO, cpu_tree
from test_tpu import add_chips
from torch import nn

from llmkit.errors import RunError
from llmkit.hardware import detect_hardware, named_hardware, tpu
from llmkit.plan import PlanError, shape_of_preset
from llmkit.plan.sharing import World, layouts
from llmkit.plan.tpu import check_tpu
from llmkit.recipe import load_recipe
from llmkit.recipe.machine import Machine
from llmkit.recipe.schema import Recipe
from llmkit.report.console import make_reporter
from llmkit.run import Options, plan_finetune
from llmkit.train import accelerators

MODEL = {"preset": "gpt-tiny", "context": 128}
LENGTH = {"length": "9 steps"}
HOST = torch.device("cpu")


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (
            {"finetune": {"task": "cls", "model": {"name": "m"}, "data": {"files": "a.csv"}}},
            "finetune on a TPU",
        ),
        ({"pretrain": {"model": MODEL, "train": LENGTH, "distil": {"teacher": "runs/a"}}}, "distil on a TPU"),
        (
            {"pretrain": {"model": MODEL, "train": {**LENGTH, "quantized": {"bits": 4}}}},
            r"train\.quantized on a TPU: rounding was seen on processors and NVIDIA GPUs only",
        ),
    ],
)
def test_other_runs_are_refused_on_tpus_alone(section, match):
    recipe = Recipe.model_validate({"llmkit": 1, **section})
    wanted = recipe.finetune or recipe.pretrain
    shape = shape_of_preset("gpt-tiny", 8000, 128)
    with pytest.raises(PlanError, match=match) as told:
        check_tpu(recipe.machine, named_hardware("v5e-8"), wanted, shape)
    assert told.value.hint
    check_tpu(recipe.machine, named_hardware("1xH100"), wanted, shape)


def test_a_bus_with_chips_and_no_vfio_at_all(tmp_path):
    root = cpu_tree(tmp_path)
    add_chips(root, "v6e", 0, closed=4)
    (root / "dev/vfio").rmdir()
    assert tpu.query_tpus(root) == tpu.Chips("v6e", 0, closed=4)
    found = detect_hardware(AUTO, root=root, env={}, torch_has_cuda=False)
    assert found.device == "cpu"
    assert "4 TPU chip(s) found (TPU v6e), but /dev/vfio does not have them" in found.notes[0]


def test_torch_tpu_without_a_chip_says_where_torch_computes(monkeypatch):
    monkeypatch.setattr(accelerators, "missing_packages", list)
    monkeypatch.setitem(sys.modules, "torch_tpu", SimpleNamespace())
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    with pytest.raises(RunError, match="torch_tpu finds no chip: torch computes on cuda"):
        accelerators.open_device("tpu", 1)


def test_a_processor_is_left_as_it_is():
    core = nn.Linear(2, 2)
    weight = core.weight
    accelerators.settle(core, HOST)
    accelerators.wait_for(HOST)
    accelerators.end_step(HOST)
    assert core.weight is weight
    with accelerators.placed("cpu") as cpu:
        assert cpu


def test_nobody_says_what_memory_a_tpu_used():
    assert accelerators.peak_memory_bytes(SimpleNamespace(type="tpu")) is None
    assert accelerators.peak_memory_bytes(HOST) > 2**20


def test_fine_tuning_on_a_tpu_is_refused_before_anything_is_read(tmp_path):
    """The model is no folder, and would be asked of the Hub."""
    section = {"task": "cls", "model": {"name": "no/such"}, "data": {"files": str(tmp_path / "none.csv")}}
    loaded = load_recipe({"llmkit": 1, "finetune": section})
    options = Options(runs=tmp_path / "runs", quiet=True)
    with pytest.raises(PlanError, match="finetune on a TPU: rows have many lengths") as told:
        plan_finetune(loaded, options, make_reporter(quiet=True), named_hardware("v5e-8"))
    assert "--on" in told.value.hint


def test_layers_are_not_split_on_a_tpu_by_themselves():
    """What would be refused where it is pinned is not chosen either."""
    wanted = {
        device: [
            layout.tensor
            for layout, _ in layouts(
                Machine(), World(8, 8, 1, device), shape_of_preset("gpt-base", 8000, 128)
            )
        ]
        for device in ("cuda", "tpu")
    }
    assert max(wanted["cuda"]) > 1
    assert wanted["tpu"] == [1, 1]
