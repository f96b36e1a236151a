"""TPUs without one: chips on a made-up bus, what is refused, and the device layer's decisions."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_hardware import AUTO, CPU, CUDA, H100, cpu_tree, smi
from torch import nn

from llmkit.errors import MissingError, RunError, UsageError
from llmkit.hardware import detect, detect_hardware, elsewhere, named_hardware, tpu
from llmkit.hardware.table import TPUS
from llmkit.launch.tpu import ADDRESSES, TOPOLOGY
from llmkit.models.build import build_model
from llmkit.models.host import on_host, on_host_or_here
from llmkit.objectives.base import Loss
from llmkit.plan import DataFacts, PlanError, make_plan, shape_of_preset
from llmkit.plan.tpu import STATIC, check_tpu
from llmkit.recipe.schema import Model, Recipe
from llmkit.registry import OBJECTIVES
from llmkit.train import accelerators

TPU = SimpleNamespace(device="tpu")
PCI = {kind: device for device, kind in tpu._KINDS.items()}


@pytest.fixture
def root(tmp_path):
    return cpu_tree(tmp_path)


@pytest.fixture
def packages(monkeypatch):
    """As if torch_tpu and libtpu were installed."""
    monkeypatch.setattr(tpu, "find_spec", lambda name: name if name in tpu.PACKAGES else None)


def add_chips(root: Path, kind: str, count: int, closed: int = 0, vendor: str = "0x1ae0") -> None:
    """Chips on the bus, the last of which `/dev/vfio` lacks."""
    (root / "dev/vfio").mkdir(parents=True, exist_ok=True)
    for number in range(count + closed):
        device = root / f"sys/bus/pci/devices/0000:00:{number:02d}.0"
        group = root / f"sys/kernel/iommu_groups/{number}"
        for made in (device, group):
            made.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "device").write_text(f"{PCI.get(kind, kind)}\n")
        (device / "iommu_group").symlink_to(group)
        if number < count:
            (root / f"dev/vfio/{number}").write_text("")


# --- What is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PCI)
def test_chips_of_each_generation_are_counted(kind, root):
    add_chips(root, kind, 4, closed=1)
    assert tpu.query_tpus(root) == tpu.Chips(kind, 4, closed=1)


def test_what_is_no_tpu_is_not_counted(root):
    assert tpu.query_tpus(root) is None
    add_chips(root, "v5e", 1, vendor="0x10de")
    assert tpu.query_tpus(root) is None


def test_another_device_of_google_is_not_counted(root):
    add_chips(root, "0x0042", 1)
    assert tpu.query_tpus(root) is None


@pytest.mark.parametrize("wanted", [AUTO, TPU])
def test_chips_are_computed_on_as_the_table_says(wanted, root, packages):
    add_chips(root, "v5e", 4)
    found = detect_hardware(wanted, root=root, env={}, torch_has_cuda=False)
    chip = next(kind.chip for kind in TPUS if kind.name == "v5e")
    assert (found.device, found.num_devices, found.device_name, found.bf16) == ("tpu", 4, "TPU v5e", True)
    assert (found.memory_bytes, found.peak_flops) == (chip.memory_bytes, chip.bf16_flops)
    assert (found.link, found.price, found.cores) == (chip.link, chip.price, 2)


def test_gpus_come_first_and_a_pin_wins(root, tmp_path, packages):
    add_chips(root, "v5e", 4)
    env = smi(tmp_path / "smi", [H100.format(i=0)])
    assert detect_hardware(AUTO, root=root, env=env, torch_has_cuda=True).device == "cuda"
    assert detect_hardware(TPU, root=root, env=env, torch_has_cuda=True).device == "tpu"
    assert detect_hardware(CPU, root=root, env={}).device == "cpu"
    with pytest.raises(MissingError):
        detect_hardware(CUDA, root=root, env={}, torch_has_cuda=True)


UNUSABLE = [
    ("v5e", 1, 0, ["libtpu"], "but torch_tpu is not installed", 'pip install "llmkit[tpu]"'),
    ("v5e", 1, 0, [], "but torch_tpu and libtpu are not installed", 'pip install "llmkit[tpu]"'),
    (
        "v5e",
        0,
        8,
        tpu.PACKAGES,
        "8 TPU chip(s) found (TPU v5e), but /dev/vfio does not have them",
        "--privileged",
    ),
    ("v7", 1, 0, tpu.PACKAGES, "but this version knows", "machine.device=cpu"),
]


@pytest.mark.parametrize(("kind", "count", "closed", "installed", "why", "help_"), UNUSABLE)
def test_chips_that_cannot_be_used_are_told(kind, count, closed, installed, why, help_, root, monkeypatch):
    monkeypatch.setattr(tpu, "find_spec", lambda name: name if name in installed else None)
    add_chips(root, kind, count, closed)
    with pytest.raises(MissingError) as told:
        detect_hardware(TPU, root=root, env={}, torch_has_cuda=False)
    assert why in str(told.value)
    assert help_ in str(told.value.hint)
    assert told.value.exit_code == 3
    found = detect_hardware(AUTO, root=root, env={}, torch_has_cuda=False)
    assert found.device == "cpu"
    assert len(found.notes) == 1
    assert why in found.notes[0]
    assert help_ in found.notes[0]


def test_what_the_environment_says_is_no_chip(root):
    env = {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    found = detect_hardware(AUTO, root=root, env=env, torch_has_cuda=False)
    assert found.notes == ("TPU_ACCELERATOR_TYPE is v5litepod-8, but no TPU is visible here",)
    assert detect_hardware(AUTO, root=root, env={}, torch_has_cuda=False).notes == ()
    with pytest.raises(MissingError, match="visible here, although TPU_ACCELERATOR_TYPE is v5litepod-8"):
        detect_hardware(TPU, root=root, env=env, torch_has_cuda=False)


def test_verbs_with_rows_of_many_lengths_stay_on_the_processor(monkeypatch):
    there = named_hardware("v5e-8")
    monkeypatch.setattr(elsewhere, "detect_hardware", lambda machine: there)
    told = []
    found = detect.detect_hardware(CPU)
    assert elsewhere.detect_elsewhere(AUTO, "eval", told.append).device == "cpu"
    assert told == [
        "8 TPU chip(s) found (TPU v5e) but not used: eval has rows of many lengths, and a TPU compiles each anew"
    ]
    assert elsewhere.detect_elsewhere(AUTO, "finetune").notes == (told[0].replace("eval", "finetune"),)
    with pytest.raises(UsageError, match=r"machine\.device is tpu, and finetune has rows of many lengths"):
        elsewhere.detect_elsewhere(TPU, "finetune")
    monkeypatch.setattr(elsewhere, "detect_hardware", lambda machine: found)
    assert elsewhere.detect_elsewhere(AUTO, "eval") is found


# --- What is planned -------------------------------------------------------------------------------------------------

DATA = DataFacts(1_000_000, 1, 4_000_000, exact=True)


def plan_of(hardware="v5e-8", machine=None, preset="gpt-tiny", **section):
    made = {
        "model": {"preset": preset, "context": 128},
        "train": {"length": "9 steps", "batch": "64 samples", **section.pop("train", {})},
        **section,
    }
    recipe = Recipe.model_validate({"llmkit": 1, "pretrain": made, "machine": machine or {}})
    model = shape_of_preset(preset, 8000, 128)
    return make_plan(recipe, named_hardware(hardware), DATA, vocab_size=8000, model=model)


def test_a_plan_for_a_slice():
    plan = plan_of()
    assert (plan.device, plan.precision, plan.world_size, plan.rows_per_step) == ("tpu", "bf16", 8, 64)
    assert plan.micro_batch_size * plan.world_size * plan.gradient_accumulation_steps == 64
    assert plan.memory.total > 16 * plan.num_parameters


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in STATIC])
def test_objectives_whose_shapes_change_are_refused(objective):
    with pytest.raises(
        PlanError, match=f"pretrain.objective is {objective.replace('+', '.')} on a TPU"
    ) as told:
        plan_of(objective=objective, preset="bert-tiny" if objective in ("mlm", "mlm+nsp") else "gpt-tiny")
    assert "machine.device=cpu" in told.value.hint
    plan_of(
        "1xH100", objective=objective, preset="bert-tiny" if objective in ("mlm", "mlm+nsp") else "gpt-tiny"
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"machine": {"parallel": {"tensor": 2}}}, "tensor and expert"),
        ({"machine": {"offload": True, "parallel": "fsdp"}}, "machine.offload"),
        ({"machine": {"communication": {"gradients": "bf16"}}}, "machine.communication.gradients is bf16"),
    ],
)
def test_what_nobody_has_seen_on_a_tpu_is_refused(changes, match):
    with pytest.raises(PlanError, match=match) as told:
        plan_of(**changes)
    assert told.value.hint


def test_models_whose_shapes_change_are_refused():
    recipe = Recipe.model_validate(
        {"llmkit": 1, "pretrain": {"model": {"preset": "gpt-tiny"}, "train": {"length": "9 steps"}}}
    )
    chips, section = named_hardware("v5e-8"), recipe.pretrain
    shape = shape_of_preset("gpt-tiny", 8000, 128)
    check_tpu(recipe.machine, chips, section, shape)
    for changed, match in (
        ({"compiles": False}, "a recurrent model"),
        ({"num_experts": 4}, "a mixture of experts"),
    ):
        other = replace(shape, **changed)
        with pytest.raises(PlanError, match=match):
            check_tpu(recipe.machine, chips, section, other)
        check_tpu(recipe.machine, named_hardware("1xH100"), section, other)


# --- The device layer ------------------------------------------------------------------------------------------------


def test_a_host_copy_is_equal_tied_and_apart():
    model = build_model(
        Model(preset="gpt-tiny", context=32), vocab_size=64, kind="causal", special_ids={}, seed=0
    )
    model.tie_weights()
    model.model.norm.weight.requires_grad_(False)
    made = on_host(model)
    assert on_host_or_here(model) is model
    for one in (model, made):
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight
    for (name, ours), (other, theirs) in zip(made.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert ours is not theirs
        assert ours.requires_grad == theirs.requires_grad
        assert torch.equal(ours, theirs)
    alone = nn.Identity()
    assert on_host_or_here(alone) is alone


def test_each_device_has_its_backend():
    assert [accelerators.backend_of(device) for device in ("cpu", "mps", "cuda", "tpu")] == [
        "gloo",
        "gloo",
        "cpu:gloo,cuda:nccl",
        "cpu:gloo,tpu:tpu_dist",
    ]


@pytest.mark.parametrize("before", [None, "cpu:0"])
def test_accelerate_is_told_of_the_device_only_while_it_asks(before, monkeypatch):
    monkeypatch.delenv(accelerators._PLACE, raising=False)
    if before:
        monkeypatch.setenv(accelerators._PLACE, before)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)

    def ask():
        with accelerators.placed("tpu") as cpu:
            assert cpu
            assert os.environ[accelerators._PLACE] == "tpu:3"
            raise KeyError

    with pytest.raises(KeyError):
        ask()
    assert os.environ.get(accelerators._PLACE) == before
    with accelerators.placed("cuda") as cpu:
        assert not cpu
        assert os.environ.get(accelerators._PLACE) == before


def test_a_tpu_that_cannot_be_opened_is_told(monkeypatch):
    accelerators.open_device("cpu", 4)
    with pytest.raises(MissingError, match="training on a TPU needs torch_tpu and libtpu") as told:
        accelerators.open_device("tpu", 1)
    assert told.value.hint == 'pip install "llmkit[tpu]"'
    monkeypatch.setattr(accelerators, "missing_packages", list)
    monkeypatch.setattr(accelerators.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(RunError, match="torch_tpu finds no chip"):
        accelerators.open_device("tpu", 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="tpu"))
    accelerators.open_device("tpu", 1)
    for name in (ADDRESSES, TOPOLOGY):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match=f"4 processes on TPUs, but {ADDRESSES} and {TOPOLOGY} are not set"):
        accelerators.open_device("tpu", 4)


def test_counts_are_numbers_where_they_are_no_inputs():
    counts = {"num_targets": 12, "num_pairs": 0}
    assert accelerators.as_inputs(counts, torch.device("cpu")) is counts
    loss = Loss({"num_targets": torch.tensor(6.0), "num_pairs": torch.tensor(0.0)})
    as_tensors = {name: torch.tensor(max(1, count)) for name, count in counts.items()}
    assert float(loss.mean(counts)) == float(loss.mean(as_tensors)) == 0.5
