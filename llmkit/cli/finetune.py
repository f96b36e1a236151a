"""`llmkit finetune`: with a recipe, or from a task, a model and a file of rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    Rendezvous,
    Restarts,
    Runs,
    Settings,
    Smoke,
    deadline_of,
    described,
    run_name,
)
from llmkit.errors import UsageError
from llmkit.launch.node import Said

if TYPE_CHECKING:
    from llmkit.recipe import Loaded

HELP = described(
    """
    llmkit finetune my.yaml
    llmkit finetune --task cls --model MODEL --data reviews.csv
    llmkit finetune --task sft --model MODEL --data chats.jsonl finetune.adapter.method=lora
    llmkit finetune --task tag --model MODEL --data train.conll --validation dev.conll --dry-run
    """,
    "Train a model for a task on labelled rows. Without a recipe one is made of the options, with the task's "
    "own defaults, and left in the run folder. The same command again goes on where it stopped.",
)
SHORT_HELP = "Train a model for a task: classes, tags, answers, chats ..."


def finetune(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]", help="A recipe file, `-`, or a shipped one's name.", show_default=False
        ),
    ] = None,
    overrides: OverrideWords = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK", help="cls, regression, tag, qa, seq2seq, sft, dpo, embed; or clm, mlm ..."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What to start from: a folder, a run or a Hub name.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILES", help="The rows: a path, glob or folder.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="FILES", help="Rows to measure on; else a tenth is held out.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What the run is called.")] = None,
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
    """`llmkit finetune`."""
    from llmkit import run
    from llmkit.cli.commands import finish, reporting, show_plan, to_options
    from llmkit.run.nodes import as_asked, on_nodes

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
    words = list(overrides or ())
    if recipe is not None and "=" in recipe and not recipe.endswith((".yaml", ".yml")):
        words, recipe = [recipe, *words], None  # there is no recipe, and this is a setting
    loaded, subject = choose(
        recipe,
        words,
        {"task": task, "model": model, "data": data, "validation": validation},
        name,
        smoke=smoke,
    )
    loaded = as_asked(loaded, settings.place)
    if dry_run:
        show_plan(loaded, settings, subject, verb="finetune")
        return
    with reporting(settings) as reporter:
        options = to_options(settings, subject)
        result = on_nodes("finetune", run.finetune, loaded, options, reporter, settings.place)
    finish(result, settings)


def choose(
    recipe: str | None, words: Sequence[str], given: dict[str, str | None], name: str | None, *, smoke: bool
) -> "tuple[Loaded, list[str]]":
    """The recipe that is meant, and what a person would type for it again.

    Raises:
        UsageError: There is neither a recipe nor all that makes one, or both.
    """
    from llmkit.recipe import load_recipe

    said = [f"--{option}={value}" for option, value in given.items() if value is not None]
    if recipe is not None:
        changed = [f"finetune.{key}={value}" for key, value in _keys(given).items()]
        changed += [f"name={name}"] if name else []
        return load_recipe(recipe, overrides=[*words, *changed], smoke=smoke), [recipe, *words, *changed]
    missing = [option for option in ("task", "model", "data") if given[option] is None]
    if missing:
        raise UsageError(
            f"no recipe, and no {' and no '.join(f'--{option}' for option in missing)}",
            hint="llmkit finetune --task cls --model MODEL --data reviews.csv, or llmkit finetune my.yaml",
        )
    made, left = with_words(made_recipe(given, name), words)
    return load_recipe(made, overrides=left, smoke=smoke), [*said, *words]


def with_words(made: dict[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The recipe with the settings that words change, so that the file which is kept does the same run again.

    Returns:
        The recipe, and the words that cannot be read: loading says what is wrong with them.
    """
    from llmkit.recipe.overrides import layer

    left = []
    for word in words:
        node, problems = layer(word)
        if node is None or problems or "${" in word:  # what stands for a secret is not written out
            left.append(word)
        else:
            made = _laid_over(made, node.plain())
    return made, left


def _laid_over(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _laid_over(below.get(key), value) for key, value in above.items()}}


def made_recipe(given: dict[str, str | None], name: str | None) -> dict[str, Any]:
    """A recipe of what was said on the command line."""
    section: dict[str, Any] = {
        "task": given["task"],
        "model": {"name": given["model"]},
        "data": {"files": given["data"]},
    }
    if given["validation"] is not None:
        section["validation"] = {"files": given["validation"]}
    default = f"{run_name(str(given['data']))}-{given['task']}"
    return {"llmkit": 1, "name": name or default, "finetune": section}


def _keys(given: dict[str, str | None]) -> dict[str, str]:
    """What the options are called in a recipe."""
    names = {"task": "task", "model": "model.name", "data": "data.files", "validation": "validation.files"}
    return {names[option]: value for option, value in given.items() if value is not None}
