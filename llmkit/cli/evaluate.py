"""`llmkit eval`: what its words and options mean, and how it is started with several processes."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import (
    AsJson,
    Debug,
    DryRun,
    Processes,
    Quiet,
    Runs,
    Settings,
    Smoke,
    described,
    run_name,
)
from llmkit.cli.output import CALLED, as_columns, give, give_json, program
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.recipe import Loaded

SHORT_HELP = "Measure models, compare them, hold them against what must be."
HELP = described(
    """
    llmkit eval my.yaml                             the model that this recipe trained
    llmkit eval runs/my                             the same, by its run folder
    llmkit eval path/to/model --data 'texts/*.txt'  any model, on text of yours
    llmkit eval runs/a runs/b --compare             two on the same data, with intervals and p
    llmkit eval runs/reviews-cls --data new.csv --fail-under accuracy=0.9
    llmkit eval runs/new --max-drop 2% --against runs/old
    llmkit eval path/to/model --harness arc_easy,piqa
    llmkit eval path/to/model --task choice --data questions.jsonl
    llmkit eval runs/a runs/b --speed
    """,
    "Measure a model on what its run held out, or on data of yours. Each option stands for a setting of the recipe's "
    "`eval` section; `eval.KEY=VALUE` sets any. Exit code 4: a gate did not hold.",
)
_OWN = ("generation", "retrieval", "choice")
"""Evaluations whose data are rows of a form of their own."""


def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL|RECIPE... [KEY=VALUE]...",
            help="Runs, model folders, a recipe, settings.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to ask: text, cls, tag, ..., choice, generation, retrieval."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILES", help="Other data to measure on: a path, glob or folder.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the models with the first one, on its data.")
    ] = False,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas between.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(metavar="DIR", help="With --harness: a folder with task files of yours.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Time the model instead of asking it.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE=VALUE", help="Exit code 4 if the figure is worse; may come several times."
        ),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Exit code 4 if more than this is lost: 2%.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="With --max-drop: the run or model to compare with.")
    ] = None,
    processes: Processes = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    smoke: Smoke = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit eval`."""
    from llmkit import run
    from llmkit.cli.commands import finish, reporting, to_options

    settings = Settings(runs, quiet=quiet, as_json=as_json, smoke=smoke, processes=processes)
    asked = _section(task, data, harness, include, speed, fail_under or (), max_drop, against)
    _check_drop(words, max_drop, against)
    if data is not None and task in _OWN:  # `--data` is theirs, so `eval.data.on_error=skip` is about it
        words = [f"eval.labelled.{word[10:]}" if word.startswith("eval.data.") else word for word in words]
    targets, loaded = choose_targets(words, asked, settings)
    if compare and len(targets) < 2:
        raise UsageError("--compare needs two models at least", hint="llmkit eval runs/a runs/b --compare")
    if len(targets) > 1 and not compare and not speed:
        raise UsageError(
            f"{len(targets)} models are named, and nothing says what to do with them",
            hint="add --compare, or measure one at a time",
        )
    if dry_run:
        _outline(targets, loaded, settings)
        return
    if _start_several(settings):
        return
    with reporting(settings) as reporter:
        result = run.evaluate(targets or None, loaded, to_options(settings), reporter)
    finish(result, settings)


def _outline(targets: Sequence[str], loaded: "Loaded | None", settings: Settings) -> None:
    """Say what would be measured."""
    from llmkit import run
    from llmkit.cli.commands import reporting, to_options

    with reporting(settings) as reporter:
        facts, rows = run.outline_evaluation(targets or None, loaded, to_options(settings), reporter)
    if settings.as_json:
        give_json(facts)
    else:
        give(as_columns(rows))


def _section(
    task: str | None,
    data: str | None,
    harness: str | None,
    include: str | None,
    speed: bool,
    fail_under: Sequence[str],
    max_drop: str | None,
    against: str | None,
) -> dict[str, Any]:
    """The options as settings of the `eval` section."""
    section: dict[str, Any] = {}
    if task is not None:
        section["task"] = task
    if data is not None:
        section["labelled" if task in _OWN else "data"] = {"files": data}
    if harness is not None:
        section["harness"] = {"tasks": [name for name in harness.split(",") if name]}
        section["harness"] |= {"include": include} if include is not None else {}
    elif include is not None:
        raise UsageError("--include names a folder of tasks for --harness", hint="add --harness TASKS")
    if speed:
        section["speed"] = {}
    gate: dict[str, Any] = {}
    if fail_under:
        limits = list(map(_limit, fail_under))
        names = [name for name, _ in limits]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"--fail-under names {twice} twice", hint="keep one limit of each figure")
        gate["fail_under"] = dict(limits)
    gate |= {key: value for key, value in (("max_drop", max_drop), ("against", against)) if value is not None}
    return {**section, **({"gate": gate} if gate else {})}


def _check_drop(words: Sequence[str], max_drop: str | None, against: str | None) -> None:
    """Refuse one of two options that say nothing alone; a recipe, or a setting, may hold the other.

    Raises:
        UsageError: One of them is lacking.
    """
    if (max_drop is None) == (against is None):
        return
    if any(word.endswith((".yaml", ".yml")) or word.startswith("eval.gate.") for word in words):
        return
    if against is None:
        raise UsageError(
            f"--max-drop {max_drop} says how much worse a model may be, and nothing says than which",
            hint="add --against RUN",
        )
    raise UsageError(
        f"--against {against} names a model to compare with, and nothing says how much worse this one may be",
        hint="add --max-drop 2%, or see how they differ: llmkit eval A B --compare",
    )


def _limit(word: str) -> tuple[str, float]:
    name, mark, value = word.partition("=")
    try:
        return name.strip(), float(value.strip().removesuffix("%")) / (
            100 if value.strip().endswith("%") else 1
        )
    except ValueError:
        said = f"{value!r} is no number" if mark else "there is no value"
        raise UsageError(f"--fail-under {word}: {said}", hint="write --fail-under accuracy=0.9") from None


def choose_targets(
    words: Sequence[str], section: Mapping[str, Any], settings: Settings, *, verb: str = "eval"
) -> "tuple[list[str], Loaded | None]":
    """What the words of a command mean: models (folders, runs), at most one recipe, and settings.

    Args:
        words: As typed.
        section: What options say of the verb's section.
        settings: Of the command line.
        verb: The command, and its section of a recipe.

    Raises:
        UsageError: There are two recipes, or settings go nowhere.
    """
    from llmkit.recipe import load_recipe

    overrides = [word for word in words if _is_setting(word)]
    named = [word for word in words if not _is_setting(word)]
    models = [word for word in named if _is_model(word, settings.runs)]
    recipes = [word for word in named if word not in models]
    if len(recipes) > 1:
        raise UsageError(
            f"{' and '.join(recipes)}: a command has one recipe",
            hint="the others are no runs and no model folders; see `llmkit runs`",
        )
    if recipes:
        flat = [*overrides, *_words(section, verb)]
        return models, load_recipe(recipes[0], overrides=flat, smoke=settings.smoke)
    if not models:
        raise UsageError("nothing says which model", hint=f"llmkit {verb} RUN")
    if not section and not overrides:
        return models, None
    made = {"llmkit": 1, "name": run_name(models[0]), verb: {"model": models[0], **section}}
    return models, load_recipe(_as_its_run(made, models[0], settings.runs), overrides=overrides)


def _as_its_run(made: dict[str, Any], model: str, runs: Path) -> dict[str, Any]:
    """The recipe with the seed and language of the model's run, where there is one."""
    from llmkit.recipe import load_recipe
    from llmkit.run.checkpoints import is_checkpoint
    from llmkit.run.folders import find_model

    place = Path(model)
    run = place.parent.parent if is_checkpoint(place) else find_model(model, runs, adapters=True).parent
    if not (run / "resolved.yaml").is_file():
        return made
    recipe = load_recipe(run / "resolved.yaml").recipe
    return {**made, "seed": recipe.seed, "language": recipe.language}


def _is_setting(word: str) -> bool:
    key, mark, _ = word.partition("=")
    return bool(mark) and "/" not in key and not Path(word).exists()


def _is_model(word: str, runs: Path) -> bool:
    if word.endswith((".yaml", ".yml")):
        return False
    return "/" in word or Path(word).is_dir() or (runs / word).is_dir()


def _words(section: Mapping[str, Any], prefix: str) -> list[str]:
    """Settings as words that change a recipe."""
    import json

    found: list[str] = []
    for key, value in section.items():
        if isinstance(value, Mapping) and value and key != "fail_under":
            found += _words(value, f"{prefix}.{key}")
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            found.append(f"{prefix}.{key}={shown}")
    return found


def _start_several(settings: Settings) -> bool:
    """Start the same command in several processes, if that was asked for and this is not one of them.

    Raises:
        UsageError: Data would come from stdin, which several processes cannot share.
        Exit: They failed, with their exit code; what they said stands above.
    """
    from llmkit.launch.world import detect_world

    if settings.processes in (None, 1) or detect_world(os.environ) is not None:
        return False
    from llmkit.launch.local import run_local_workers

    if "-" in sys.argv:
        raise UsageError("--data - reads stdin, which several processes cannot share", hint="give a file")
    logs = settings.runs / ".logs" / f"eval-{os.getpid()}"
    env = {**os.environ, CALLED: program()}
    code = run_local_workers(settings.processes or 1, sys.argv[1:], logs=logs, env=env)
    if code:
        raise typer.Exit(code)  # the first process said why
    return True
