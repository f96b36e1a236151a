"""`llmkit sweep`: look for the best settings of a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.commands import finish, reporting, to_options
from llmkit.cli.options import (
    AsJson,
    Debug,
    DryRun,
    Fresh,
    NoSelfCheck,
    Processes,
    Quiet,
    RecipeWord,
    Runs,
    Settings,
    Smoke,
    described,
)
from llmkit.cli.output import as_columns, give, give_json
from llmkit.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "sweep",
        short_help="Train a recipe with many settings, and find the best.",
        help=described(
            """
            llmkit sweep my.yaml finetune.train.optim.lr=1e-5..1e-3:log --trials 20
            llmkit sweep my.yaml finetune.adapter.rank='4|8|16' finetune.train.length='1 epochs|3 epochs'
            llmkit sweep my.yaml pretrain.train.optim.lr=1e-4..1e-2:log --jobs 2 --metric eval/loss
            llmkit sweep my.yaml finetune.freeze.layers=0..6 seed=7 --dry-run
            """,
            "Train the recipe again and again, each time with other values of the settings that have a range "
            "(LOW..HIGH, then :log or :STEP) or several values (A|B|C), and compare what comes out. What was found "
            "decides what is tried next. Each trial is a run of its own; the same command again goes on, and "
            "--trials may be raised. Needs the extra `sweep`.",
        ),
    )(sweep)


def sweep(
    recipe: RecipeWord,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=SPACE", help="What is searched; KEY=VALUE only sets.", show_default=False
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="How many, all in all.")] = 20,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="By which metric, such as eval/accuracy; else the task's own."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="How many trials at a time.")] = 1,
    pruner: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="`median` gives up what is worse than half of the others; or `none`."
        ),
    ] = "median",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    fresh: Fresh = False,
    smoke: Smoke = False,
    processes: Processes = None,
    no_self_check: NoSelfCheck = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit sweep`."""
    from llmkit.run.sweep import make_search, outline
    from llmkit.run.sweep import sweep as carry_out

    if pruner not in ("median", "none"):
        raise UsageError(f"--pruner {pruner}: there is no such pruner", hint="median or none")
    settings = Settings(runs, dry_run, quiet, as_json, fresh, smoke, processes, self_check=not no_self_check)
    search = make_search(
        recipe,
        words or (),
        trials=trials,
        jobs=jobs,
        metric=metric,
        prune=pruner == "median",
        runs=runs,
        smoke=smoke,
    )
    if dry_run:
        if as_json:
            give_json({key: value for _, key, value in outline(search)})
        else:
            give(as_columns(outline(search)))
        return
    with reporting(settings) as reporter:
        result = carry_out(search, to_options(settings, [recipe, *(words or ())]), reporter)
    finish(result, settings)
