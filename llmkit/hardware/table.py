"""What is publicly known of accelerators: arithmetic, memory, links, and what an hour of one costs."""

import re
from dataclasses import dataclass

T = 1e12
GB = 10**9


@dataclass(frozen=True)
class Accelerator:
    """One row of the table.

    Attributes:
        pattern: Regular expression searched in the name that nvidia-smi gives; of a TPU, in its kind.
        bf16_flops: Dense bf16 peak in FLOP/s (tensor cores, fp32 accumulation); None where the
            hardware has no bf16.
        fp32_flops: fp32 peak in FLOP/s, without tensor cores; None where the maker gives none.
        memory_bytes: Memory of the usual variant, in the maker's round figure.
        memory_bandwidth: Bytes a second between chip and memory.
        link: Bytes a second that one sends to the others of its machine: NVLink, PCIe, or a TPU's interconnect.
        network: Bytes a second that a usual machine with these sends to others; None where there is none that is usual.
        price: Dollars that an hour of one costs, low and high; None where there is no list price that is widely known.
        fp8_flops: Dense 8-bit float peak in FLOP/s; None where the hardware has none.
        names: What a person calls it (`--on 8xH100`), the usual name first; empty: not by itself.
    """

    pattern: str
    bf16_flops: float | None
    fp32_flops: float | None
    memory_bytes: int
    memory_bandwidth: float
    link: float
    network: float | None = None
    price: tuple[float, float] | None = None
    fp8_flops: float | None = None
    names: tuple[str, ...] = ()


_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9

ACCELERATORS: tuple[Accelerator, ...] = (
    Accelerator(r"\bGB200\b", 2500 * T, 80 * T, 186 * GB, 8e12, 900e9, 200e9, None, 5000 * T, ("GB200",)),
    Accelerator(
        r"\bB200\b", 2250 * T, 75 * T, 180 * GB, 8e12, 900e9, 400e9, (3.8, 14.3), 4500 * T, ("B200",)
    ),
    Accelerator(r"\bGH200\b", 989.4 * T, 66.9 * T, 96 * GB, 4e12, 450e9, 50e9, None, 1978.9 * T, ("GH200",)),
    Accelerator(
        r"\bH200\b(?!.*NVL)",
        989.4 * T,
        66.9 * T,
        141 * GB,
        4.8e12,
        450e9,
        400e9,
        (2.5, 10.6),
        1978.9 * T,
        ("H200", "H200-SXM"),
    ),
    Accelerator(
        r"\bH200 NVL\b", 835 * T, 60 * T, 141 * GB, 4.8e12, 450e9, None, None, 1671 * T, ("H200-NVL",)
    ),
    Accelerator(
        r"\bH100 NVL\b", 835 * T, 60 * T, 94 * GB, 3.9e12, 300e9, None, None, 1671 * T, ("H100-NVL",)
    ),
    Accelerator(
        r"\bH100 PCIe\b", 756 * T, 51 * T, 80 * GB, 2e12, _PCIE5, None, (1.9, 3.3), 1513 * T, ("H100-PCIe",)
    ),
    Accelerator(
        r"\bH[18]00\b",
        989.4 * T,
        66.9 * T,
        80 * GB,
        3.35e12,
        450e9,
        400e9,
        (2.0, 12.3),
        1978.9 * T,
        ("H100", "H100-SXM", "H100-80GB"),
    ),
    Accelerator(
        r"\bA100-PCIE-40GB",
        312 * T,
        19.5 * T,
        40 * GB,
        1.555e12,
        _PCIE4,
        None,
        None,
        None,
        ("A100-PCIE-40GB",),
    ),
    Accelerator(
        r"\bA100.*40GB", 312 * T, 19.5 * T, 40 * GB, 1.555e12, 300e9, 200e9, (1.2, 4.1), None, ("A100-40GB",)
    ),
    Accelerator(
        r"\bA100.*PCIe\b",
        312 * T,
        19.5 * T,
        80 * GB,
        1.935e12,
        _PCIE4,
        None,
        (1.2, 2.4),
        None,
        ("A100-PCIe",),
    ),
    Accelerator(
        r"\bA[18]00\b",
        312 * T,
        19.5 * T,
        80 * GB,
        2.039e12,
        300e9,
        200e9,
        (1.3, 5.2),
        None,
        ("A100", "A100-80GB", "A100-SXM"),
    ),
    Accelerator(
        r"\bL40S\b", 362 * T, 91.6 * T, 48 * GB, 0.864e12, _PCIE4, None, (0.8, 1.9), 733 * T, ("L40S",)
    ),
    Accelerator(r"\bL40\b", 181 * T, 90.5 * T, 48 * GB, 0.864e12, _PCIE4, None, None, 362 * T, ("L40",)),
    Accelerator(r"\bL4\b", 121 * T, 30.3 * T, 24 * GB, 0.3e12, _PCIE4, None, (0.4, 0.9), 242 * T, ("L4",)),
    Accelerator(r"\bA40\b", 149.7 * T, 37.4 * T, 48 * GB, 0.696e12, _PCIE4, None, (0.4, 1.3), None, ("A40",)),
    Accelerator(r"\bA10G\b", 70 * T, 31.5 * T, 24 * GB, 0.6e12, _PCIE4, None, (1.0, 1.7), None, ("A10G",)),
    Accelerator(r"\bA10\b", 125 * T, 31.2 * T, 24 * GB, 0.6e12, _PCIE4, None, (0.6, 0.8), None, ("A10",)),
    Accelerator(
        r"RTX 5090\b(?! Laptop)",
        209.5 * T,
        104.8 * T,
        32 * GB,
        1.792e12,
        _PCIE5,
        None,
        (0.6, 0.9),
        419 * T,
        ("RTX-5090", "5090"),
    ),
    Accelerator(
        r"RTX 4090\b(?! Laptop)",
        165.2 * T,
        82.6 * T,
        24 * GB,
        1.008e12,
        _PCIE4,
        None,
        (0.3, 0.7),
        330.3 * T,
        ("RTX-4090", "4090"),
    ),
    Accelerator(
        r"RTX 3090 Ti\b",
        80 * T,
        40 * T,
        24 * GB,
        1.008e12,
        _PCIE4,
        None,
        None,
        None,
        ("RTX-3090-Ti", "3090-Ti"),
    ),
    Accelerator(
        r"RTX 3090\b",
        71 * T,
        35.6 * T,
        24 * GB,
        0.936e12,
        _PCIE4,
        None,
        (0.2, 0.5),
        None,
        ("RTX-3090", "3090"),
    ),
    Accelerator(r"\bV100\b", None, 15.7 * T, 32 * GB, 0.9e12, 150e9, 50e9, (0.5, 3.1), None, ("V100",)),
    Accelerator(r"\bT4\b", None, 8.1 * T, 16 * GB, 0.32e12, _PCIE3, None, (0.35, 0.75), None, ("T4",)),
)
"""Dense peaks of known GPUs; the first pattern that matches counts.

Source: NVIDIA's data sheets of these products; where they give only the figure with sparsity (H100, H200, L4,
L40S) it is halved, and so is a link's figure for both directions together. RTX: the Ampere, Ada and Blackwell
architecture white papers, tensor cores with fp32 accumulation. A10G: AWS's figure for its own variant. `network`: of
the maker's own machines with eight of them (DGX-1 V100: 4 x 100 Gbit/s; DGX A100: 8 x 200 Gbit/s; DGX H100, H200,
B200: 8 x 400 Gbit/s; of GH200 one 400 Gbit/s a chip, of GB200 four a tray); what is rented often has less. The memory
column is that of print, a few percent less than nvidia-smi reports, which a plan takes where it can ask.

Prices are assumptions, not data: about what lists asked in the middle of 2025 for one device of the usual machine on
demand, the low end of clouds that rent out GPUs alone, the high end of the three large ones. Nobody keeps them up to
date, and they differ by region and contract: `--price` takes your own.
"""


@dataclass(frozen=True)
class TpuKind:
    """One generation of TPUs.

    Attributes:
        name: As in an accelerator type: `v5e` of `v5e-8`.
        chip: What one chip can.
        cores_per_chip: What the number in an accelerator type counts: TensorCores (2 a chip) or chips (1).
        chips_per_host: Of a slice of several machines.
        most_on_one_host: Chips of the largest slice that is one machine.
        slices: Chips of the slices that there are, rising.
    """

    name: str
    chip: Accelerator
    cores_per_chip: int
    chips_per_host: int
    most_on_one_host: int
    slices: tuple[int, ...]


_FLAT = (1, 4, 8, 16, 32, 64, 128, 256)


def _cubes(most: int) -> tuple[int, ...]:
    """Parts of a cube of 64 chips, and cubes."""
    return (4, 8, 16, 32, *range(64, most + 1, 64))


def _tpu(
    name: str, flops: float, memory: int, bandwidth: float, link: float, price: tuple[float, float]
) -> Accelerator:
    return Accelerator(rf"^TPU {name}$", flops, None, memory, bandwidth, link, link, price, names=(name,))


TPUS: tuple[TpuKind, ...] = (
    TpuKind("v4", _tpu("v4", 275 * T, 32 * GB, 1.2e12, 300e9, (1.45, 3.22)), 2, 4, 4, _cubes(4096)),
    TpuKind("v5e", _tpu("v5e", 197 * T, 16 * GB, 0.819e12, 200e9, (0.54, 1.56)), 1, 4, 8, _FLAT),
    TpuKind("v5p", _tpu("v5p", 459 * T, 95 * GB, 2.765e12, 600e9, (1.89, 4.20)), 2, 4, 4, _cubes(6144)),
    TpuKind("v6e", _tpu("v6e", 918 * T, 32 * GB, 1.638e12, 400e9, (1.22, 2.97)), 1, 4, 8, _FLAT),
)
"""Google's TPUs.

Source: the pages of each generation in Cloud TPU's documentation: peak compute, HBM, slices, and the inter-chip
interconnect, of which one direction is half of what they give for both (v4: six links of 50 GB/s, Jouppi et al. 2023);
the chips of a slice talk over it whichever machine they are in. Of the three-dimensional slices all whole numbers of
cubes are taken to exist, which is nearly true. Prices are assumptions: about Cloud TPU's list in the middle of 2025, a
chip an hour, low with a commitment of three years, high on demand.
"""


def find_accelerator(name: str) -> Accelerator | None:
    """The table's row for a GPU name as nvidia-smi spells it, or None for one it does not know."""
    return next((row for row in ACCELERATORS if re.search(row.pattern, name, re.IGNORECASE)), None)
