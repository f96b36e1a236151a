"""What `llmkit submit` was told, and how long its jobs need to start and to save: the plans of what they train."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llmkit.errors import UsageError
from llmkit.hardware import Hardware, detect_hardware, named_hardware
from llmkit.launch import slurm
from llmkit.plan import Plan
from llmkit.plan.communication import apart_bytes
from llmkit.plan.saving import UNKNOWN_BYTES_PER_S, reserve_s
from llmkit.recipe import Loaded
from llmkit.report.console import make_reporter
from llmkit.report.formatting import format_bytes
from llmkit.run.finetune import plan_finetune
from llmkit.run.folders import Options
from llmkit.run.planning import plan as plan_ahead
from llmkit.train.places import model_folder

ASSUMED = "H100"
"""The GPU that is planned for where none is named."""
START_S = 60
"""Seconds to start."""


@dataclass(frozen=True)
class Wanted:
    """What `llmkit submit` was told.

    Attributes:
        recipe: As typed.
        words: Settings to change, as typed.
        command: The one command to submit; None: a job for each stage of the recipe.
        nodes: Machines of a job that trains.
        gpus: Of a machine.
        processes: Worker processes of a machine; None: one a GPU, or one.
        cores: Of a machine; None: four for each GPU, or one for each process.
        limit_s: The time limit of a job.
        lead_s: How long before that it is told to save; None: computed.
        device: The kind of GPU; None: unknown.
        start: Who starts the workers.
        restarts: How often workers are started again after a crash.
        partition: Where jobs run; empty: as the recipe says, else Slurm's default.
        settings: Further settings of sbatch.
        runs: The folder of runs.
        smoke: Whether the recipe is shrunk.
        typed: The whole command.
    """

    recipe: str
    words: tuple[str, ...] = ()
    command: str | None = None
    nodes: int = 1
    gpus: int = 0
    processes: int | None = None
    cores: int | None = None
    limit_s: int = 24 * 3600
    lead_s: int | None = None
    device: str | None = None
    start: Literal["node", "rank"] = "node"
    restarts: int = 0
    partition: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    runs: Path = Path("runs")
    smoke: bool = False
    typed: str = "llmkit submit"

    @property
    def per_node(self) -> int:
        """Worker processes of a machine."""
        return self.processes or max(1, self.gpus)


def plans_of(loaded: Loaded, wanted: Wanted) -> list[Plan]:
    """The plans of what is trained, on the machines that are asked for.

    What starts from a model that an earlier job has yet to make is not planned: it is that model's size.

    Raises:
        UsageError: The parts do not fit together, or rows are to come from stdin.
        MissingError: The model or the rows are not there.
    """
    recipe, asked = loaded.recipe, wanted.command
    for section, given in _files(loaded):
        if "-" in given:
            raise UsageError(
                f"{section}.data.files: a job cannot read stdin", hint="save it to a file and name that"
            )
    options = Options(runs=wanted.runs, processes=wanted.nodes * wanted.per_node)
    plans: list[Plan] = []
    if recipe.pretrain is not None and asked in (None, "run", "pretrain", "finetune"):
        plans.append(plan_ahead(loaded, options, _hardware(loaded, wanted)))
    if recipe.finetune is not None and asked in (None, "run", "finetune"):
        made = model_folder(str(wanted.runs / recipe.name))
        if recipe.finetune.model.name is not None or (Path(made) / "config.json").is_file():
            quiet = make_reporter(quiet=True)
            plans.append(plan_finetune(loaded, options, quiet, _hardware(loaded, wanted)))
    return plans


def lead_of(plan: Plan | None) -> int:
    """Seconds from the signal to a saved run: agreeing on a stop, the longest step, what the run keeps for saving."""
    seconds: float = slurm.REACT_S
    if plan is not None:
        seconds += sum(high for _, high in plan.step_seconds.values())
        seconds += reserve_s((plan.checkpoint_bytes + apart_bytes(plan)) / UNKNOWN_BYTES_PER_S)
    return 10 * math.ceil(seconds / 10)


def refuse_short(wanted: Wanted, lead_s: int, plans: Sequence[Plan]) -> None:
    """Refuse a time limit in which nothing could be trained and saved.

    Raises:
        UsageError: It is too short; what would do is told.
    """
    if wanted.limit_s > lead_s + START_S:
        return
    size = max((plan.checkpoint_bytes + apart_bytes(plan) for plan in plans), default=0)
    least = slurm.shown_limit(60 * math.ceil((lead_s + 2 * START_S) / 60))
    speed = format_bytes(int(UNKNOWN_BYTES_PER_S))
    how = f", of which a checkpoint of {format_bytes(size)} at {speed} a second, and one under way, is a part"
    raise UsageError(
        f"--time {slurm.shown_limit(wanted.limit_s)} is too short: a job needs about {START_S} s to start and "
        f"{lead_s} s to save{how if size and wanted.lead_s is None else ''}",
        hint=f"--time {least} or more; --lead says how long saving takes, if you know it",
    )


def _files(loaded: Loaded) -> Iterator[tuple[str, Sequence[str]]]:
    """The sections of a recipe that read files, and what they name."""
    recipe = loaded.recipe
    for name in ("tokenize", "pretrain"):
        for source in getattr(getattr(recipe, name), "data", None) or ():
            yield name, source.files or ()
    if recipe.finetune is not None:
        yield "finetune", recipe.finetune.data.files or ()


def _hardware(loaded: Loaded, wanted: Wanted) -> Hardware:
    if wanted.gpus:
        return named_hardware(f"{wanted.nodes}x{wanted.gpus}x{wanted.device or ASSUMED}")
    if wanted.device:
        raise UsageError("--on names a GPU, and no GPUs are asked for", hint="--gpus-per-node 8")
    machine = loaded.recipe.machine.model_copy(update={"device": "cpu"})
    return replace(detect_hardware(machine), nodes=wanted.nodes)
