"""What this machine has, asked without torch: processors, memory, GPUs and TPUs as this process may use them.

Container limits (cgroups), processor affinity and `CUDA_VISIBLE_DEVICES` count; what the box has beyond them
does not. Importing torch takes seconds, so `/proc`, `/sys` and `nvidia-smi` are read instead.
"""

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from llmkit.errors import MissingError
from llmkit.hardware.kinds import Hardware
from llmkit.hardware.table import find_accelerator
from llmkit.hardware.tpu import no_tpu, notes_of, query_tpus, tpu_hardware, why_unusable

BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Processor flags of bf16 matrix products in hardware; `bf16` is the name on ARM."""

FP8_CAPABILITY = 8.9
"""The compute capability from which NVIDIA's GPUs multiply in 8-bit floats (Ada, Hopper, Blackwell)."""

NVIDIA_SMI_TIMEOUT_S = 20.0
"""A first call on a machine without the persistence daemon takes several seconds."""


class WantedMachine(Protocol):
    """The part of a recipe's `machine` section that says where to compute."""

    @property
    def device(self) -> str:
        """`auto`, `cpu`, `cuda`, `mps` or `tpu`."""


def detect_hardware(
    machine: WantedMachine,
    *,
    root: Path = Path("/"),
    env: Mapping[str, str] = os.environ,
    torch_has_cuda: bool | None = None,
) -> Hardware:
    """Find what to compute on: the pinned device, else GPUs, else TPUs, else Apple's, else the processor.

    Args:
        machine: A recipe's `machine` section.
        root: Where `proc`, `sys` and `dev` are; tests put a made-up tree here.
        env: The environment; `PATH`, `CUDA_VISIBLE_DEVICES` and what names a TPU are read.
        torch_has_cuda: Whether the installed torch can use GPUs; by default read from its version file.

    Raises:
        MissingError: The pinned device is not on this machine, or the installed torch cannot use it.
    """
    if machine.device == "cpu":
        return detect_cpu(root=root, env=env)
    if machine.device == "mps":
        return _detect_mps(root=root, env=env, pinned=True)
    if machine.device == "tpu":
        return _detect_tpu(root=root, env=env)
    gpus = query_gpus(env)
    usable = installed_torch_has_cuda() if torch_has_cuda is None else torch_has_cuda
    if gpus and usable:
        return _cuda_hardware(gpus, root=root, env=env)
    if machine.device == "cuda":
        raise _no_cuda(gpus)
    chips = query_tpus(root)
    if chips is not None and not why_unusable(chips)[0]:
        return tpu_hardware(chips, cores=usable_cores(root))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return _detect_mps(root=root, env=env, pinned=False)
    notes = (_cpu_build_note(gpus),) if gpus else ()
    return detect_cpu(root=root, env=env, notes=(*notes, *notes_of(chips, env)))


def _detect_tpu(*, root: Path, env: Mapping[str, str]) -> Hardware:
    """The TPU chips of this machine, which are pinned."""
    chips = query_tpus(root)
    if chips is None or why_unusable(chips)[0]:
        raise no_tpu(chips, env)
    return tpu_hardware(chips, cores=usable_cores(root))


def _no_cuda(gpus: list["Gpu"]) -> MissingError:
    """The error for a pinned `cuda` that cannot be had."""
    if gpus:
        hint = "install the CUDA build: pip install --force-reinstall torch (see pytorch.org/get-started)"
        return MissingError(
            f"{len(gpus)} GPU(s) found ({gpus[0].name}), but the installed torch is a CPU build", hint=hint
        )
    return MissingError(
        "the recipe pins machine.device to cuda, but no GPU is visible here",
        hint="check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or add machine.device=auto to the command",
    )


def _cpu_build_note(gpus: list["Gpu"]) -> str:
    return f"{len(gpus)} GPU(s) found ({gpus[0].name}) but not used: the installed torch is a CPU build"


def installed_torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, read from its version file without importing it.

    A torch whose version file says nothing is taken to have it; the worker's own check then decides.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        return True
    found = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", version_file.read_text(encoding="utf-8"), re.MULTILINE)
    return found is None or found.group(1).strip() != "None"


# --- GPUs ---


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi reports it; `compute_capability` such as 9.0 says what it can do."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    compute_capability: float


def query_gpus(env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The NVIDIA GPUs this process may use, in the order `CUDA_VISIBLE_DEVICES` gives.

    Empty when there is no nvidia-smi, it fails, or none is visible. GPUs of other makers are not looked for.
    """
    program = shutil.which("nvidia-smi", path=env.get("PATH"))
    if program is None:
        return []
    query = "--query-gpu=index,uuid,name,memory.total,compute_cap"
    try:
        done = subprocess.run(  # noqa: S603 - the program is found on PATH, nothing of the user's is passed
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
            env=dict(env),
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return visible_gpus(_parse_gpus(done.stdout), env.get("CUDA_VISIBLE_DEVICES"))


def _parse_gpus(csv: str) -> list[Gpu]:
    gpus = []
    for line in csv.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5 or not cells[0].isdigit():
            continue
        memory = int(cells[3]) * 2**20 if cells[3].isdigit() else 0
        capability = float(cells[4]) if re.fullmatch(r"\d+(\.\d+)?", cells[4]) else 0.0
        gpus.append(Gpu(int(cells[0]), cells[1], cells[2], memory, capability))
    return gpus


def visible_gpus(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Apply `CUDA_VISIBLE_DEVICES` as CUDA does: indices or UUID prefixes, cut at the first unknown one."""
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    for word in (part.strip() for part in visible.split(",")):
        found = [
            g for g in gpus if (word == str(g.index) if word.isdigit() else word and g.uuid.startswith(word))
        ]
        if len(found) != 1:
            break
        chosen.append(found[0])
    return chosen


def _cuda_hardware(gpus: list[Gpu], *, root: Path, env: Mapping[str, str]) -> Hardware:
    """Hardware for GPUs; of unlike ones the first is told, which is what a single process takes."""
    names = list(dict.fromkeys(g.name for g in gpus))
    alike = gpus if len(names) == 1 else gpus[:1]
    bf16 = alike[0].compute_capability >= 8.0
    smallest = min(g.memory_bytes for g in alike)
    row = find_accelerator(names[0])
    peak = (row.bf16_flops if bf16 else row.fp32_flops) if row else None
    notes = []
    if smallest == 0:
        notes.append("nvidia-smi does not say how much memory the GPU has; the machine's memory is taken")
    return Hardware(
        device="cuda",
        num_devices=len(gpus),
        device_name=names[0],
        memory_bytes=smallest or usable_memory(root),
        cores=usable_cores(root),
        bf16=bf16,
        peak_flops=peak,
        compiler=_has_compiler(env),
        notes=tuple(notes),
        fp8=alike[0].compute_capability >= FP8_CAPABILITY,
        memory_bandwidth=row.memory_bandwidth if row else None,
        link=row.link if row else None,
        network=row.network if row else None,
        price=row.price if row else None,
        unlike=tuple(f"{g.index}: {g.name}" for g in gpus) if len(names) > 1 else (),
        host_memory_bytes=usable_memory(root),
    )


# --- processors ---


def detect_cpu(
    *, root: Path = Path("/"), env: Mapping[str, str] = os.environ, notes: tuple[str, ...] = ()
) -> Hardware:
    """The processor, with the cores and memory this process may use."""
    cpuinfo = _read(root / "proc/cpuinfo")
    return Hardware(
        device="cpu",
        num_devices=1,
        device_name=_cpu_name(cpuinfo),
        memory_bytes=usable_memory(root),
        cores=usable_cores(root),
        bf16=bool(_cpu_flags(cpuinfo) & BF16_CPU_FLAGS),
        peak_flops=None,
        compiler=_has_compiler(env),
        notes=notes,
    )


def _detect_mps(*, root: Path, env: Mapping[str, str], pinned: bool) -> Hardware:
    """Apple's GPU, which shares the machine's memory; its bf16 support varies by system version, so fp32."""
    if pinned and not (platform.system() == "Darwin" and platform.machine() == "arm64"):
        raise MissingError(
            "the recipe pins machine.device to mps, but this is not a Mac with Apple silicon",
            hint="add machine.device=auto to the command",
        )
    memory, cores = usable_memory(root), usable_cores(root)
    return Hardware(
        "mps", 1, "Apple GPU", memory, cores, bf16=False, peak_flops=None, compiler=_has_compiler(env)
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, cut by the container's quota (rounded up), at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [q for folder in _cgroup_folders(root, "cpu") if (q := _cpu_quota(folder)) is not None]
    return max(1, min([allowed, *(math.ceil(q) for q in quotas)]))


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use: the machine's, cut by the container's limit."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    total = int(found.group(1)) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        int(text)
        for folder in _cgroup_folders(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _read(folder / name).strip()).isdigit()
    ]
    return min([total, *limits])


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time that a cgroup folder (v2, else v1) allows, or None where it sets no limit."""
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Every cgroup folder that limits this process for `controller`, own first, up to the top (v2 and v1).

    Inside a container the path in /proc may not exist below /sys: the folders above it that do are still
    read.
    """
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = top / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == top or top in folder.parents]
    return folders


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Flags that every listed core has; x86 calls the line `flags`, ARM `Features`."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else frozenset()


def _cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _has_compiler(env: Mapping[str, str]) -> bool:
    """Whether torch.compile finds a C++ compiler: the one `CXX` names, or one of the usual names."""
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    return any(shutil.which(name, path=env.get("PATH")) for name in names)


def _read(path: Path) -> str:
    """A small text file; nothing where it is not there or may not be read (sandboxes hide /proc and /sys)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
