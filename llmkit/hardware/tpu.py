"""TPU chips of this machine, found without torch and without asking the network.

Google's runtime opens chips through VFIO: a chip counts when the PCI bus shows it and `/dev/vfio` has its group, which
is how torch_tpu counts them too. What the environment says (`TPU_ACCELERATOR_TYPE`, `TORCH_TPU_TOPOLOGY`) is no chip;
it is only told where it speaks of chips that are not there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmkit.errors import MissingError
from llmkit.hardware.kinds import Hardware
from llmkit.hardware.table import TPUS

PACKAGES = ("torch_tpu", "libtpu")
"""What torch needs to compute on TPUs. Without the second the first ends the whole process when it is imported."""
INSTALL = 'pip install "llmkit[tpu]"'

_GOOGLE = "0x1ae0"
_KINDS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "v7"}
"""Generations by PCI device. **Source**: `torch_tpu/_internal/utils/hardware.py` of torch_tpu 0.2.0."""
_SPEAKS = ("TPU_ACCELERATOR_TYPE", "TORCH_TPU_TOPOLOGY")


@dataclass(frozen=True)
class Chips:
    """What was found.

    Attributes:
        kind: The generation, as in `v5e-8`.
        count: Chips that a process here can open.
        closed: Chips that the bus shows and `/dev/vfio` does not: an older driver, or a container without them.
    """

    kind: str
    count: int
    closed: int = 0


def query_tpus(root: Path = Path("/")) -> Chips | None:
    """The TPU chips of this machine; None where there are none.

    Args:
        root: Where `sys` and `dev` are.
    """
    found: list[tuple[str, bool]] = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        kind = _KINDS.get(_word(device / "device"))
        if _word(device / "vendor") == _GOOGLE and kind is not None:
            group = device / "iommu_group"
            found.append((kind, group.exists() and (root / "dev/vfio" / group.resolve().name).exists()))
    if not found:
        return None
    count = sum(is_open for _, is_open in found)
    return Chips(found[0][0], count, len(found) - count)


def missing_packages() -> list[str]:
    """Those of `PACKAGES` that are not installed; nothing is imported."""
    return [name for name in PACKAGES if find_spec(name) is None]


def why_unusable(chips: Chips) -> tuple[str, str]:
    """Why chips that are there cannot be computed on, and what helps; two empty texts where they can."""
    what = f"{chips.count + chips.closed} TPU chip(s) found (TPU {chips.kind})"
    if not chips.count:
        return f"{what}, but /dev/vfio does not have them", (
            "give the container the devices (docker run --privileged, or --device /dev/vfio), or use a TPU VM whose "
            "runtime has VFIO"
        )
    if all(kind.name != chips.kind for kind in TPUS):
        known = ", ".join(kind.name for kind in TPUS)
        return f"{what}, but this version knows {known} only", "add machine.device=cpu to the command"
    missing = missing_packages()
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{what}, but {' and '.join(missing)} {verb} not installed", INSTALL
    return "", ""


def tpu_hardware(chips: Chips, *, cores: int) -> Hardware:
    """What there is to compute with on a machine with TPU chips that can be used."""
    chip = next(kind.chip for kind in TPUS if kind.name == chips.kind)
    return Hardware(
        device="tpu",
        num_devices=chips.count,
        device_name=f"TPU {chips.kind}",
        memory_bytes=chip.memory_bytes,
        cores=cores,
        bf16=True,
        peak_flops=chip.bf16_flops,
        memory_bandwidth=chip.memory_bandwidth,
        link=chip.link,
        network=chip.link * chips.count,
        price=chip.price,
    )


def no_tpu(chips: Chips | None, env: Mapping[str, str]) -> MissingError:
    """The error for a pinned `tpu` that cannot be had."""
    if chips is not None:
        why, help_ = why_unusable(chips)
        return MissingError(f"the recipe pins machine.device to tpu: {why}", hint=help_)
    said = spoken_of(env)
    return MissingError(
        "the recipe pins machine.device to tpu, but no TPU is visible here"
        + (f", although {said}" if said else ""),
        hint="run it on a TPU VM (`lspci -d 1ae0:` shows the chips), or add machine.device=auto to the command",
    )


def spoken_of(env: Mapping[str, str]) -> str:
    """What the environment says of TPUs, in words; empty where it says nothing."""
    return ", ".join(f"{name} is {env[name]}" for name in _SPEAKS if env.get(name))


def notes_of(chips: Chips | None, env: Mapping[str, str]) -> tuple[str, ...]:
    """What a plan says where another device is taken though there are chips, or the environment speaks of some."""
    if chips is not None:
        why, help_ = why_unusable(chips)
        return (f"{why}, so they are not used: {help_}",) if why else ()
    said = spoken_of(env)
    return (f"{said}, but no TPU is visible here",) if said else ()


def _word(path: Path) -> str:
    try:
        return re.sub(r"\s", "", path.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return ""
