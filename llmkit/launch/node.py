"""Which node of how many this machine is, where nodes work together: from the command line, else the environment."""

import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from llmkit.errors import UsageError
from llmkit.launch.network import Place, parse_place
from llmkit.launch.world import host_of_step, number_in, tasks_of_step, tasks_per_node

AGENT = "LLMKIT_NODE"
"""In the environment of an agent and its workers: which node this is, as `0/2`."""

_OF_LAUNCHERS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_.*|PET_.*|OMPI_(COMM|UNIVERSE)_.*|PMI_.*|PMIX_.*|MV2_COMM_.*)"
)
_FIRST_PORT, _PORTS = 19000, 10000
"""Ports that are made from a job's number; the system gives none of them to others by itself."""


@dataclass(frozen=True)
class Said:
    """What a command line says of nodes.

    Attributes:
        nodes: `--nodes`, as typed.
        rank: `--node-rank`.
        meeting: `--rendezvous`.
    """

    nodes: str | None = None
    rank: int | None = None
    meeting: str | None = None


@dataclass(frozen=True)
class Node:
    """This machine's place among those that work together.

    Attributes:
        rank: Its number, from 0; node 0 prepares, and the others meet there.
        least, most: How many nodes there may be; equal unless `--nodes 1:2` was said.
        meeting: Where node 0 is met.
        source: Who said so, for errors.
    """

    rank: int
    least: int
    most: int
    meeting: Place
    source: str

    @property
    def name(self) -> str:
        """What it is called towards people."""
        return f"node {self.rank}"


def parse_nodes(text: str) -> tuple[int, int]:
    """`2`, or `1:2` for from one to two; least and most.

    Raises:
        UsageError: It is neither.
    """
    found = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(
            f"--nodes: {text!r} is not a number of nodes", hint="such as 2, or 1:2 for one or two"
        )
    return least, most


def find_node(
    nodes: tuple[int, int],
    *,
    rank: int | None,
    meeting: str | None,
    processes: int | None = None,
    num_devices: Callable[[], int] = lambda: 1,
    said: bool = True,
    env: Mapping[str, str] = os.environ,
) -> Node | None:
    """The node that this process is the agent of, or None where it is a worker, or nobody speaks of several nodes.

    Args:
        nodes: How few and how many, by `--nodes` or the recipe.
        rank: `--node-rank`.
        meeting: `--rendezvous`.
        processes: `--processes`: of all nodes together.
        num_devices: GPUs of this machine; asked only where it matters.
        said: Whether `nodes` was said anywhere; else it is 1 by default.
        env: The environment.

    Raises:
        UsageError: What was said does not fit together, or does not say where this node's place is.
    """
    if (rank is not None or meeting is not None) and nodes[1] == 1:
        option = "--node-rank" if rank is not None else "--rendezvous"
        raise UsageError(f"{option} is for several nodes", hint="say how many: --nodes 2")
    if rank is not None and meeting is not None:
        return _checked(Node(rank, *nodes, parse_place(meeting, "--rendezvous"), "--node-rank"))
    if "LOCAL_RANK" in env and "WORLD_SIZE" in env:
        return None
    found = _in_slurm(nodes, processes, num_devices, said, env) or _in_environment(nodes, env)
    if found is None:
        return None if nodes[1] == 1 or _is_worker(env) else _missing(rank, meeting)
    number, count, source = found
    place = parse_place(meeting, "--rendezvous") if meeting else _place(source, env)
    number = number if rank is None else rank
    if place is None:
        return _missing(number, None)
    least, most = nodes if nodes[1] > 1 else (count, count)
    return _checked(Node(number, least, most, place, source))


def _is_worker(env: Mapping[str, str]) -> bool:
    """Whether another launcher has set up a world of workers, one process each."""
    in_step = "SLURM_STEP_ID" in env and tasks_of_step(env) > 1
    return in_step or ("RANK" in env and "WORLD_SIZE" in env) or "OMPI_COMM_WORLD_SIZE" in env


def _in_slurm(
    nodes: tuple[int, int],
    processes: int | None,
    num_devices: Callable[[], int],
    said: bool,
    env: Mapping[str, str],
) -> tuple[int, int, str] | None:
    """This node by a job step that has one task on each of several nodes, and more to start than these tasks."""
    tasks = tasks_of_step(env) if "SLURM_STEP_ID" in env else 1
    spread = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    if tasks < 2 or spread != [1] * tasks:
        return None
    if said and nodes[1] > 1:
        is_agent = nodes[1] == tasks
    else:
        is_agent = processes > tasks if processes is not None else num_devices() > 1
    return (number_in(env, "SLURM_NODEID"), tasks, "srun") if is_agent else None


def _in_environment(nodes: tuple[int, int], env: Mapping[str, str]) -> tuple[int, int, str] | None:
    """This node by what others leave in the environment, where several nodes were asked for, or by Kubeflow alone."""
    if "PET_NNODES" in env and "PET_NODE_RANK" in env:
        most = parse_nodes(env["PET_NNODES"])[1]
        return (number_in(env, "PET_NODE_RANK"), most, "PET_NODE_RANK") if most > 1 else None
    if nodes[1] == 1:
        return None
    if "OMPI_COMM_WORLD_SIZE" in env:
        one_each = number_in(env, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1) == 1
        size = number_in(env, "OMPI_COMM_WORLD_SIZE")
        return (
            (number_in(env, "OMPI_COMM_WORLD_RANK"), size, "mpirun")
            if one_each and size == nodes[1]
            else None
        )
    if "RANK" in env and "WORLD_SIZE" in env:  # PyTorchJob counts pods so
        size = number_in(env, "WORLD_SIZE")
        return (number_in(env, "RANK"), size, "RANK") if size == nodes[1] else None
    for name in ("NODE_RANK", "JOB_COMPLETION_INDEX"):
        if name in env:
            return number_in(env, name), nodes[1], name
    return None


def _place(source: str, env: Mapping[str, str]) -> Place | None:
    """Where node 0 is met, as the environment says."""
    for host, port in (("PET_MASTER_ADDR", "PET_MASTER_PORT"), ("MASTER_ADDR", "MASTER_PORT")):
        if env.get(host) and env.get(port):
            return parse_place(str(_bracketed(env[host])) + ":" + env[port], f"{host} and {port}")
    if source != "srun":
        return None
    return Place(host_of_step(env) or "", port_of(env))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def port_of(env: Mapping[str, str]) -> int:
    """A port made from a Slurm job's and step's numbers, the same on all its nodes."""
    job, step = number_in(env, "SLURM_JOB_ID", default=0), env.get("SLURM_STEP_ID", "0")
    return _FIRST_PORT + (job + 997 * (int(step) if step.isdigit() else 0)) % _PORTS


def _missing(rank: int | None, meeting: str | None) -> Node:
    told = {"--node-rank": rank is not None, "--rendezvous": meeting is not None}
    lacking = " and ".join(name for name, there in told.items() if not there)
    raise UsageError(
        f"several nodes, but the environment does not say which this is; missing: {lacking}",
        hint="on each node: --nodes 2 --node-rank 0 (then 1) --rendezvous ADDRESS-OF-NODE-0:29400; see docs/launch.md",
    )


def _checked(node: Node) -> Node:
    if not 0 <= node.rank < node.most:
        raise UsageError(
            f"node rank {node.rank} of {node.most} nodes ({node.source}): ranks count from 0",
            hint=f"0 to {node.most - 1}, each on one node",
        )
    return node


def become_agent(node: Node, env: MutableMapping[str, str] = os.environ) -> None:
    """Note in this process's environment that it is an agent, and forget who else counts processes in it.

    Libraries in it and in its workers would take what mpirun or Kubernetes left there for their own world.
    """
    for name in [name for name in env if _OF_LAUNCHERS.fullmatch(name)]:
        del env[name]
    env[AGENT] = f"{node.rank}/{node.most}"
