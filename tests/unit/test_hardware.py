"""Hardware from a made-up /proc, /sys and nvidia-smi."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkit.errors import MissingError
from llmkit.hardware import (
    ACCELERATORS,
    detect_hardware,
    find_accelerator,
    installed_torch_has_cuda,
    query_gpus,
    usable_cores,
    usable_memory,
)

AUTO, CPU, CUDA, MPS = (SimpleNamespace(device=d) for d in ("auto", "cpu", "cuda", "mps"))
X86 = "processor\t: {n}\nmodel name\t: Made-up Xeon\nflags\t\t: fpu avx2 avx512f {more}\n\n"
H100 = "{i}, GPU-aa{i}, NVIDIA H100 80GB HBM3, 81559, 9.0"
T4 = "{i}, GPU-bb{i}, Tesla T4, 15360, 7.5"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpu_tree(root: Path, more: str = "", **files: str) -> Path:
    info = "".join(X86.format(n=n, more=more) for n in range(2))
    return tree(
        root, {"proc/cpuinfo": info, "proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\n", **files}
    )


def smi(folder: Path, lines: list[str], code: int = 0) -> dict[str, str]:
    """An environment in which nvidia-smi prints these lines."""
    program = folder / "bin/nvidia-smi"
    tree(folder, {"bin/nvidia-smi": "#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {code}\n"})
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("flags", "bf16"),
    [("", False), ("avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx512_bf16x", False)],
)
def test_bf16_by_processor_flags(tmp_path: Path, flags: str, bf16: bool) -> None:
    found = detect_hardware(CPU, root=cpu_tree(tmp_path, flags))
    assert (found.device, found.num_devices, found.bf16, found.peak_flops) == ("cpu", 1, bf16, None)
    assert found.device_name == "Made-up Xeon"
    assert found.memory_bytes == 16_000_000 * 1024


def test_bf16_on_arm_and_only_when_every_core_has_it(tmp_path: Path) -> None:
    arm = tree(tmp_path / "arm", {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd bf16 i8mm\n"})
    assert detect_hardware(CPU, root=arm).bf16
    mixed = tree(
        tmp_path / "mixed", {"proc/cpuinfo": X86.format(n=0, more="amx_bf16") + X86.format(n=1, more="")}
    )
    assert not detect_hardware(CPU, root=mixed).bf16


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/job/me\n",
            "sys/fs/cgroup/job/memory.max": "4000\n",
            "sys/fs/cgroup/job/me/memory.max": "max",
        },
        {"proc/self/cgroup": "0::/not/seen/here\n", "sys/fs/cgroup/memory.max": "4000\n"},
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/me\n",
            "sys/fs/cgroup/memory/me/memory.limit_in_bytes": "4000\n",
        },
    ],
    ids=["v2 parent", "v2 inside a container", "v1"],
)
def test_container_memory_limit(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_memory(cpu_tree(tmp_path, **files)) == 4000


def test_no_container_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    root = cpu_tree(tmp_path, **files)
    assert usable_memory(root) == 16_000_000 * 1024
    assert usable_cores(root) == len(os.sched_getaffinity(0))


def test_cores_by_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    v2 = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}
    quota, period = "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us"
    v1 = {"proc/self/cgroup": "5:cpu:/\n", quota: "50000\n", period: "100000\n"}
    free = {"proc/self/cgroup": "5:cpu:/\n", quota: "-1\n", period: "100000\n"}
    assert usable_cores(tree(tmp_path / "none", {})) == 12
    assert usable_cores(tree(tmp_path / "v2", v2)) == 4
    assert usable_cores(tree(tmp_path / "v1", v1)) == 1
    assert usable_cores(tree(tmp_path / "free", free)) == 12


def test_gpus(tmp_path: Path) -> None:
    env = smi(tmp_path, [H100.format(i=i) for i in range(4)])
    found = detect_hardware(AUTO, root=cpu_tree(tmp_path), env=env, torch_has_cuda=True)
    assert (found.device, found.num_devices, found.device_name) == ("cuda", 4, "NVIDIA H100 80GB HBM3")
    assert (found.memory_bytes, found.bf16, found.peak_flops) == (81559 * 2**20, True, 989.4e12)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        ("GPU-aa1", [1]),
        ("GPU-aa", []),
        ("0,7,1", [0]),
        ("-1", []),
        ("0, 2", [0, 2]),
    ],
)
def test_visible_devices(tmp_path: Path, visible: str, indices: list[int]) -> None:
    env = smi(tmp_path, [H100.format(i=i) for i in range(4)]) | {"CUDA_VISIBLE_DEVICES": visible}
    assert [gpu.index for gpu in query_gpus(env)] == indices


def test_gpu_without_bf16_takes_the_fp32_peak(tmp_path: Path) -> None:
    env = smi(tmp_path, [T4.format(i=0)])
    found = detect_hardware(CUDA, root=cpu_tree(tmp_path), env=env, torch_has_cuda=True)
    assert (found.bf16, found.peak_flops) == (False, 8.1e12)


def test_unlike_and_unknown_gpus(tmp_path: Path) -> None:
    env = smi(tmp_path, [H100.format(i=0), T4.format(i=1)])
    both = detect_hardware(CUDA, root=cpu_tree(tmp_path), env=env, torch_has_cuda=True)
    assert both.unlike == ("0: NVIDIA H100 80GB HBM3", "1: Tesla T4")
    # A single process takes the first.
    assert (both.bf16, both.memory_bytes, both.peak_flops) == (True, 81559 * 2**20, 989.4e12)
    alike = detect_hardware(
        CUDA, root=cpu_tree(tmp_path), env=env | {"CUDA_VISIBLE_DEVICES": "1"}, torch_has_cuda=True
    )
    assert (alike.unlike, alike.device_name) == ((), "Tesla T4")
    env = smi(tmp_path, ["0, GPU-cc, Some New GPU, [N/A], 12.0"])
    new = detect_hardware(CUDA, root=cpu_tree(tmp_path), env=env, torch_has_cuda=True)
    assert (new.bf16, new.peak_flops, new.memory_bytes) == (True, None, 16_000_000 * 1024)


@pytest.mark.parametrize(
    "env_of", [lambda t: {"PATH": str(t)}, lambda t: smi(t, ["boom"], 9), lambda t: smi(t, ["x"])]
)
def test_no_gpu(tmp_path: Path, env_of) -> None:
    env = env_of(tmp_path)
    assert detect_hardware(AUTO, root=cpu_tree(tmp_path), env=env).device == "cpu"
    with pytest.raises(MissingError, match=r"no GPU is visible(.|\n)*machine.device=auto"):
        detect_hardware(CUDA, root=cpu_tree(tmp_path), env=env, torch_has_cuda=True)


def test_gpu_with_a_cpu_build_of_torch(tmp_path: Path) -> None:
    env = smi(tmp_path, [H100.format(i=0)])
    found = detect_hardware(AUTO, root=cpu_tree(tmp_path), env=env, torch_has_cuda=False)
    assert found.device == "cpu"
    assert "the installed torch is a CPU build" in found.notes[0]
    with pytest.raises(MissingError, match=r"CPU build(.|\n)*pip install"):
        detect_hardware(CUDA, root=cpu_tree(tmp_path), env=env, torch_has_cuda=False)


def test_torch_build_is_read_right() -> None:
    import torch

    assert installed_torch_has_cuda() == (torch.version.cuda is not None)


def test_mps_needs_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(MissingError, match="not a Mac"):
        detect_hardware(MPS, root=cpu_tree(tmp_path))
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert detect_hardware(MPS, root=cpu_tree(tmp_path)).device == "mps"
    assert detect_hardware(AUTO, root=cpu_tree(tmp_path), env={"PATH": ""}).device == "mps"


def test_compiler_is_looked_for_on_path(tmp_path: Path) -> None:
    env = smi(tmp_path, [])
    assert not detect_hardware(CPU, root=cpu_tree(tmp_path), env={"PATH": str(tmp_path / "bin")}).compiler
    assert detect_hardware(CPU, root=cpu_tree(tmp_path), env=env | {"CXX": "nvidia-smi"}).compiler


@pytest.mark.parametrize(
    ("name", "bf16_tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_the_right_row_of_the_table(name: str, bf16_tflops: float | None) -> None:
    row = find_accelerator(name)
    assert (row.bf16_flops / 1e12 if row else None) == pytest.approx(bf16_tflops)


def test_gpus_without_bf16_say_so() -> None:
    assert {row.pattern for row in ACCELERATORS if row.bf16_flops is None} == {r"\bV100\b", r"\bT4\b"}
