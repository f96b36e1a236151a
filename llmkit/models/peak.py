"""What the device can do at best, measured: the denominator of model FLOPs utilisation (MFU)."""

import time

import torch


def measure_peak_flops(
    device: torch.device, dtype: torch.dtype, *, size: int | None = None, seconds: float = 0.3
) -> float:
    """Multiply two square matrices for a while; return the best FLOP/s seen.

    Args:
        device: Where to compute; with the number of threads that torch uses now.
        dtype: The type of the matrices: what the run computes its matrix products in.
        size: Rows and columns of the matrices; by default enough to fill the device.
        seconds: How long to measure.
    """
    if size is None:
        size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    _timed_product(a, b)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed_product(a, b))
    return 2 * size**3 / best


def _timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.matmul(a, b)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    elif a.device.type == "tpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
