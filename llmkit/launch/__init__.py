"""Starting worker processes, finding out that we are one, and stopping in order. No torch."""

from llmkit.launch.local import run_local_workers
from llmkit.launch.signals import StopSignal, exit_for
from llmkit.launch.world import World, check_world, detect_world

__all__ = ["StopSignal", "World", "check_world", "detect_world", "exit_for", "run_local_workers"]
