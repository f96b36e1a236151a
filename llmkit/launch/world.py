"""Which worker of how many this process is, as whoever started it says in the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmkit.errors import RunError
from llmkit.launch.network import resolve


@dataclass(frozen=True)
class World:
    """This process's place among the workers.

    Attributes:
        rank: Its number, from 0.
        world_size: How many workers there are on all machines.
        local_rank: Its number on this machine, from 0: the GPU it takes.
        local_world_size: Workers on this machine.
        source: Who said so: `torchrun`, `llmkit`, `srun` or `mpirun`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    source: str

    def environment(self, env: Mapping[str, str] = os.environ) -> dict[str, str]:
        """This place in the variables that torch and accelerate read, whoever set it up.

        Where the launcher names no meeting point, it is the first node of Slurm's job step, at a port made from the
        job's number, so that two jobs on one node do not meet.

        Raises:
            RunError: Nobody says where the workers meet.
        """
        host = env.get("MASTER_ADDR") or host_of_step(env)
        for name, known in (
            ("MASTER_ADDR", host),
            ("MASTER_PORT", env.get("MASTER_PORT") or host_of_step(env)),
        ):
            if not known:
                raise RunError(
                    f"the environment says this is rank {self.rank} of {self.world_size}, but {name} is not set",
                    hint="start the workers with torchrun or srun, or let llmkit: --processes N",
                )
        job = env.get("SLURM_JOB_ID", "0")
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": str(host),
            "MASTER_PORT": env.get("MASTER_PORT") or str(29500 + int(job) % 1000),
        }


def detect_world(env: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher set up, or None when this process was started by itself.

    Known are RANK and WORLD_SIZE (torchrun, `accelerate launch`, our own launcher), Slurm and Open MPI. Slurm's
    variables are also there in a batch script and an interactive shell: only a job step of several tasks counts.

    Raises:
        RunError: The variables contradict each other: going on would let each worker train alone.
    """
    if "LLMKIT_NODE" in env and "LLMKIT_RENDEZVOUS" not in env:
        return None  # the agent of a node (`node.become_agent`): its workers are a world, it is none
    if "RANK" in env or "WORLD_SIZE" in env:
        source = "llmkit" if "LLMKIT_RENDEZVOUS" in env else "torchrun"
        return _world(env, source, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "SLURM_STEP_ID" in env and tasks_of_step(env) > 1:
        return _slurm_world(env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        prefix = "OMPI_COMM_WORLD_"
        return _world(
            env, "mpirun", *(prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        )
    return None


def check_world(world: World | None, plan_world_size: int) -> None:
    """Refuse to go on in a world of another size than planned.

    Raises:
        RunError: The sizes differ; the message names both and what to do.
    """
    size = world.world_size if world else 1
    if size == plan_world_size:
        return
    started = (
        f"{size} worker process(es) were started by {world.source}"
        if world
        else "this process runs by itself"
    )
    raise RunError(
        f"the plan is made for {plan_world_size} process(es), but {started}",
        hint=f"start {plan_world_size} process(es), or plan for {size}: machine.processes={size}",
    )


def _world(
    env: Mapping[str, str], source: str, rank: str, size: str, local_rank: str, local_size: str
) -> World:
    """A world from four variables; without the local two all workers are on this machine."""
    world_size = number_in(env, size, at_least=1)
    number = number_in(env, rank)
    return _checked(
        World(
            rank=number,
            world_size=world_size,
            local_rank=number_in(env, local_rank, default=number),
            local_world_size=number_in(env, local_size, default=world_size, at_least=1),
            source=source,
        ),
        f"{rank} and {size}",
    )


def _checked(world: World, names: str) -> World:
    if world.rank >= world.world_size or world.local_rank >= world.local_world_size:
        raise RunError(
            f"{names} contradict each other: rank {world.rank} of {world.world_size}, on this machine "
            f"{world.local_rank} of {world.local_world_size}",
            hint="ranks count from 0; unset the variables to run by itself",
        )
    return world


def number_in(env: Mapping[str, str], name: str, *, default: int | None = None, at_least: int = 0) -> int:
    """A whole number from the environment.

    Raises:
        RunError: It is not there and there is no default, or it is something else.
    """
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise RunError(
            f"the environment says this is a worker, but {name} is not set", hint=f"set or unset all: {name}"
        )
    if not text.isascii() or not text.isdigit() or int(text) < at_least:
        raise RunError(f"{name}={text!r} in the environment is not a whole number from {at_least}")
    return int(text)


def host_of_step(env: Mapping[str, str]) -> str | None:
    """Where the first task of a Slurm job step is: by its node's name where names resolve here.

    Else the address that the step was started from: in a batch job its first node, but for an srun typed elsewhere
    another machine. None where there is no step.
    """
    first = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "")
    return first if first and _has_address(first) else env.get("SLURM_LAUNCH_NODE_IPADDR") or first or None


def first_host(nodelist: str) -> str:
    """The first name of Slurm's shorthand: `rack[03-07,12]x,other` -> `rack03x`."""
    found = re.match(r"([^\[,]*)(?:\[([0-9]+)[^\]]*\]([^\[,]*))?", nodelist)
    return "".join(part or "" for part in found.groups()) if found else ""


def _has_address(host: str) -> bool:
    try:
        return bool(resolve(host))
    except RunError:
        return False


def tasks_of_step(env: Mapping[str, str]) -> int:
    """Tasks of this job step; SLURM_NTASKS alone may be the whole job's."""
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return number_in(env, name, default=1)


def _slurm_world(env: Mapping[str, str]) -> World:
    world_size, rank = tasks_of_step(env), number_in(env, "SLURM_PROCID")
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    node = number_in(env, "SLURM_NODEID", default=0)
    local_size = counts[node] if node < len(counts) else world_size
    local_rank = number_in(env, "SLURM_LOCALID")
    return _checked(World(rank, world_size, local_rank, local_size, "srun"), "SLURM_PROCID and SLURM_NTASKS")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's shorthand written out: `2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts
