"""Starting worker processes, finding out that we are one, and stopping in order. No torch."""

from llmkit.launch.crew import LOST_PEER, Limits
from llmkit.launch.local import run_local_workers
from llmkit.launch.signals import TIME_IS_UP, StopSignal, describe_stop, exit_for
from llmkit.launch.world import World, check_world, detect_world

__all__ = [
    "LOST_PEER",
    "TIME_IS_UP",
    "Limits",
    "StopSignal",
    "World",
    "check_world",
    "describe_stop",
    "detect_world",
    "exit_for",
    "run_local_workers",
]
