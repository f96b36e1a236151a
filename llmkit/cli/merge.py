"""`llmkit merge`: several adapters as one model."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.options import AsJson, Debug, Quiet, Runs, Settings, described
from llmkit.errors import UsageError

SHORT_HELP = "Make one model of a base and one or several adapters."
HELP = described(
    """
    llmkit merge runs/polite runs/medical=0.5 --name both
    llmkit merge runs/a runs/b runs/c --name all --method ties --density 20%
    llmkit merge runs/a runs/b --name both --adapter-only
    llmkit merge runs/a --name whole
    """,
    "Add adapters of one base up, each times its weight, and leave one model in runs/NAME, for all commands to use. "
    "`linear` adds what they change; `ties` and `dare` keep a part of it, so that they disturb each other less. "
    "The merged model is compared with the adapters; exit code 4 if it predicts otherwise.",
)
_METHODS = ("linear", "ties", "dare")


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN[=WEIGHT]...",
            help="Runs with an adapter, or folders in PEFT's form; a weight of 1 unless it is said.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Option(metavar="NAME", help="What comes of it is called.", show_default=False)
    ],
    method: Annotated[str, typer.Option(metavar="NAME", help="linear, ties or dare.")] = "linear",
    density: Annotated[
        str,
        typer.Option(metavar="SHARE", help="With ties and dare: how much of each adapter's changes is kept."),
    ] = "20%",
    max_kl: Annotated[
        float,
        typer.Option(metavar="NATS", help="With linear: how far the merged model's predictions may lie off."),
    ] = 1e-3,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Leave one adapter in PEFT's form, and no model.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides what dare keeps.")] = 42,
    quiet: Quiet = False,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit merge`."""
    from llmkit.cli.commands import finish, reporting, to_options
    from llmkit.run.merge import How
    from llmkit.run.merge import merge as carry_out

    if method not in _METHODS:
        raise UsageError(f"--method {method}: there is no such way", hint=", ".join(_METHODS))
    how = How(method, _share(density), max_kl, adapter_only, seed)  # type: ignore[arg-type]
    settings = Settings(runs, quiet=quiet, as_json=as_json)
    with reporting(settings) as reporter:
        result = carry_out(adapters, name, how, to_options(settings), reporter)
    finish(result, settings)


def _share(word: str) -> float:
    """`20%` or 0.2, above 0 and at most 1.

    Raises:
        UsageError: It is none.
    """
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--density {word}: no share of something", hint="--density 20%")
    return share
