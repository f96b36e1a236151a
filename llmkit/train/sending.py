"""Batches on their way to the device: few bytes, from memory that a GPU reads by itself, and nobody waits."""

from collections.abc import Mapping

import torch

from llmkit.objectives.base import Batch


def send(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    """A batch on the device; counts (`num_...`) stay on the host, where they are added up without waiting.

    To a GPU whole numbers travel in the fewest bytes that hold them, from memory that the GPU reads by itself, while
    the processor goes on; there they become what they were.

    Args:
        batch: On the host.
        device: Where the model is.
    """
    if device.type != "cuda":
        return {
            name: tensor if name.startswith("num_") else tensor.to(device, non_blocking=True)
            for name, tensor in batch.items()
        }
    return {
        name: tensor
        if name.startswith("num_")
        else narrow(tensor).pin_memory().to(device, non_blocking=True).to(tensor.dtype)
        for name, tensor in batch.items()
    }


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 64 bits in the fewest bytes that hold all of them; anything else as it is."""
    if tensor.dtype != torch.int64 or not tensor.numel():
        return tensor
    low, high = (int(end) for end in tensor.aminmax())
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return tensor.to(dtype)
    return tensor
