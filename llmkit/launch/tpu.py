"""What processes on TPU chips must find in their environment, decided by their parent. No torch.

Each process opens one chip; the chips find each other at a list of addresses, one a process in the order of ranks, in a
mesh of a shape that must be known. torch_tpu's `set_tpu_launch_env` sets the same variables, but needs torch, asks the
bus, and changes this process; here they are a function of numbers.
"""

import re
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack

from llmkit.errors import UsageError

ADDRESSES = "TORCH_TPU_SLICEBUILDER_ADDRESSES"
TOPOLOGY = "TORCH_TPU_TOPOLOGY"
SESSION = "TORCH_TPU_XPROF_SESSION_ID"

_MESHES: Mapping[str, Mapping[int, str]] = {
    "v4": {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,2,2"},
    "v5p": {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,2,2"},
    "v5e": {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"},
    "v6e": {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"},
}
"""Meshes of so many chips of one machine. **Source**: torch_tpu 0.2.0, `_internal/utils/hardware.py`."""


def mesh_of(kind: str, count: int) -> str:
    """The mesh of some chips of one machine.

    Args:
        kind: The generation: `v5e`, or `TPU v5e` as `Hardware.device_name` has it.
        count: How many chips.

    Raises:
        UsageError: The machine's chips cannot be parted so.
    """
    meshes = _MESHES.get(kind.removeprefix("TPU "), {})
    if count in meshes:
        return meshes[count]
    fits = ", ".join(map(str, meshes))
    raise UsageError(
        f"{count} processes cannot share the chips of a machine with {kind}: no part of its mesh has so many",
        hint=f"machine.processes is one of {fits}" if fits else "this generation is not known",
    )


def parse_mesh(topology: str) -> tuple[int, int, int]:
    """`4x4` or `2,2,1` -> three sides; what is left out is 1, and cores of a chip, the fourth, are left out.

    Raises:
        UsageError: It is not of that form.
    """
    words = [word for word in re.split(r"[,xX]", topology) if word]
    if not words or not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(
            f"{TOPOLOGY} is {topology!r}, which are no sides of a mesh", hint="for example 2,2,1 or 4x4"
        )
    x, y, z, *_ = [*(int(word) for word in words), 1, 1]
    return x, y, z


def launch_environment(kind: str, count: int, env: Mapping[str, str]) -> dict[str, str]:
    """What the processes on the chips of one machine must find, beside torch's own words for rank and world size.

    What is in the environment already stays: someone has said it.

    Args:
        kind: The generation of the chips.
        count: How many processes there are, one a chip.
        env: The environment.

    Raises:
        UsageError: The machine's chips cannot be parted so, or what is set does not fit.
    """
    topology = env.get(TOPOLOGY) or mesh_of(kind, count)
    x, y, z = parse_mesh(topology)
    if x * y * z != count:
        raise UsageError(
            f"{TOPOLOGY} is {topology}, a mesh of {x * y * z} chips, and there are {count} processes",
            hint=f"one process a chip: machine.processes={x * y * z}, or another {TOPOLOGY}",
        )
    addresses = env.get(ADDRESSES) or ",".join(f"localhost:{port}" for port in _free_ports(count))
    if len(addresses.split(",")) != count:
        raise UsageError(
            f"{ADDRESSES} has {len(addresses.split(','))} addresses, and there are {count} processes",
            hint="leave it unset: free ports of this machine are found",
        )
    return {ADDRESSES: addresses, TOPOLOGY: topology, SESSION: env.get(SESSION) or str(time.time_ns())}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
