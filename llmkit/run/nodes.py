"""The verbs that train, on several nodes: all run the same command; node 0 prepares and decides, the others follow."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from llmkit.errors import ExitCode, InterruptedRunError, RunError, UsageError
from llmkit.hardware import detect_hardware
from llmkit.launch.follower import Farewell, follow
from llmkit.launch.hub import Hub
from llmkit.launch.local import WORKER, to_stderr
from llmkit.launch.node import Node, Said, become_agent, find_node, parse_nodes
from llmkit.launch.wire import waits_of
from llmkit.launch.workplace import Card, versions
from llmkit.recipe import Loaded
from llmkit.recipe.resolved import values
from llmkit.report.console import Reporter
from llmkit.run.folders import Options, Result

Verb = Callable[[Loaded, Options, Reporter], Result]


def on_nodes(
    name: str, do: Verb, loaded: Loaded, options: Options, reporter: Reporter, said: Said
) -> Result | None:
    """Do a verb: here alone or as another launcher's worker where nobody speaks of several nodes, else with them.

    Args:
        name: The verb's name; all nodes must run the same.
        do: The verb.
        loaded: The recipe, with as many nodes as were asked for (`with_nodes`).
        options: As for every verb.
        reporter: Told what happens.
        said: What the command line says of nodes.

    Returns:
        What the verb made; None on the other nodes, where it went well.

    Raises:
        UsageError: It is not clear which node this is, or the nodes cannot share the processes.
        LlmkitError: As the verb raises, on node 0; on the others one with the same exit code.
    """
    node = this_node(loaded, options, said)
    if node is None:
        return do(loaded, options, reporter)
    per_node = _workers_of_a_node(node, loaded, options)
    card = _card(name, loaded, per_node)
    become_agent(node)
    waits = waits_of(os.environ)
    if node.rank:
        comes_back = options.restarts > 0
        _end_as(follow(node, card, program=WORKER, tell=to_stderr, comes_back=comes_back, waits=waits))
        return None
    with Hub(node, card, options.runs, per_node=per_node, tell=to_stderr, waits=waits) as hub:
        shared = replace(options, processes=per_node * hub.count, hub=hub)
        return do(with_nodes(loaded, hub.count), shared, reporter)


def this_node(
    loaded: Loaded, options: Options, said: Said, env: Mapping[str, str] = os.environ
) -> Node | None:
    """The node whose agent this process is; None where it is a worker, or nobody speaks of several nodes.

    Raises:
        UsageError: What was said does not fit together.
    """
    asked = loaded.recipe.machine.nodes
    return find_node(
        parse_nodes(said.nodes) if said.nodes else (asked, asked),
        rank=said.rank,
        meeting=said.meeting,
        processes=_processes(loaded, options),
        num_devices=lambda: detect_hardware(loaded.recipe.machine).num_devices,
        said=said.nodes is not None or asked > 1,
        env=env,
    )


def as_asked(loaded: Loaded, said: Said) -> Loaded:
    """The recipe for as many machines as `--nodes` says at most.

    Raises:
        UsageError: That is no number of nodes.
    """
    return loaded if said.nodes is None else with_nodes(loaded, parse_nodes(said.nodes)[1])


def with_nodes(loaded: Loaded, count: int) -> Loaded:
    """The recipe, and its variants, for so many machines."""
    machine = loaded.recipe.machine.model_copy(update={"nodes": count})
    recipe = loaded.recipe.model_copy(update={"machine": machine})
    variants = {name: with_nodes(one, count) for name, one in loaded.variants.items()}
    return replace(loaded, recipe=recipe, variants=variants)


def _processes(loaded: Loaded, options: Options) -> int | None:
    """Workers of all nodes together, where somebody says so."""
    pinned = loaded.recipe.machine.processes
    return options.processes or (None if pinned == "auto" else int(pinned))


def _workers_of_a_node(node: Node, loaded: Loaded, options: Options) -> int:
    processes = _processes(loaded, options)
    if processes is None:
        return detect_hardware(loaded.recipe.machine).num_devices
    if processes % node.most:
        near = max(1, processes // node.most) * node.most
        raise UsageError(
            f"{processes} processes cannot be shared evenly by {node.most} nodes",
            hint=f"--processes counts those of all nodes together: --processes {near}",
        )
    return processes // node.most


def _card(name: str, loaded: Loaded, per_node: int) -> Card:
    hardware = detect_hardware(loaded.recipe.machine)
    settings = dict(values(loaded))
    for variant, one in loaded.variants.items():
        settings |= {f"{variant}: {key}": value for key, value in values(one).items()}
    plain = json.loads(json.dumps(settings, default=str))  # as it will come over the wire
    on_cpu = hardware.device == "cpu"  # of processors any kinds may meet
    device = "cpu" if on_cpu else f"{hardware.num_devices} x {hardware.device} {hardware.device_name}"
    return Card(name, plain, versions(), device, per_node)


def _end_as(farewell: Farewell) -> None:
    """End this node as node 0 has ended.

    Raises:
        RunError: It has not ended well; with its exit code.
    """
    if farewell.code == ExitCode.DONE:
        return
    kind = InterruptedRunError if farewell.code == ExitCode.INTERRUPTED else RunError
    error = kind(f"node 0: {farewell.said or f'ended with exit code {farewell.code}'}")
    error.exit_code = ExitCode(farewell.code) if farewell.code in list(ExitCode) else ExitCode.FAILED
    raise error
