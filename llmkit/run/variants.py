"""`llmkit run` on a recipe with variants: each of them in turn, then all of them side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.launch.world import detect_world
from llmkit.recipe import Loaded
from llmkit.recipe.schema import Pretrain
from llmkit.registry import goal_of
from llmkit.report.comparison import as_table, write_comparison
from llmkit.report.console import Reporter
from llmkit.report.trying import try_command
from llmkit.run.folders import Options, Result, report_of


def run_variants(
    loaded: Loaded,
    options: Options,
    reporter: Reporter,
    run_one: Callable[[Loaded, Options, Reporter], Result],
) -> Result:
    """Do all that each variant holds, and compare what they came to; what is done already is not done again.

    Args:
        loaded: The recipe, with its variants.
        options: As for every verb.
        reporter: Told what happens.
        run_one: What does a recipe without variants.
    """
    folder = options.runs / loaded.recipe.name
    done: dict[str, Result] = {}
    for number, (name, variant) in enumerate(loaded.variants.items(), start=1):
        reporter.note(f"variant {number} of {len(loaded.variants)}: {name}")
        done[name] = run_one(variant, options, reporter)
    failed = next((result.failed for result in done.values() if result.failed is not None), None)
    world = detect_world()
    trained = {
        name: result.folder / "pretrain" for name, result in done.items() if "pretrain" in result.summary
    }
    if not trained or (world is not None and world.rank != 0):
        return Result(folder, {name: result.summary for name, result in done.items()}, "", failed=failed)
    reports = {name: report_of(place) for name, place in trained.items()}
    sections = {name: section for name in trained if (section := loaded.variants[name].recipe.pretrain)}
    objectives = list(dict.fromkeys(section.objective for section in sections.values()))
    compared = write_comparison(folder, reports, command=options.command, ranked=len(objectives) == 1)
    rows: list[dict[str, Any]] = compared["variants"]
    if len(objectives) > 1:
        reporter.note(
            f"not ranked: the losses of different objectives ({', '.join(objectives)}) do not compare"
        )
    first = rows[0]["variant"]
    reporter.note(f"report: {folder / 'report.html'}")
    return Result(
        folder,
        {"variants": rows, "report": str(folder / "report.html")},
        _try(sections[first], trained[first].parent),
        table=as_table(rows),
        failed=failed,
    )


def _try(section: Pretrain, folder: Path) -> str:
    """The command that shows what a variant's model can do."""
    return try_command(goal_of(section.objective).model, str(folder), section.prompts)
