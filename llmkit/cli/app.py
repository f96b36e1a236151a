"""The commands' names, order and first help page."""

from typing import Annotated

import typer

from llmkit import __version__
from llmkit.cli import commands, doctor, explain, recipe, report, runs, submit, sweep, verify
from llmkit.cli.options import described
from llmkit.cli.output import give, say
from llmkit.errors import ExitCode

# Plain help and plain errors on purpose: they are the same on a terminal, in a pipe and in a log, and the
# start does not pay for rich (0.15 s). Rich draws progress, where a terminal asks for it.
app = typer.Typer(
    name="llmkit",
    help=described(
        """
        llmkit demo                             train a small model here, in minutes
        llmkit init gpt my.yaml                 a commented recipe of your own
        llmkit run my.yaml                      all that the recipe holds, in order
        llmkit plan my.yaml                     what that will take: steps, memory, time
        llmkit generate runs/my "Once upon"     text from the model
    llmkit finetune --task cls --model MODEL --data reviews.csv
        """,
        "A language model's whole life from one recipe file: text, tokenizer, training, fine-tuning, evaluation.",
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(asked: bool) -> None:
    if asked:
        give(f"llmkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Without a command: the help, as an error."""
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


commands.register(app)
verify.register(app)
sweep.register(app)
submit.register(app)
explain.register(app)
runs.register(app)
report.register(app)
recipe.register(app)
doctor.register(app)
