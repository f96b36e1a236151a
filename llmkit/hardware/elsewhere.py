"""What verbs compute on that do not compute on TPUs: all but `pretrain`, whose rows alone have one length."""

from collections.abc import Callable

from llmkit.errors import UsageError
from llmkit.hardware.detect import WantedMachine, detect_cpu, detect_hardware
from llmkit.hardware.kinds import Hardware


def detect_elsewhere(
    machine: WantedMachine, verb: str, tell: Callable[[str], object] | None = None
) -> Hardware:
    """As `detect_hardware`, but the processor where that finds a TPU; that it does so is noted.

    Args:
        machine: A recipe's `machine` section.
        verb: Who asks, for the message.
        tell: Gets the note, where the caller shows no plan that has it.

    Raises:
        UsageError: The recipe pins `tpu`.
        MissingError: As of `detect_hardware`.
    """
    if machine.device == "tpu":
        raise UsageError(
            f"machine.device is tpu, and {verb} has rows of many lengths: a TPU compiles each length anew",
            hint="only `pretrain` computes on TPUs: add machine.device=cpu to this command",
        )
    found = detect_hardware(machine)
    if found.device != "tpu":
        return found
    note = (
        f"{found.num_devices} TPU chip(s) found ({found.device_name}) but not used: {verb} has rows of many lengths, "
        "and a TPU compiles each anew"
    )
    if tell is not None:
        tell(note)
    return detect_cpu(notes=(note,))
