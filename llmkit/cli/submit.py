"""`llmkit submit`: a recipe's stages as jobs of a Slurm cluster."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from llmkit.cli.options import AsJson, Debug, OverrideWords, Quiet, RecipeWord, Runs, Smoke, described
from llmkit.cli.output import as_typed, give, give_json, say
from llmkit.errors import UsageError

SHORT_HELP = "Submit a recipe to a Slurm cluster."
HELP = described(
    """
    llmkit submit my.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00
    llmkit submit my.yaml --nodes 2 --gpus-per-node 8 --time 12h --dry-run
    llmkit submit my.yaml --command pretrain --partition gpu --account nlp
    llmkit submit my.yaml --gpus-per-node 1 --time 4h finetune.train.optim.lr='1e-5|3e-5|1e-4'
    """,
    "Submit a job for each stage that the recipe holds, each after the one before it; of a recipe with variants, or of "
    "settings with several values (A|B|C), an array of jobs. Before the time limit a job saves, and is queued again "
    "until it is done. Prints the numbers of the jobs.",
)

Command = Literal["run", "tokenize", "pretrain", "finetune", "eval", "compress"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("submit", short_help=SHORT_HELP, help=HELP)(submit)


def submit(
    recipe: RecipeWord,
    overrides: OverrideWords = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Machines of a job that trains.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, metavar="N", help="GPUs of a machine.")] = 0,
    time: Annotated[
        str, typer.Option(metavar="TIME", help="The limit of a job: 12:00:00, 2-00:00:00, 12h, 90m.")
    ] = "24:00:00",
    partition: Annotated[str, typer.Option(metavar="NAME", help="Default: the recipe's, or Slurm's.")] = "",
    account: Annotated[str, typer.Option(metavar="NAME", help="Whom it is charged to.")] = "",
    command: Annotated[
        Command | None,
        typer.Option(help="Submit this command alone; `run`: all stages in one job.", show_default=False),
    ] = None,
    processes_per_node: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Default: one per GPU, or one.", show_default=False),
    ] = None,
    cpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Cores of a machine; default: 4 per GPU.", show_default=False),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="GPU", help="Which GPUs these are, for the plan: A100.", show_default=False
        ),
    ] = None,
    lead: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Save so long before the limit; default: computed.", show_default=False
        ),
    ] = None,
    tasks_per: Annotated[
        Literal["node", "rank"],
        typer.Option(help="Start one agent per node, or let srun start every process."),
    ] = "node",
    restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start workers again after a crash, so often at most.")
    ] = 0,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="KEY=VALUE", help="Another setting: qos=high.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show the scripts; write and submit nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    smoke: Smoke = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit submit`."""
    from llmkit.launch.slurm import parse_limit
    from llmkit.run.submit import prepare
    from llmkit.run.submit import submit as carry_out
    from llmkit.run.submit_plan import Wanted

    if tasks_per == "rank" and restarts:
        raise UsageError("--restarts needs an agent that starts again", hint="leave --tasks-per rank out")
    wanted = Wanted(
        recipe=recipe,
        words=tuple(overrides or ()),
        command=command,
        nodes=nodes,
        gpus=gpus_per_node,
        processes=processes_per_node,
        cores=cpus_per_node,
        limit_s=parse_limit(time),
        lead_s=parse_limit(lead, "--lead") if lead is not None else None,
        device=on,
        start=tasks_per,
        restarts=restarts,
        partition=partition,
        settings=settings_of(sbatch or (), account),
        runs=runs,
        smoke=smoke,
        typed=shlex.join(["llmkit", *sys.argv[1:]]),
    )
    submission = prepare(wanted)
    if dry_run:
        scripts = submission.scripts()
        if as_json:
            give_json({"folder": str(submission.folder), "scripts": scripts})
        else:
            give("\n".join(scripts.values()).rstrip())
    if not quiet:
        for note in submission.notes:
            say(f"note: {note}")
    if dry_run:
        return
    sent = carry_out(submission)
    next_command = shlex.join(["llmkit", "runs", *(["--runs", str(runs)] if runs != Path("runs") else [])])
    if as_json:
        give_json({"folder": str(submission.folder), "jobs": sent, "next": as_typed(next_command)})
        return
    for one in sent:
        give(str(one["id"]))
    if quiet:
        return
    for one in sent:
        after = f", after job {one['after']}" if one["after"] else ""
        say(f"job {one['id']}: {one['stage']}{after}; its words: {one['log']}")
    say("next: " + as_typed(next_command))


def settings_of(words: list[str] | tuple[str, ...], account: str) -> tuple[tuple[str, str], ...]:
    """`--sbatch KEY=VALUE`, and the account, as settings by their long names; a flag has no value."""
    pairs = [word.removeprefix("--").partition("=") for word in words]
    found = {key: value for key, _, value in pairs}
    if account:
        found = {"account": account, **found}
    return tuple(found.items())
