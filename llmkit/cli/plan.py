"""`llmkit plan`: what a recipe, or a published model, takes on this machine or on others."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import (
    AsJson,
    Debug,
    OverrideWords,
    Processes,
    Runs,
    Settings,
    Smoke,
    described,
)
from llmkit.cli.output import as_columns, as_typed, give, give_json, say
from llmkit.errors import LlmkitError, MissingError, UsageError

if TYPE_CHECKING:
    from llmkit.hardware import Hardware
    from llmkit.plan import Plan
    from llmkit.recipe import Loaded
    from llmkit.recipe.machine import Machine

PLAN_HELP = described(
    """
    llmkit plan my.yaml
    llmkit plan my.yaml pretrain.model.preset=gpt-small
    llmkit plan my.yaml --on 8xH100,2x8xH100,v5e-16     other machines, compared
    llmkit plan --model llama-3.1-8b --on 8xH100        a published model, no recipe
    llmkit plan my.yaml --json
    """,
    "Show what the recipe will take on this machine, or on others: steps, batch, memory, time, cost. Nothing is "
    "written.",
)
SHORT_HELP = "Show what a recipe will take: steps, memory, time, cost."

RecipeOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="A recipe file, `-` for one on stdin, or the name of a shipped recipe; not with --model.",
        show_default=False,
    ),
]
On = Annotated[
    list[str] | None,
    typer.Option(
        "--on",
        metavar="HARDWARE",
        help="Not this machine but 8xH100, 2x8xA100 (machines x GPUs), v5e-16, cpu:16; several by commas.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="No recipe: pre-training this model (llama-3.1-8b, a preset, a folder, a name on the Hub).",
        show_default=False,
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option("--nodes", min=1, metavar="N", help="Machines that work together.", show_default=False),
]
Price = Annotated[
    float | None,
    typer.Option(
        "--price",
        min=0,
        metavar="DOLLARS",
        help="Of an hour of one device; default: a range assumed as of mid-2025.",
        show_default=False,
    ),
]

Rows = list[tuple[str, str, str]]


def plan(
    recipe: RecipeOrNone = None,
    overrides: OverrideWords = None,
    on: On = None,
    model: ModelName = None,
    nodes: Nodes = None,
    price: Price = None,
    as_json: AsJson = False,
    smoke: Smoke = False,
    processes: Processes = None,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit plan`."""
    from llmkit.recipe import load_recipe
    from llmkit.run.planning import recipe_of_model

    settings = Settings(runs, dry_run=True, as_json=as_json, smoke=smoke, processes=processes)
    places = hardware_of(on or (), nodes=nodes, price=price)
    alone = [f"machine.nodes={nodes}"] if nodes is not None and not on else []
    if model is not None:
        if recipe is not None and "=" not in recipe:
            raise UsageError(
                f"{recipe} and --model {model} both say what is trained",
                hint="leave one of them out; a recipe takes pretrain.model.preset=NAME",
            )
        if smoke:
            raise UsageError("--smoke shrinks a recipe, and --model has none", hint="leave one of them out")
        words = [word for word in (recipe, *(overrides or ())) if word is not None]
        loaded = recipe_of_model(model, [*words, *alone])
        show_plan(loaded, settings, ["--model", model, *words], places=places, verb="")
        return
    if recipe is None:
        raise UsageError(
            "there is nothing to plan: a recipe or --model is missing",
            hint="llmkit plan my.yaml, or llmkit plan --model llama-3.1-8b --on 8xH100",
        )
    words = [recipe, *(overrides or ())]
    verb = "run"
    if nodes is not None and nodes > 1:
        verb, words = "submit", [*words, "--nodes", str(nodes)]
    found = load_recipe(recipe, overrides=[*(overrides or ()), *alone], smoke=smoke)
    show_plan(found, settings, words, places=places, verb=verb)


def hardware_of(
    on: Sequence[str], *, nodes: int | None = None, price: float | None = None
) -> "Mapping[str, Hardware | None]":
    """What `--on` names, by name; without it, this machine (None: it is asked when the recipe is known).

    Raises:
        UsageError: There is no such hardware, or its name and `--nodes` disagree.
    """
    from llmkit.hardware import named_hardware, split_names

    if not on:
        if price is not None:
            raise UsageError("--price is for hardware that is named", hint="--on 8xH100 --price 2.5")
        return {"": None}
    found: dict[str, Hardware | None] = {}
    for name in split_names(on):
        place = named_hardware(name)
        if nodes is not None and place.nodes not in (1, nodes):
            raise UsageError(
                f"--on {name} is {place.nodes} machines, and --nodes says {nodes}",
                hint="leave one of them out",
            )
        place = replace(place, nodes=nodes) if nodes is not None else place
        found[name] = replace(place, price=(price, price)) if price is not None else place
    if not found:
        raise UsageError("--on names no hardware", hint="--on 8xH100")
    return found


def show_plan(
    loaded: "Loaded",
    settings: Settings,
    words: Sequence[str],
    *,
    verb: str = "run",
    places: "Mapping[str, Hardware | None] | None" = None,
) -> None:
    """Print the plan as the result of the command: text, or one object with `--json`.

    Args:
        loaded: The recipe.
        settings: What the command was told.
        words: The recipe and the overrides as they were typed, for the next command.
        verb: That command; empty where there is no recipe, whose text is then taken to be there.
        places: What to plan for, by name; by default this machine.
    """
    places = places or {"": None}
    show = _show_one if len(places) == 1 else _show_several
    given = (settings, places, verb)
    if settings.as_json:
        objects = {name: show(one, *given)[1] for name, one in loaded.variants.items()}
        give_json({"variants": objects} if objects else show(loaded, *given)[1])
        return
    for name, one in loaded.variants.items() or (("", loaded),):
        text = show(one, *given)[0]
        give("\n".join([*([f"variant {name}"] if name else []), text]))
    flags = ["--smoke"] if settings.smoke else []
    if verb == "run" and settings.processes is not None:
        flags += ["--processes", str(settings.processes)]
    flags += ["--runs", str(settings.runs)] if settings.runs != Path("runs") else []
    if verb:
        say("next: " + as_typed(shlex.join(["llmkit", verb, *words, *flags])))
    elif len(places) > 1:
        say("next: " + as_typed(shlex.join(["llmkit", "plan", *words, "--on", next(iter(places))])))


def _show_one(
    loaded: "Loaded", settings: Settings, places: "Mapping[str, Hardware | None]", verb: str
) -> tuple[str, dict[str, Any]]:
    rows, plain, _ = plan_of(loaded, settings, next(iter(places.values())), verb)
    names = ["", *(section for section, _, _ in rows)]
    lines = [(s if s != before else "", *rest) for before, (s, *rest) in zip(names, rows, strict=False)]
    return as_columns(lines), plain


def _show_several(
    loaded: "Loaded", settings: Settings, places: "Mapping[str, Hardware | None]", verb: str
) -> tuple[str, dict[str, Any]]:
    """A line for each; one that cannot be says why.

    Raises:
        LlmkitError: None of them can be.
    """
    from llmkit.plan.describe import HEADINGS, summary

    lines: list[tuple[str, ...]] = [HEADINGS]
    objects: dict[str, Any] = {}
    refused: list[LlmkitError] = []
    for name, place in places.items():
        try:
            _, plain, found = plan_of(loaded, settings, place, verb)
        except (UsageError, MissingError) as error:
            refused.append(error)
            objects[name] = {"error": error.message, "hint": error.hint}
            lines.append((name, f"no: {error.message}", *[""] * (len(HEADINGS) - 2)))
            continue
        objects[name] = plain
        lines.append(
            (name, *summary(found, place)) if found is not None else (name, *[""] * (len(HEADINGS) - 1))
        )
    if len(refused) == len(places):
        raise refused[-1]
    return as_columns(lines), {"plans": objects}


def _with_nodes_of(machine: "Machine", place: "Hardware | None") -> "Hardware | None":
    """The hardware that is named, as many machines of it as the recipe says where its name says nothing.

    Raises:
        UsageError: The two disagree.
    """
    if place is None or machine.nodes in (1, place.nodes):
        return place
    if place.nodes not in (None, 1):
        raise UsageError(
            f"--on names {place.nodes} machines, and machine.nodes says {machine.nodes}",
            hint=f"--on {machine.nodes}x..., or machine.nodes={place.nodes}",
        )
    return replace(place, nodes=machine.nodes)


def plan_of(
    loaded: "Loaded", settings: Settings, place: "Hardware | None" = None, verb: str = "run"
) -> "tuple[Rows, dict[str, Any], Plan | None]":
    """A plan as rows of section, key and value, as an object, and itself.

    Args:
        loaded: The recipe.
        settings: What the command was told.
        place: What to plan for; None: this machine.
        verb: The command that would be run; of `finetune` its own part of the recipe is planned. Empty: there is no
            recipe, and its text is taken to be there.

    Raises:
        UsageError: The recipe has nothing to plan.
    """
    from llmkit import run
    from llmkit.cli.commands import reporting, to_options
    from llmkit.plan.choices import check_devices
    from llmkit.plan.describe import describe

    recipe, options = loaded.recipe, to_options(settings)
    place = _with_nodes_of(recipe.machine, place)
    if settings.processes is not None:
        nodes = recipe.machine.nodes if place is None else place.nodes or 1
        if settings.processes % nodes:
            raise UsageError(
                f"{settings.processes} processes cannot be shared evenly by {nodes} nodes",
                hint=f"--processes {nodes * max(1, settings.processes // nodes)}",
            )
        if place is not None:
            check_devices(place, recipe.machine, settings.processes, "--processes")
    ahead, tunes = run.plan if verb else run.plan_without_text, verb == "finetune"
    found = ahead(loaded, options, place) if recipe.pretrain is not None and not tunes else None
    rows = run.outline(loaded, options) if recipe.tokenize is not None and not tunes else []
    rows += describe(found, place) if found is not None else []
    if tunes or (recipe.finetune is not None and recipe.pretrain is None):
        with reporting(settings) as reporter:
            found = run.plan_finetune(loaded, options, reporter, place)
        rows += describe(found, place)
    if not rows:
        raise UsageError("the recipe has nothing to plan", hint="`llmkit init gpt` shows a whole one")
    if found is not None:
        return rows, found.to_dict(), found
    sections: dict[str, Any] = {}
    for section, key, value in rows:
        sections.setdefault(section, {})[key] = value
    return rows, sections, None
