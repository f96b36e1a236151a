"""`llmkit doctor`: what this machine has and lacks, and the command that gets it, without importing torch."""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from operator import ge, gt, le, lt, ne
from pathlib import Path
from typing import Literal

import typer

from llmkit import __version__
from llmkit.cli.options import AsJson, Debug, Runs, described
from llmkit.cli.output import as_typed, give, give_json, say
from llmkit.errors import ExitCode
from llmkit.hardware import detect_cpu, installed_torch_has_cuda, query_gpus

State = Literal["ok", "warn", "fail"]
FLOOR_PYTHON = (3, 11)
COMPARE = {">=": ge, "<=": le, "!=": ne, "<": lt, ">": gt}
EXTRAS = {
    "zstd": "to read .zst files",
    "clean": "for `tokenize.prepare`",
    "fast": "to tokenize many times faster",
    "warc": "to read web archives",
    "zh": "for `algorithm: words`",
    "cluster": "for `machine.engine: slurm`",
    "metrics": "for BLEU and chrF",
    "adapters": "for `finetune.adapter`",
    "compress": "for `method: quantize`",
}
LITTLE_DISK_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report; `remedy` is what to do about a `warn` or `fail`."""

    name: str
    state: State
    value: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "doctor",
        short_help="Check this machine: versions, processor, GPUs, compiler, disk.",
        help=described(
            """
            llmkit doctor
            llmkit doctor --json
            """,
            "Check this machine and say what to do about what it lacks. Exit code 3: something is missing.",
        ),
    )(doctor)


def doctor(as_json: AsJson = False, runs: Runs = Path("runs"), debug: Debug = False) -> int:
    """Print every check, then the next command; 3 when one failed."""
    checks = list(examine(runs))
    failed = [check for check in checks if check.state == "fail"]
    if as_json:
        give_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            give(f"{check.state:<5} {check.name:<{width}}  {check.value}")
            if check.remedy:
                give(f"{'':<5} {'':<{width}}  -> {check.remedy}")
        say("next: " + (failed[0].remedy if failed else as_typed("llmkit demo")))
    return ExitCode.MISSING if failed else ExitCode.DONE


def examine(runs: Path) -> Iterator[Check]:
    """All checks, in the order in which a person would ask."""
    yield check_python()
    yield Check("llmkit", "ok", __version__)
    yield from check_packages()
    yield from check_processor()
    yield check_gpus()
    yield check_compiler()
    yield from check_folders(runs)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """The interpreter against the oldest that is supported."""
    text = ".".join(map(str, version))
    if version >= FLOOR_PYTHON:
        return Check("python", "ok", f"{text} ({sys.executable})")
    return Check("python", "fail", text, "install Python 3.11 or newer")


def check_packages() -> Iterator[Check]:
    """Every package that llmkit declares, against the range that it declares."""
    for requirement in metadata.requires("llmkit") or ():
        spec, _, marker = requirement.partition(";")
        name, limits = split_requirement(spec)
        if not marker.strip():
            yield check_package(name, limits, "fail", f"pip install '{name}{limits}'")
        elif (extra := re.search(r"extra == ['\"](\w+)['\"]", marker)) and extra[1] in EXTRAS:
            remedy = f"pip install 'llmkit[{extra[1]}]' {EXTRAS[extra[1]]}"
            yield check_package(name, limits, "warn", remedy)


def check_package(name: str, limits: str, missing: State, remedy: str) -> Check:
    """One package: installed, and within `limits` such as `>=5.17,<6`."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, missing, "not installed", remedy)
    if not within(version, limits):
        return Check(name, "fail", f"{version}, but llmkit needs {limits}", f"pip install '{name}{limits}'")
    return Check(name, "ok", f"{version} ({limits})")


def split_requirement(spec: str) -> tuple[str, str]:
    """`transformers<6,>=5.17` into the name and its limits, the lower one first."""
    name = re.split(r"[^\w.-]", spec.strip(), maxsplit=1)[0]
    limits = re.sub(r"\[[^]]*\]|[()\s]", "", spec.strip()[len(name) :])
    return name, ",".join(sorted(limits.split(","), reverse=True))


def within(version: str, limits: str) -> bool:
    """Whether `2.13.0+cpu` holds `>=2.11,<3`. Only the numbers count; pre-releases count as the release."""
    for operator, bound in re.findall(r"(>=|<=|!=|<|>)([\w.]+)", limits):
        have, limit = _numbers(version), _numbers(bound)
        if not COMPARE[operator](have, limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13+cpu` -> (2, 13, 0)."""
    parts = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(parts + [0] * (3 - len(parts)))


def check_processor() -> Iterator[Check]:
    """Cores, memory, and whether bf16 is in hardware, which doubles the speed of training on a processor."""
    cpu = detect_cpu()
    yield Check(
        "processor", "ok", f"{cpu.device_name}, {cpu.cores} cores, {cpu.memory_bytes / 2**30:.1f} GiB memory"
    )
    if cpu.bf16:
        yield Check("bf16", "ok", "in hardware")
    else:
        yield Check("bf16", "ok", "not in this processor; fp32 is used")


def check_gpus() -> Check:
    """NVIDIA GPUs, and whether the installed torch can use them."""
    gpus = query_gpus()
    if not gpus:
        return Check("gpus", "ok", "none; the processor is used")
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    if installed_torch_has_cuda():
        return Check("gpus", "ok", f"{len(gpus)} x {names}")
    remedy = "make install TORCH=cu130, or install torch's CUDA build (pytorch.org/get-started)"
    return Check("gpus", "warn", f"{len(gpus)} x {names}, but torch is a CPU build", remedy)


def check_compiler() -> Check:
    """A C++ compiler and Python's headers, which torch.compile needs on a processor."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return Check(
            "compiler", "warn", "no C++ compiler: no torch.compile, slower training", "apt-get install g++"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return Check(
            "compiler", "warn", "Python.h not found: no torch.compile", "apt-get install python3-dev"
        )
    return Check("compiler", "ok", found)


def check_folders(runs: Path) -> Iterator[Check]:
    """Where runs and torch's compiled kernels go: writable, with room."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, folder, option in (("runs", runs, "--runs DIR"), ("cache", home, "XDG_CACHE_HOME=DIR")):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            yield Check(name, "fail", f"{there} is not writable", f"choose another folder with {option}")
            continue
        free = shutil.disk_usage(there).free
        room = f"{folder.absolute()}, {free / 10**9:.1f} GB free"
        if free < LITTLE_DISK_BYTES:
            yield Check(name, "warn", room, f"free some space, or choose another folder with {option}")
        else:
            yield Check(name, "ok", room)
