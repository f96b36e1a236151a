"""`llmkit report`: several runs on one page."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import AsJson, Debug, Quiet, Runs, described
from llmkit.cli.output import as_columns, as_typed, give, give_json, say
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.run.runs import Run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "report",
        short_help="Put several runs side by side on one page.",
        help=described(
            """
            llmkit report small large
            llmkit report runs/a runs/b runs/c -o compared.html
            llmkit report small large --json | jq .figures
            """,
            "Put runs side by side: figures with the best marked, learning curves together, the settings in which "
            "they differ, tables of their evaluations. Every number stands in the JSON file beside the page.",
        ),
    )(report)


def report(
    words: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Two runs or more.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The page; by default in the folder of runs."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit report`."""
    from llmkit.report.side_by_side import check_page, write_side_by_side
    from llmkit.run.runs import find_run
    from llmkit.run.runs_diff import settings_of

    found = [find_run(word, runs) for word in words]
    if len(found) < 2:
        page = next((one.folder / "report.html" for one in reversed(found[0].stages)), "")
        raise UsageError(
            "one run has no other to stand beside",
            hint=f"name two or more; its own page is {page}" if page else "",
        )
    page = output or runs / f"{'-'.join(run.folder.name for run in found[:4])}.html"
    if page.suffix != ".html":
        raise UsageError(f"{page}: the page is an .html file", hint=f"-o {page.with_suffix('.html')}")
    check_page(page)  # before the figures of all runs are put together
    made = write_side_by_side(
        page,
        [_facts(run) for run in found],
        settings_of(found),
        command=shlex.join(["llmkit", *sys.argv[1:]]),
    )
    for problem in (problem for run in found for problem in run.problems):
        say(f"damaged: {problem}")
    if as_json:
        give_json({"page": str(page), **made})
    elif quiet:
        give(str(page))
    else:
        give(as_columns(_table(made, [run.name for run in found])))
        say(f"look: {page}")
        say("next: " + as_typed(shlex.join(["llmkit", "runs", "diff", *words[:2]])))


def _facts(run: "Run") -> dict[str, Any]:
    """A run as the page takes it."""
    return {
        "name": run.name,
        "status": run.status,
        "num_parameters": run.num_parameters,
        "model_bytes": run.model_bytes,
        "seconds": run.seconds,
        "stages": [
            {
                "name": stage.name,
                "figures": stage.figures,
                "intervals": {name: list(ends) for name, ends in stage.intervals.items()},
                "report": stage.report,
            }
            for stage in run.stages
        ],
    }


def _table(made: dict[str, Any], names: list[str]) -> list[tuple[str, ...]]:
    """The figures as rows of text; a star marks the best."""
    from llmkit.report.formatting import format_number

    rows: list[tuple[str, ...]] = [("figure", *names)]
    for one in made["figures"]:
        cells = [
            "-" if value is None else format_number(value) + ("*" if number in one["best"] else "")
            for number, value in enumerate(one["values"])
        ]
        rows.append((f"{one['stage']} {one['name']}", *cells))
    return rows
