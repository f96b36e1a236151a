"""What a TPU does not do here, refused while a plan is made, with the reason.

A TPU runs programs that are compiled for the exact shapes of what they read, and compiling takes seconds to minutes: a
run whose shapes change from step to step does nothing else. So only what has the same shapes at every step is planned:
rows of one length, as many at a time, and a loss that computes every position, learned or not.
"""

from collections.abc import Iterator

from llmkit.hardware import Hardware
from llmkit.plan.batch import PlanError
from llmkit.plan.shape import ModelShape
from llmkit.recipe.machine import Machine, Parallel
from llmkit.recipe.schema import Finetune, Section

STATIC = ("clm",)
"""Objectives whose shapes were seen not to change (tests/parity/test_tpu_training.py)."""
_ELSEWHERE = "machine.device=cpu, or a GPU (`--on` another name)"


def check_tpu(machine: Machine, hardware: Hardware, wanted: Section, model: ModelShape) -> None:
    """See that a run's shapes stay the same, where they must.

    Args:
        machine: The recipe's section.
        hardware: What there is to compute with; anything but a TPU is fine.
        wanted: What is trained.
        model: The model's shape.

    Raises:
        PlanError: They do not, or nothing is known to do what is asked for; the message has the reason.
    """
    if hardware.device != "tpu":
        return
    if isinstance(wanted, Finetune):
        refuse_tuning(hardware)
    for what, why, hint in (*_changing(wanted, model), *_unknown(machine, wanted)):
        raise PlanError(f"{what} on a TPU: {why}", hint=hint)


def refuse_tuning(hardware: Hardware) -> None:
    """See that labelled rows are not to be learned from on a TPU; needs no model.

    Raises:
        PlanError: They are.
    """
    if hardware.device == "tpu":
        raise PlanError(
            "finetune on a TPU: rows have many lengths, and each would be compiled anew", hint=_ELSEWHERE
        )


def _changing(wanted: Section, model: ModelShape) -> Iterator[tuple[str, str, str]]:
    """Shapes that follow from the data."""
    if wanted.objective not in STATIC:
        known = ", ".join(STATIC)
        yield (
            f"pretrain.objective is {wanted.objective}",
            f"how many positions are learned, or how long rows are, changes from step to step ({known} does not)",
            _ELSEWHERE,
        )
    if wanted.distil is not None:
        yield "distil", "what a teacher says is gathered at positions whose number changes", _ELSEWHERE
    if not model.compiles:
        yield "a recurrent model", "its cells go through documents piece by piece", _ELSEWHERE
    if model.num_experts:
        yield "a mixture of experts", "how many tokens an expert reads changes at every step", _ELSEWHERE


def _unknown(machine: Machine, wanted: Section) -> Iterator[tuple[str, str, str]]:
    """What is written for GPUs or gloo, and nobody has seen on torch_tpu."""
    parallel = machine.parallel
    if isinstance(parallel, Parallel) and parallel.tensor * parallel.expert > 1:
        yield (
            "machine.parallel: tensor and expert",
            "generators of random numbers are kept alike on processors and NVIDIA GPUs only",
            "machine.parallel=fsdp",
        )
    if machine.offload:
        yield "machine.offload", "it copies through pinned memory of NVIDIA GPUs", "machine.offload=false"
    if machine.communication.gradients != "fp32":
        yield (
            f"machine.communication.gradients is {machine.communication.gradients}",
            "the chips of a slice talk over a network of their own that is not slow",
            "machine.communication.gradients=fp32",
        )
    if wanted.train.quantized is not None:
        yield "train.quantized", "rounding was seen on processors and NVIDIA GPUs only", "leave it out"
