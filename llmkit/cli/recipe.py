"""`llmkit recipe check|show|schema|explain|diff` and `llmkit init`."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.options import AsJson, Debug, OverrideWords, RecipeWord, Smoke, described, run_name
from llmkit.cli.output import as_columns, as_typed, give, give_json, say
from llmkit.durable import write_new_file
from llmkit.errors import UsageError

recipes = typer.Typer(
    name="recipe",
    no_args_is_help=False,
    rich_markup_mode=None,
    short_help="Check, show, explain and compare recipes.",
    help=described(
        """
        llmkit recipe check my.yaml
        llmkit recipe show my.yaml
        llmkit recipe explain pretrain.train.length
        llmkit recipe diff my.yaml other.yaml
        llmkit recipe schema > schema.json
        """,
        "Check, show, explain and compare recipes.",
    ),
)


def register(app: typer.Typer) -> None:
    """Add `init` and the `recipe` group."""
    app.command("init", help=INIT_HELP, short_help="Write a commented recipe of your own.")(init)
    app.add_typer(recipes)


INIT_HELP = described(
    """
    llmkit init                             gpt.yaml, here
    llmkit init gpt my.yaml
    llmkit init gpt -                       to stdout
    """,
    "Write a commented recipe. A file that exists is never overwritten.",
)


def init(
    kind: Annotated[str, typer.Argument(help="Which template.")] = "gpt",
    path: Annotated[
        str | None,
        typer.Argument(help="The file to write, `-` for stdout; by default KIND.yaml.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a template to a new file."""
    from llmkit.recipe import render_template

    target = path or f"{kind}.yaml"
    text = named_after(render_template(kind), target)
    if target == "-":
        give(text.rstrip("\n"))
        return
    try:
        write_new_file(Path(target), text)
    except FileExistsError:
        raise UsageError(
            f"{target} exists and is left as it is", hint=f"another name: llmkit init {kind} PATH"
        ) from None
    say(f"wrote {target}")
    say("next: " + as_typed(f"llmkit recipe check {shlex.quote(target)}"))


def named_after(template: str, target: str) -> str:
    """A template whose run and whose example commands are named after the file that it is written to."""
    if target == "-":
        return template
    old_name = next(line.split()[1] for line in template.splitlines() if line.startswith("name: "))
    return template.replace(old_name, run_name(target)).replace("my.yaml", target)


@recipes.command(
    "check",
    short_help="Find every problem of a recipe at once.",
    help=described(
        """
        llmkit recipe check my.yaml
        llmkit recipe check my.yaml pretrain.train.optim.lr=3e-4
        """,
        "Find every problem of the recipe at once, each with what would work. Exit code 2: it has some.",
    ),
)
def check(
    recipe: RecipeWord,
    overrides: OverrideWords = None,
    as_json: AsJson = False,
    smoke: Smoke = False,
    debug: Debug = False,
) -> None:
    """Load the recipe; its errors say the rest."""
    from llmkit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or (), smoke=smoke)
    if as_json:
        give_json({"ok": True, "name": loaded.recipe.name})
    else:
        say(f"{recipe}: no problems")
        say("next: " + as_typed(f"llmkit plan {shlex.quote(recipe)}"))


@recipes.command(
    "show",
    short_help="Show a recipe with all defaults, and where each value came from.",
    help=described(
        """
        llmkit recipe show my.yaml
        llmkit recipe show my.yaml --smoke
        llmkit recipe show my.yaml --json
        """,
        "Show the recipe as it will be taken: extended, overridden, with all defaults. Comments say where each "
        "value came from.",
    ),
)
def show(
    recipe: RecipeWord,
    overrides: OverrideWords = None,
    as_json: AsJson = False,
    smoke: Smoke = False,
    debug: Debug = False,
) -> None:
    """Print it as YAML, or as one object with every dotted key."""
    from llmkit.recipe import load_recipe, show_yaml, values

    loaded = load_recipe(recipe, overrides=overrides or (), smoke=smoke)
    if as_json:
        origins = {key: str(loaded.origins[key]) for key in loaded.origins}
        give_json({"values": values(loaded), "origins": origins})
    else:
        give(show_yaml(loaded).rstrip("\n"))
        say("next: " + as_typed(shlex.join(["llmkit", "plan", recipe, *(overrides or ())])))


@recipes.command(
    "schema",
    short_help="Print the JSON Schema of recipes, for editors.",
    help=described(
        """
        llmkit recipe schema > recipe.schema.json
        """,
        "Print the JSON Schema of recipes. An editor that reads `# yaml-language-server: $schema=recipe.schema.json` "
        "in a recipe's first line completes and checks it.",
    ),
)
def schema(debug: Debug = False) -> None:
    """Print the published schema."""
    from llmkit.recipe import schema_text

    give(schema_text().rstrip("\n"))


@recipes.command(
    "explain",
    short_help="Explain a setting: what it means, accepts and defaults to.",
    help=described(
        """
        llmkit recipe explain
        llmkit recipe explain pretrain.train
        llmkit recipe explain pretrain.train.optim.lr
        """,
        "Explain a setting or a section: what it means, what it accepts, its default.",
    ),
)
def explain_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A dotted key; none: the whole recipe.")] = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print what the schema says."""
    from llmkit.recipe import explain

    found = explain(key)
    if as_json:
        give_json(asdict(found))
        return
    give(str(found))
    if found.children:
        inner = ".".join(filter(None, [found.key, found.children[-1][0]]))
        say("next: " + as_typed(f"llmkit recipe explain {inner}"))


@recipes.command(
    "diff",
    short_help="Show the settings in which two recipes differ.",
    help=described(
        """
        llmkit recipe diff my.yaml other.yaml
        llmkit recipe diff my.yaml runs/my/pretrain/resolved.yaml --json
        """,
        "Show the settings in which two recipes differ, defaults included.",
    ),
)
def diff_two(
    first: Annotated[str, typer.Argument(metavar="A", help="A recipe.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another recipe.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print one line a setting: its key, the value in A, the value in B."""
    from llmkit.recipe import diff, load_recipe

    found = diff(load_recipe(first), load_recipe(second))
    if as_json:
        give_json([asdict(difference) for difference in found])
    elif found:
        rows = [(difference.key, as_yaml(difference.a), as_yaml(difference.b)) for difference in found]
        give(as_columns([("key", first, second), *rows]))
    else:
        say("no difference")


def as_yaml(value: object) -> str:
    """A setting's value on one line; `-` where a recipe does not have the setting."""
    return (
        "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
