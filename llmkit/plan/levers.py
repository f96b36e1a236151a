"""What only some devices can do, refused while a plan is made, with the reason: 8-bit products, GPU kernels, graphs."""

from llmkit.hardware import FP8_CAPABILITY, Hardware
from llmkit.plan.batch import PlanError
from llmkit.recipe.machine import Machine


def check_levers(machine: Machine, hardware: Hardware) -> None:
    """See that the device has what the recipe pins.

    Raises:
        PlanError: It does not; the message says which setting, why, and what would work. Packages are looked for
            where the run is: the plan may be for another machine.
    """
    on_gpu = hardware.device == "cuda"
    name = f"this machine computes on {hardware.device_name}"
    if machine.precision == "fp8" and not hardware.fp8:
        raise PlanError(
            f"machine.precision is fp8, but {hardware.device_name} does not multiply in 8-bit floats: that takes an "
            f"NVIDIA GPU of compute capability {FP8_CAPABILITY} or more (L4, L40S, H100, H200, B200, RTX 4090)",
            hint="machine.precision=auto",
        )
    if machine.liger and not on_gpu:
        raise PlanError(
            f"machine.liger: Liger's kernels are for NVIDIA GPUs, and {name}", hint="machine.liger=false"
        )
    if machine.compile == "graphs" and not on_gpu:
        raise PlanError(
            f"machine.compile is graphs: CUDA graphs are for NVIDIA GPUs, and {name}",
            hint="machine.compile=true",
        )
    if machine.attention == "flex" and not on_gpu:
        raise PlanError(
            f"machine.attention is flex: FlexAttention has a backward pass on NVIDIA GPUs only, and {name}",
            hint="machine.attention=auto",
        )
