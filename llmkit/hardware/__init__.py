"""Hardware, found (`detect`) or named (`named`), with what is publicly known of it (`table`). No torch."""

from llmkit.hardware.detect import (
    BF16_CPU_FLAGS,
    FP8_CAPABILITY,
    Gpu,
    WantedMachine,
    detect_cpu,
    detect_hardware,
    installed_torch_has_cuda,
    query_gpus,
    usable_cores,
    usable_memory,
    visible_gpus,
)
from llmkit.hardware.elsewhere import detect_elsewhere
from llmkit.hardware.kinds import Device, Hardware
from llmkit.hardware.named import known_names, named_hardware, split_names
from llmkit.hardware.table import ACCELERATORS, GB, Accelerator, find_accelerator

__all__ = [
    "ACCELERATORS",
    "BF16_CPU_FLAGS",
    "FP8_CAPABILITY",
    "GB",
    "Accelerator",
    "Device",
    "Gpu",
    "Hardware",
    "WantedMachine",
    "detect_cpu",
    "detect_elsewhere",
    "detect_hardware",
    "find_accelerator",
    "installed_torch_has_cuda",
    "known_names",
    "named_hardware",
    "query_gpus",
    "split_names",
    "usable_cores",
    "usable_memory",
    "visible_gpus",
]
