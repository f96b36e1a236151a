"""`llmkit runs` and `llmkit runs diff`: which runs there are, and in what two of them differ."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import AsJson, Debug, Runs, described
from llmkit.cli.output import as_columns, as_typed, give, give_json, say

if TYPE_CHECKING:
    from llmkit.run.runs import Run
    from llmkit.run.runs_diff import Changed, Figure, RunsDiff

_MOST_PARTS = 60
"""A setting's value is cut after so many characters in the table; JSON holds all of it."""
_NOTHING = "-"

listing = typer.Typer(
    name="runs",
    no_args_is_help=False,
    rich_markup_mode=None,
    short_help="List the runs, or compare two of them.",
    help=described(
        """
        llmkit runs
        llmkit runs --json | jq '.runs[] | select(.status == "interrupted") | .name'
        llmkit runs diff small large
        """,
        "List the runs, the newest first: what they did, how far they got, what came of them.",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(listing)


@listing.callback(invoke_without_command=True)
def show_runs(
    context: typer.Context, runs: Runs = Path("runs"), as_json: AsJson = False, debug: Debug = False
) -> None:
    """`llmkit runs`."""
    if context.invoked_subcommand is not None:
        context.obj = runs
        return
    from llmkit.run.runs import find_runs, with_states

    found = with_states(find_runs(runs))
    if as_json:
        give_json({"folder": str(runs), "runs": [run.to_dict() for run in found]})
        return
    if not found:
        say(f"no runs in {runs}")
        say("next: " + as_typed("llmkit demo"))
        return
    give(as_columns(table(found)))
    for problem in (problem for run in found for problem in run.problems):
        say(f"damaged: {problem}")
    say("next: " + as_typed(next_command(found, runs)))


def table(runs: Sequence["Run"]) -> list[tuple[str, ...]]:
    """The runs as rows of text under a line of headings; what is inside a run stands below it, indented."""
    head = ("run", "status", "jobs", "did", "steps", "figure", "loss", "size", "written (UTC)", "took")
    rows = [_row(run, depth) for run, depth in _in_depth(runs)]
    used = [number for number in range(len(head)) if any(row[number] != _NOTHING for row in rows)]
    return [tuple(row[number] for number in used) for row in (head, *rows)]


def _in_depth(runs: Sequence["Run"], depth: int = 0) -> Iterator[tuple["Run", int]]:
    for run in runs:
        yield run, depth
        yield from _in_depth(run.runs, depth + 1)


def _row(run: "Run", depth: int) -> tuple[str, ...]:
    from llmkit.report.formatting import format_bytes, format_count, format_duration, format_number, one_line

    measured = run.measured
    name = run.name if not depth else "  " * depth + run.folder.name
    size = [] if run.num_parameters is None else [format_count(run.num_parameters)]
    size += [] if run.model_bytes is None else [format_bytes(run.model_bytes)]
    figure = f"{measured.best} {format_number(measured.figures[measured.best])}" if measured else _NOTHING
    return (
        one_line(name),
        _status(run),
        _jobs(run),
        ", ".join(_did(run)) or _NOTHING,
        _steps(run),
        figure,
        _NOTHING if run.loss is None or (measured and measured.best == "loss") else format_number(run.loss),
        ", ".join(size) or _NOTHING,
        run.when.strftime("%Y-%m-%d %H:%M"),
        _NOTHING if run.seconds is None else format_duration(run.seconds),
    )


def _status(run: "Run") -> str:
    """Its own, or how many of those inside it came how far."""
    if run.stages:
        return run.status
    if run.jobs and not run.runs:
        return "submitted"
    found = [inner.status for inner in run.runs]
    return ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))


def _jobs(run: "Run") -> str:
    """What Slurm says of the jobs it knows: `12 pretrain RUNNING, 13 finetune PENDING (Dependency)`."""
    known = [one for one in run.jobs if one.get("state")]
    words = [f"{one['id']} {one['stage']} {one['state']}" for one in known]
    words = [
        f"{text} ({one['reason']})" if one["reason"] else text for text, one in zip(words, known, strict=True)
    ]
    return ", ".join(words) or _NOTHING


def _did(run: "Run") -> list[str]:
    """The stages by name; several evaluations of other data are counted."""
    names = [
        f"{stage.name} (does not hold)"
        if stage.name.startswith("compress") and stage.status == "failed"
        else stage.name
        for stage in run.stages
    ]
    others = [name for name in names if name.startswith("eval-")]
    plain = [name for name in names if name not in others]
    return [*plain, *([f"{len(others)} more eval{'s' if len(others) > 1 else ''}"] if others else [])]


def _steps(run: "Run") -> str:
    made = run.trained
    if made is None or made.step is None:
        return _NOTHING
    whole = made.num_steps is None or (made.status == "done" and made.step >= made.num_steps)
    return f"{made.step:,}" if whole else f"{made.step:,} of {made.num_steps:,}"


def next_command(runs: Sequence["Run"], folder: Path) -> str:
    """What a person types next: watch the newest run's job, or go on with it; else compare runs, or ask one."""
    first = runs[0]
    queued = [one for one in first.jobs if one.get("state") in ("PENDING", "RUNNING")]
    if queued:
        return shlex.join(["tail", "-F", str(queued[0]["log"])])
    made = first.trained
    if first.status == "interrupted" and made is not None and str(made.report.get("command") or ""):
        return str(made.report["command"])
    able = [(run, run.measured) for run in runs if run.measured is not None]
    alike = [run for run, stage in able if (stage.task, stage.best) == (able[0][1].task, able[0][1].best)]
    words = [_typed(run, folder) for run in alike]
    if len(words) > 1:
        return shlex.join(["llmkit", "runs", "diff", *words[:2]])
    ready = [_typed(run, folder) for run in alike if run.has_model]
    if ready:
        return shlex.join(["llmkit", "eval", ready[0]])
    # Figures of a model from elsewhere: they were measured on data that a person named.
    command = str(able[0][1].report.get("command") or "") if able else ""
    return command or "llmkit demo"


def _typed(run: "Run", folder: Path) -> str:
    """A run as it can be typed: its name where runs are looked for, else its folder."""
    return run.name if folder == Path("runs") else str(run.folder)


@listing.command(
    "diff",
    short_help="Show in what two runs differ: settings, figures, versions.",
    help=described(
        """
        llmkit runs diff small large
        llmkit runs diff runs/a/finetune runs/b/finetune --json
        """,
        "Show in what two runs differ: the settings as they ran, with defaults; what was measured, and whether the "
        "second is better; versions and hardware.",
    ),
)
def diff_two(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="A run.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another run.", show_default=False)],
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit runs diff`."""
    from llmkit.run.runs import find_run
    from llmkit.run.runs_diff import diff_runs

    place = context.obj if runs == Path("runs") and isinstance(context.obj, Path) else runs
    found = diff_runs(find_run(first, place), find_run(second, place))
    if as_json:
        give_json(found.to_dict())
        return
    for note in found.notes:
        say(f"note: {note}")
    parts = list(differences(found))
    give("\n\n".join(f"{title}\n{as_columns(rows)}" for title, rows in parts) if parts else "no difference")
    command = ["llmkit", "report", first, second, *(["--runs", str(place)] if place != Path("runs") else [])]
    say("next: " + as_typed(shlex.join(command)))


def differences(found: "RunsDiff") -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """What differs, as tables of text with their titles; a table without rows is left out."""
    head = (found.a, found.b)
    figures = [figure for figure in found.figures if figure.a != figure.b]
    if rows := [_changed(pair) for pair in found.recipe]:
        yield "recipe", [("setting", *head), *rows]
    if rows := [_changed(pair) for pair in found.machine]:
        yield "machine settings, which change no result", [("setting", *head), *rows]
    if figures:
        rows_of = [_figure(figure, found.b) for figure in figures]
        same = len(found.figures) - len(figures)
        title = f"figures ({same} more {'is' if same == 1 else 'are'} the same)" if same else "figures"
        yield title, [("figure", *head, ""), *rows_of]
    if rows := [_changed(pair) for pair in found.environment]:
        yield "environment", [("", *head), *rows]


def _changed(pair: "Changed") -> tuple[str, str, str]:
    return pair.key, _value(pair.a), _value(pair.b)


def _value(value: Any) -> str:
    from llmkit.report.formatting import one_line

    if value is None:
        return _NOTHING
    text = one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _MOST_PARTS else f"{text[: _MOST_PARTS - 1]}…"


def _figure(figure: "Figure", second: str) -> tuple[str, str, str, str]:
    from llmkit.report.formatting import format_number

    cells = ["not measured" if one is None else format_number(one) for one in (figure.a, figure.b)]
    said = f"{second} is {figure.verdict}" if figure.verdict else ""
    said += ", but the intervals overlap" if figure.overlaps and said else ""
    return f"{figure.stage} {figure.name}", cells[0], cells[1], said
