"""What there is to compute with, found on this machine or named."""

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda", "mps", "tpu"]


@dataclass(frozen=True)
class Hardware:
    """What there is to compute with.

    Attributes:
        device: The kind of device.
        num_devices: GPUs or TPU chips of one machine that this process may use; 1 on CPU and MPS.
        device_name: The maker's name of the device.
        memory_bytes: Memory of one device; on CPU and MPS the machine's, as far as this process may use it.
        cores: Processor cores this process may use.
        bf16: Whether the device multiplies bf16 matrices in hardware.
        peak_flops: The maker's dense figure for one device, bf16 where `bf16` holds and fp32 otherwise; None
            where it is unknown, which on CPU it is until measured.
        compiler: Whether a C++ compiler is on PATH, which torch.compile needs.
        notes: Remarks a person should see in the plan.
        unlike: Names of the devices, where they are not all of one kind: only one of them can be used at a time.
        host_memory_bytes: The memory of the machine around GPUs, as far as this process may use it; None where it is
            unknown, or is the device's.
        fp8: Whether the device multiplies matrices of 8-bit floats.
        nodes: Machines of this kind, where it was named; None: as many as the recipe says.
        memory_bandwidth: Bytes a second between a device and its memory; None where it is unknown.
        link: Bytes a second that a device sends to the others of its machine; None where it is unknown.
        network: Bytes a second that a machine sends to the others; None where it is unknown.
        price: Dollars that an hour of a device costs, low and high; None where it is unknown.
    """

    device: Device
    num_devices: int
    device_name: str
    memory_bytes: int
    cores: int
    bf16: bool
    peak_flops: float | None
    compiler: bool = True
    notes: tuple[str, ...] = ()
    fp8: bool = False
    nodes: int | None = None
    memory_bandwidth: float | None = None
    link: float | None = None
    network: float | None = None
    price: tuple[float, float] | None = None
    unlike: tuple[str, ...] = ()
    host_memory_bytes: int | None = None
