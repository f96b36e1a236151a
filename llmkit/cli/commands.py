"""The verbs: each loads a recipe, calls one function of `llmkit.run`, and prints its result."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmkit.cli import compress as compressing
from llmkit.cli import evaluate as evaluating
from llmkit.cli import fill as filling
from llmkit.cli import finetune as finetuning
from llmkit.cli import generate as generating
from llmkit.cli import merge as merging
from llmkit.cli import plan as planning
from llmkit.cli import predict as predicting
from llmkit.cli import show_rows as showing
from llmkit.cli import tokenize as tokenizing
from llmkit.cli.options import (
    AsJson,
    Debug,
    DryRun,
    Fresh,
    MaxTime,
    NodeRank,
    Nodes,
    NoSelfCheck,
    OverrideWords,
    Processes,
    Quiet,
    RecipeWord,
    Rendezvous,
    Restarts,
    Runs,
    Settings,
    Smoke,
    deadline_of,
    described,
)
from llmkit.cli.output import as_columns, as_typed, give, give_json, say
from llmkit.cli.plan import show_plan as show_plan
from llmkit.launch.node import Said

if TYPE_CHECKING:
    from llmkit.report.console import Reporter
    from llmkit.run import Options, Result

DEMO = "quickstart"


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line, in the order in which a person meets them."""
    _add_verb(app, "run", **VERBS["run"])
    app.command("tokenize", help=tokenizing.HELP, short_help=tokenizing.SHORT_HELP)(tokenizing.tokenize)
    _add_verb(app, "pretrain", **VERBS["pretrain"])
    app.command("finetune", help=finetuning.HELP, short_help=finetuning.SHORT_HELP)(finetuning.finetune)
    app.command("eval", help=evaluating.HELP, short_help=evaluating.SHORT_HELP)(evaluating.evaluate)
    app.command("compress", help=compressing.HELP, short_help=compressing.SHORT_HELP)(compressing.compress)
    app.command("merge", help=merging.HELP, short_help=merging.SHORT_HELP)(merging.merge)
    app.command("generate", help=generating.HELP, short_help=generating.SHORT_HELP)(generating.generate)
    app.command("fill", help=filling.HELP, short_help=filling.SHORT_HELP)(filling.fill)
    app.command("predict", help=predicting.HELP, short_help=predicting.SHORT_HELP)(predicting.predict)
    app.command("show", help=showing.HELP, short_help=showing.SHORT_HELP)(showing.show)
    app.command("plan", help=planning.PLAN_HELP, short_help=planning.SHORT_HELP)(planning.plan)
    app.command("demo", help=DEMO_HELP, short_help="Train a small model here, in minutes.")(demo)


VERBS: dict[str, dict[str, str]] = {
    "run": {
        "short_help": "Do all that a recipe holds, in order.",
        "help": described(
            """
            llmkit run my.yaml
            llmkit run my.yaml --smoke                          first a minute on a laptop
            llmkit run my.yaml pretrain.train.optim.lr=3e-4     one setting changed
            llmkit run my.yaml --dry-run                        the plan, nothing written
            """,
            "Do all that the recipe holds, in order; what is done already is not done again.",
        ),
    },
    "pretrain": {
        "short_help": "Train a model on text.",
        "help": described(
            """
            llmkit pretrain my.yaml
            llmkit pretrain my.yaml --processes 2
            llmkit pretrain my.yaml --fresh                     start over
            llmkit pretrain my.yaml --max-time 4h               save and stop in time; again: goes on
            llmkit pretrain my.yaml --restarts 3                after a crash, go on by itself
            llmkit pretrain my.yaml --nodes 2 --node-rank 0 --rendezvous node0:29400
            """,
            "Train the recipe's model. The same command again goes on where it stopped.",
        ),
    },
}


def _add_verb(app: typer.Typer, verb: str, *, help: str, short_help: str) -> None:
    """One command of the form `llmkit VERB RECIPE [KEY=VALUE]...`."""

    @app.command(verb, help=help, short_help=short_help)
    def command(
        recipe: RecipeWord,
        overrides: OverrideWords = None,
        dry_run: DryRun = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
        fresh: Fresh = False,
        smoke: Smoke = False,
        processes: Processes = None,
        max_time: MaxTime = None,
        restarts: Restarts = 0,
        nodes: Nodes = None,
        node_rank: NodeRank = None,
        rendezvous: Rendezvous = None,
        no_self_check: NoSelfCheck = False,
        runs: Runs = Path("runs"),
        debug: Debug = False,
    ) -> None:
        settings = Settings(
            runs,
            dry_run,
            quiet,
            as_json,
            fresh,
            smoke,
            processes,
            deadline=deadline_of(max_time),
            restarts=restarts,
            self_check=not no_self_check,
            place=Said(nodes, node_rank, rendezvous),
        )
        finish(call_verb(verb, recipe, overrides or (), settings), settings)


def call_verb(verb: str, recipe: str, overrides: Sequence[str], settings: Settings) -> "Result | None":
    """Load the recipe and run one verb; a dry run shows the plan instead and returns None."""
    from llmkit import run
    from llmkit.recipe import load_recipe
    from llmkit.run.nodes import as_asked, on_nodes

    loaded = as_asked(load_recipe(recipe, overrides=overrides, smoke=settings.smoke), settings.place)
    if settings.dry_run:
        show_plan(loaded, settings, [recipe, *overrides], verb=verb)
        return None
    function = {"pretrain": run.pretrain, "run": run.run_all}[verb]
    with reporting(settings) as reporter:
        smoke = ["--smoke"] if settings.smoke else []
        options = to_options(settings, [recipe, *overrides, *smoke])
        return on_nodes(verb, function, loaded, options, reporter, settings.place)


@contextmanager
def reporting(settings: Settings) -> "Iterator[Reporter]":
    """The command's reporter, closed at the end so that an error is printed on a clean line."""
    from llmkit.report.console import make_reporter

    reporter = make_reporter(json=settings.as_json, quiet=settings.quiet or not speaks())
    try:
        yield reporter
    finally:
        reporter.close()


def speaks() -> bool:
    """Whether this process talks: of workers that another launcher started, the first alone does."""
    from llmkit.launch.world import detect_world

    world = detect_world()
    return world is None or world.rank == 0


def to_options(settings: Settings, subject: Sequence[str] = ()) -> "Options":
    """The settings as the run takes them, with the command as it was typed, for the report."""
    from llmkit.run import Options

    return Options(
        runs=settings.runs,
        fresh=settings.fresh,
        processes=settings.processes,
        deadline=settings.deadline,
        restarts=settings.restarts,
        self_check=settings.self_check,
        json=settings.as_json,
        quiet=settings.quiet,
        command=shlex.join(["llmkit", *sys.argv[1:]]),
        subject=shlex.join(subject),
    )


def finish(result: "Result | None", settings: Settings) -> None:
    """Print what a command made: a path with `-q`, an object with `--json`, else the next command to type."""
    if result is None or not speaks():
        return
    if settings.as_json:
        next_command = as_typed(result.next_command)
        give_json({"folder": str(result.folder), **result.summary, "next": next_command})
    elif settings.quiet:
        give(str(result.folder))
    else:
        if result.table:
            give(as_columns(result.table))
        say(f"next: {as_typed(result.next_command)}")
    if result.failed is not None:
        raise result.failed


DEMO_HELP = described(
    """
    llmkit demo
    llmkit demo --smoke                     a minute instead of a few
    """,
    "Train a tokenizer and a small model on text that every machine has, then show what to look at. "
    "No download, no account, no GPU.",
)


def demo(
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    fresh: Fresh = False,
    smoke: Smoke = False,
    processes: Processes = None,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit demo`."""
    settings = Settings(runs, dry_run, quiet, as_json, fresh, smoke, processes)
    result = call_verb("run", DEMO, (), settings)
    if result is None or as_json or quiet or not speaks():
        finish(result, settings)
        return
    say(f"look:  {result.summary['pretrain']['report']}")
    say(f"talk:  {as_typed(result.next_command)}")
    say("yours: " + as_typed("llmkit init gpt my.yaml"))
