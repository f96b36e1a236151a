"""What differs between the devices below the training loop, in one place: how one is opened, left and waited for.

torch's own words (`torch.accelerator`) are used where it has them. A TPU is a device of type `tpu` that the package
torch_tpu brings; accelerate does not know it, so it is told of a run on processors whose tensors are elsewhere: then it
does what it does there (DDP without device numbers, sums over the process group), on the device it was given.
"""

import importlib
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import MissingError, RunError
from llmkit.hardware.tpu import INSTALL, missing_packages
from llmkit.launch.tpu import ADDRESSES, TOPOLOGY

_PLACE = "ACCELERATE_TORCH_DEVICE"
_BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "tpu": "cpu:gloo,tpu:tpu_dist"}


def open_device(device: str, world_size: int) -> None:
    """Make a kind of device known to torch; nothing for those that torch knows by itself.

    Args:
        device: The plan's.
        world_size: How many processes there are.

    Raises:
        MissingError: What torch needs for it is not installed.
        RunError: It is not there, or the processes were not told which chip is whose.
    """
    if device != "tpu":
        return
    missing = missing_packages()
    if missing:
        raise MissingError(f"training on a TPU needs {' and '.join(missing)}", hint=INSTALL)
    importlib.import_module("torch_tpu")
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != "tpu":
        raise RunError(
            "the plan is for tpu, but torch_tpu finds no chip"
            + (f": torch computes on {found.type}" if found is not None else ""),
            hint="does another process hold the chips, or does /dev/vfio lack them?",
        )
    if world_size > 1 and not (os.environ.get(ADDRESSES) and os.environ.get(TOPOLOGY)):
        raise RunError(
            f"{world_size} processes on TPUs, but {ADDRESSES} and {TOPOLOGY} are not set",
            hint="on one machine let llmkit start them; under torchrun put what "
            "`python -m torch.tpu.distributed` prints into the environment first",
        )


def backend_of(device: str) -> str:
    """The process group's backend: small numbers travel between hosts, what is on devices between these."""
    return _BACKENDS.get(device, "gloo")


@contextmanager
def placed(device: str) -> Iterator[bool]:
    """While this lasts an `Accelerator` can be made for the device.

    Yields:
        Its argument `cpu`.
    """
    if device != "tpu":
        yield device == "cpu"
        return
    before = os.environ.get(_PLACE)
    os.environ[_PLACE] = f"tpu:{torch.accelerator.current_device_index()}"
    try:
        yield True
    finally:
        os.environ.pop(_PLACE)
        if before is not None:
            os.environ[_PLACE] = before


def settle(core: nn.Module, device: torch.device) -> None:
    """Put a model on a TPU before its optimizer is made; on other devices accelerate does it, with the optimizer made.

    Moved there, parameters become other ones: torch cannot change their content in place as it does between processors
    and GPUs. An optimizer that was made before would go on with the old ones, and tied weights would part.
    """
    if device.type != "tpu":
        return
    core.to(device)
    for module in core.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given; a processor has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "tpu":
        torch.accelerator.synchronize()


def as_inputs(counts: Mapping[str, int], device: torch.device) -> Mapping[str, Any]:
    """Counts, one at least, as what a TPU's program reads; else it would hold them, and be made anew at each step."""
    if device.type != "tpu":
        return counts
    return {name: torch.tensor(max(1, count)).to(device) for name, count in counts.items()}


def end_step(device: torch.device) -> None:
    """Cut what is compiled in one piece at the end of a step; only where torch_tpu was told to put operations off.

    Else, in that mode, as many steps as there are between two looks at the loss would become one program.
    """
    if device.type != "tpu":
        return
    module = torch.get_device_module(device)
    if getattr(getattr(module, "eager_mode", None), "name", "") == "DEFER_AND_FUSE":
        torch.accelerator.synchronize()


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory used so far: of the GPU, or resident memory of this process on CPU; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "tpu":  # torch_tpu has no figure for that yet
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
