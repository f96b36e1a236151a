"""`llmkit show`: rows of a recipe as the model gets them, with the loss mask coloured."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.options import AsJson, Debug, OverrideWords, Runs, Settings, described
from llmkit.cli.output import as_typed, say

SHORT_HELP = "Show rows as the model gets them, and what it learns of them."
HELP = described(
    """
    llmkit show my.yaml --sample 3
    llmkit show runs/my --sample 3 --held-out
    llmkit show --task sft --model MODEL --data chats.jsonl
    llmkit show my.yaml --sample 1 | jq .learned
    """,
    "Show some rows of a recipe's `finetune` section as training gets them: their tokens, with those that are learned "
    "coloured; in a pipe, a line of JSON for each. Rows are read, checked and kept as `llmkit finetune` does it.",
)


def show(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|RUN]", help="A recipe, or a run of llmkit finetune.", show_default=False
        ),
    ] = None,
    overrides: OverrideWords = None,
    sample: Annotated[int, typer.Option("--sample", min=1, metavar="N", help="How many rows.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Another seed shows other rows.")] = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Of the rows that are measured on.")] = False,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="Without a recipe: the task.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Without a recipe: the model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILES", help="Without a recipe: the rows.")] = None,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit show`."""
    from llmkit.cli.commands import reporting, to_options
    from llmkit.cli.finetune import choose
    from llmkit.cli.rows import ShownRow, show_rows
    from llmkit.run.show import recipe_of_run
    from llmkit.run.show import show as rows_of

    words = list(overrides or ())
    if recipe is not None and "=" in recipe and not recipe.endswith((".yaml", ".yml")):
        words, recipe = [recipe, *words], None  # there is no recipe, and this is a setting
    if recipe is not None and not recipe.endswith((".yaml", ".yml")):
        recipe = str(recipe_of_run(recipe, runs) or recipe)
    given = {"task": task, "model": model, "data": data, "validation": None}
    loaded, subject = choose(recipe, words, given, None, smoke=False)
    settings = Settings(runs, as_json=as_json)
    with reporting(settings) as reporter:
        found = rows_of(
            loaded, to_options(settings, subject), reporter, sample=sample, seed=seed, held_out=held_out
        )
    show_rows([ShownRow(one.place, one.pieces, one.facts) for one in found], as_json=as_json)
    if not as_json:
        say("next: " + as_typed(shlex.join(["llmkit", "finetune", *subject])))
