"""Whether all processes of a run are of one mind, asked before anything is built.

Under torchrun, srun or mpirun every process reads the recipe and makes the plan by itself, maybe on a machine with
other files, packages or devices. One that differs would leave the others waiting in the middle of a step, or train
something else beside them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llmkit.errors import RunError
from llmkit.launch.workplace import versions
from llmkit.train.job import Job

T = TypeVar("T")
_SHOWN, _LONGEST = 3, 60
_ONLY_TOLD = frozenset(
    (
        "choices",
        "notes",
        "memory",
        "seconds_low",
        "seconds_high",
        "step_seconds",
        "cost",
        "disk_bytes",
        "data",
    )
)
"""Of a plan, what is told of it and not carried out; machines that differ a little may estimate it differently."""


def check_processes(job: Job, device: torch.device) -> str:
    """Compare what this process is about to do with what all others are; every process calls it.

    Args:
        job: What this process was told, or has found out.
        device: Where it computes.

    Returns:
        What a person should know; empty where there is nothing.

    Raises:
        RunError: One has another recipe, plan or version: all of them raise this.
    """
    if not dist.is_initialized():
        return ""
    settings = settings_of(job)
    text = json.dumps(settings, sort_keys=True, default=str)
    everyone = _of_all((hashlib.sha256(text.encode()).hexdigest(), _name_of(device)))
    if len({found for found, _ in everyone}) > 1:
        raise RunError(
            differing(_of_all(settings)),
            hint="start the same command with the same files and packages everywhere; nothing was trained",
        )
    return told_devices([name for _, name in everyone])


def _of_all(mine: T) -> list[T]:
    """The same of every process, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def settings_of(job: Job) -> dict[str, Any]:
    """All that the processes of a run must have in common, by dotted key."""
    plan = {key: value for key, value in job.plan.items() if key not in _ONLY_TOLD}
    return {
        **_flat(versions(), "version"),
        **_flat(job.recipe, "recipe"),
        **_flat(plan, "plan"),
        **_flat(job.identity, "run"),
    }


def differing(everyone: Sequence[Mapping[str, Any]]) -> str:
    """Which process differs from the first one, and in what.

    Args:
        everyone: As of `settings_of`, by process; at least two of them differ.
    """
    first = everyone[0]
    rank, other = next((rank, one) for rank, one in enumerate(everyone) if one != first)
    keys = sorted(key for key in {**first, **other} if first.get(key) != other.get(key))
    lines = [
        f"  {key}: {_shown(first.get(key))} in process 0, {_shown(other.get(key))}" for key in keys[:_SHOWN]
    ]
    more = [f"  and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
    return "\n".join([f"process {rank} is about to do something else than process 0:", *lines, *more])


def told_devices(names: Sequence[str]) -> str:
    """A remark where processes compute on devices of several kinds.

    Args:
        names: Of the devices, by process.
    """
    other = next((rank for rank, name in enumerate(names) if name != names[0]), None)
    if other is None:
        return ""
    return (
        f"process {other} computes on {names[other]}, process 0 on {names[0]}: each step waits for the slowest, and "
        "the plan counts on the memory of the first"
    )


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _flat(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}.{key}")
        else:
            found[f"{prefix}.{key}"] = value
    return found


def _shown(value: object) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
