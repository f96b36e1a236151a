"""A model's copy on the host, for devices that files cannot be written from, or on which texts cannot grow."""

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def on_host(module: Module) -> Module:
    """A copy of a module whose tensors are on the host; the device holds nothing more while it is made."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, object] = {}
    for tensor in tensors:
        held = tensor.detach().cpu()
        memo[id(tensor)] = (
            nn.Parameter(held, requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else held
        )
    made: Module = copy.deepcopy(module, memo)
    return made


def on_host_or_here(module: Module) -> Module:
    """A module where files can be written from it and rows may have any length: itself, but of a TPU's a host copy."""
    device = next((tensor.device.type for tensor in (*module.parameters(), *module.buffers())), "cpu")
    return on_host(module) if device == "tpu" else module
