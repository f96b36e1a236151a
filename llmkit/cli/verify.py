"""`llmkit verify-resume`: the recipe's own proof that it resumes exactly."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.commands import reporting, to_options
from llmkit.cli.options import (
    AsJson,
    Debug,
    OverrideWords,
    Processes,
    Quiet,
    RecipeWord,
    Runs,
    Settings,
    described,
)
from llmkit.cli.output import as_columns, give, give_json

if TYPE_CHECKING:
    from llmkit.run.compare import Finding
    from llmkit.run.verify import Verified


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "verify-resume",
        short_help="Prove that a recipe's run, killed and resumed, ends with the same bits.",
        help=described(
            """
            llmkit verify-resume my.yaml
            llmkit verify-resume my.yaml --steps 64 --processes 2
            llmkit verify-resume my.yaml --other-processes 2    resumed on another number too
            """,
            "Train the recipe for a few steps, once without a break and once killed and resumed, and compare losses, "
            "weights, optimizer, export and samples bit for bit. Exit code 4: they are not the same. The last "
            "evaluation takes all held-out text, as in a real run.",
        ),
    )(verify_resume)


def verify_resume(
    recipe: RecipeWord,
    overrides: OverrideWords = None,
    steps: Annotated[int, typer.Option(min=8, metavar="N", help="How long each run is.")] = 16,
    processes: Processes = None,
    other_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="M",
            help="Resume on this number of processes too: equal to rounding.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit verify-resume`."""
    from llmkit.run.verify import verify_resume as verify

    settings = Settings(runs, quiet=quiet, as_json=as_json, processes=processes)
    with reporting(settings) as reporter:
        found = verify(
            recipe,
            overrides or (),
            to_options(settings),
            reporter,
            steps=steps,
            other_processes=other_processes,
        )
    if as_json:
        give_json(found.to_dict())
    else:
        give(as_columns(table(found)))
    found.check()


def table(found: "Verified") -> list[tuple[str, ...]]:
    """The findings as rows of text: a column for the resumed run, one for that on another number of processes."""
    columns = [
        ("", *(one.what for one in found.resumed)),
        ("compared", *(one.compared or "none" for one in found.resumed)),
        (
            f"killed after step {found.killed_at} of {found.steps}, resumed from {found.saved_at}",
            *(_to_the_bit(one) for one in found.resumed),
        ),
    ]
    if found.other_processes is not None:
        title = f"resumed on {found.other_processes} process{'es' if found.other_processes > 1 else ''}"
        columns.append((title, *(_to_rounding(one, found) for one in found.elsewhere)))
    return list(zip(*columns, strict=True))


def _to_the_bit(one: "Finding") -> str:
    if one.same:
        return "same bits" if one.compared else "nothing to compare"
    return f"DIFFERS {_by(one, one.largest)}"


def _to_rounding(one: "Finding", found: "Verified") -> str:
    if one.same:
        return _to_the_bit(one)
    tolerance = found.tolerances.get(one.what)
    if one.unlike or tolerance is None:
        return "may differ" if found.within(one) else f"DIFFERS {_by(one, math.inf)}"
    return f"{_by(one, one.apart)}, {'within' if found.within(one) else 'NOT WITHIN'} {tolerance:g}"


def _by(one: "Finding", apart: float) -> str:
    return f"by {apart:.1e}" if math.isfinite(apart) else f"({one.first})"
