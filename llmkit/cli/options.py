"""The options that commands share, each declared once."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmkit.launch.node import Said

RecipeWord = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, `-` for one on stdin, or the name of a shipped recipe.",
        show_default=False,
    ),
]
OverrideWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings to change: pretrain.train.optim.lr=3e-4", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show the plan; write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the run folder's path and nothing else.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON: the result on stdout, progress on stderr.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from the checkpoint.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink the recipe to about a minute on a laptop.")]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        metavar="N",
        help="Worker processes; default: one per GPU, or one.",
        show_default=False,
    ),
]
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time",
        metavar="TIME",
        help="Stop and save before so much time has passed: 4h, 90m. The same command goes on.",
        show_default=False,
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        "--restarts", min=0, metavar="N", help="Start training again after a crash, so often at most."
    ),
]
Nodes = Annotated[
    str | None,
    typer.Option(
        "--nodes",
        metavar="N",
        help="Machines that train together, each started with this command; 1:2: one or two.",
        show_default=False,
    ),
]
NodeRank = Annotated[
    int | None,
    typer.Option(
        "--node-rank", min=0, metavar="N", help="Which of them this is, from 0.", show_default=False
    ),
]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        "--rendezvous", metavar="HOST:PORT", help="Where the others find node 0.", show_default=False
    ),
]
NoSelfCheck = Annotated[
    bool, typer.Option("--no-self-check", help="Leave out the proofs before the first step.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]
Runs = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", envvar="LLMKIT_RUNS", help="Where run folders are made."),
]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command was told besides its recipe."""

    runs: Path = Path("runs")
    dry_run: bool = False
    quiet: bool = False
    as_json: bool = False
    fresh: bool = False
    smoke: bool = False
    processes: int | None = None
    deadline: float | None = None
    restarts: int = 0
    self_check: bool = True
    place: Said = Said()  # noqa: RUF009 - frozen


def deadline_of(max_time: str | None) -> float | None:
    """When (`time.monotonic()`) the time given to a command is up; it counts from now.

    Raises:
        UsageError: It is no time.
    """
    if max_time is None:
        return None
    from llmkit.recipe.units import duration_of

    return time.monotonic() + duration_of(max_time, "--max-time")


def run_name(path: str) -> str:
    """A recipe name made from a path: `data/my model.yaml` -> `my-model`."""
    from llmkit.run import folders

    return folders.run_name(path)


def described(examples: str, text: str = "") -> str:
    """Help that starts with examples; their lines are kept as they are (that is what the backspace asks for).

    Args:
        examples: One command a line.
        text: What the command does, wrapped to the terminal.
    """
    lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    return f"\b\nExamples:\n{lines}\n\n{text}".rstrip()
