"""The verbs: each loads a recipe, calls one function of `llmkit.run`, and prints its result."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmkit.cli import compress as compressing
from llmkit.cli import evaluate as evaluating
from llmkit.cli import fill as filling
from llmkit.cli import finetune as finetuning
from llmkit.cli import generate as generating
from llmkit.cli import merge as merging
from llmkit.cli import predict as predicting
from llmkit.cli import show_rows as showing
from llmkit.cli import tokenize as tokenizing
from llmkit.cli.options import (
    AsJson,
    Debug,
    DryRun,
    Fresh,
    MaxTime,
    NoSelfCheck,
    OverrideWords,
    Processes,
    Quiet,
    RecipeWord,
    Restarts,
    Runs,
    Settings,
    Smoke,
    deadline_of,
    described,
)
from llmkit.cli.output import as_columns, as_typed, give, give_json, say
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.recipe import Loaded
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
    app.command("plan", help=PLAN_HELP, short_help="Show what a recipe will take here: steps, memory, time.")(
        plan
    )
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
        )
        finish(call_verb(verb, recipe, overrides or (), settings), settings)


def call_verb(verb: str, recipe: str, overrides: Sequence[str], settings: Settings) -> "Result | None":
    """Load the recipe and run one verb; a dry run shows the plan instead and returns None."""
    from llmkit import run
    from llmkit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides, smoke=settings.smoke)
    if settings.dry_run:
        show_plan(loaded, settings, [recipe, *overrides])
        return None
    function = {"pretrain": run.pretrain, "run": run.run_all}[verb]
    with reporting(settings) as reporter:
        smoke = ["--smoke"] if settings.smoke else []
        return function(loaded, to_options(settings, [recipe, *overrides, *smoke]), reporter)


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


PLAN_HELP = described(
    """
    llmkit plan my.yaml
    llmkit plan my.yaml pretrain.model.preset=gpt-small
    llmkit plan my.yaml --json
    """,
    "Show what the recipe will take on this machine: steps, batch, memory, time. Nothing is written.",
)


def plan(
    recipe: RecipeWord,
    overrides: OverrideWords = None,
    as_json: AsJson = False,
    smoke: Smoke = False,
    processes: Processes = None,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit plan`."""
    from llmkit.recipe import load_recipe

    settings = Settings(runs, dry_run=True, as_json=as_json, smoke=smoke, processes=processes)
    words = [recipe, *(overrides or ())]
    show_plan(load_recipe(recipe, overrides=words[1:], smoke=smoke), settings, words)


def show_plan(loaded: "Loaded", settings: Settings, words: Sequence[str], *, verb: str = "run") -> None:
    """Print the plan as the result of the command: text, or one object with `--json`.

    Args:
        loaded: The recipe.
        settings: What the command was told.
        words: The recipe and the overrides as they were typed, for the next command.
        verb: That command.
    """
    if settings.as_json:
        plans = {name: _plan_of(one, settings)[1] for name, one in loaded.variants.items()}
        give_json({"variants": plans} if plans else _plan_of(loaded, settings)[1])
        return
    for name, one in loaded.variants.items() or (("", loaded),):
        rows, _ = _plan_of(one, settings)
        names = ["", *(section for section, _, _ in rows)]
        lines = [(s if s != before else "", *rest) for before, (s, *rest) in zip(names, rows, strict=False)]
        give("\n".join([*([f"variant {name}"] if name else []), as_columns(lines)]))
    flags = ["--smoke"] if settings.smoke else []
    say("next: " + as_typed(shlex.join(["llmkit", verb, *words, *flags])))


def _plan_of(loaded: "Loaded", settings: Settings) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """A plan as rows of section, key and value, and as an object.

    Raises:
        UsageError: The recipe has nothing to plan.
    """
    from llmkit import run
    from llmkit.plan.describe import describe

    recipe, options = loaded.recipe, to_options(settings)
    found = run.plan(loaded, options) if recipe.pretrain is not None else None
    rows = run.outline(loaded, options) if recipe.tokenize is not None else []
    rows += describe(found) if found is not None else []
    if recipe.finetune is not None and recipe.pretrain is None:
        with reporting(settings) as reporter:
            found = run.plan_finetune(loaded, options, reporter)
        rows += describe(found)
    if not rows:
        raise UsageError("the recipe has nothing to plan", hint="`llmkit init gpt` shows a whole one")
    if found is not None:
        return rows, found.to_dict()
    sections: dict[str, Any] = {}
    for section, key, value in rows:
        sections.setdefault(section, {})[key] = value
    return rows, sections


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
