"""`llmkit tokenize`: a recipe's text, or any text, to a tokenizer and token shards; or one text to its pieces."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import (
    AsJson,
    Debug,
    DryRun,
    Fresh,
    OverrideWords,
    Quiet,
    Runs,
    Settings,
    Smoke,
    described,
    run_name,
)
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.recipe import Loaded

SHORT_HELP = "Prepare text, learn a tokenizer, make token shards."
HELP = described(
    """
    llmkit tokenize my.yaml
    llmkit tokenize my.yaml tokenize.vocab_size=8k --workers 4
    llmkit tokenize my.yaml --json | jq .dropped
    cat books/*.txt | llmkit tokenize - --tokenizer runs/my/tokenize/tokenizer
    llmkit tokenize my.yaml --show "How is this cut?"
    """,
    "Clean the recipe's text, learn a tokenizer from it and turn it into token shards. Killed, the same command "
    "goes on from what is finished. Without a recipe: text files, or `-` for text on stdin.",
)

_RECIPES = (".yaml", ".yml", ".json")


def tokenize(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|FILES|-",
            help="A recipe; or text: a path, a glob, `-` for stdin.",
            show_default=False,
        ),
    ] = None,
    overrides: OverrideWords = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Use this tokenizer, by folder or Hub name.", show_default=False),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(metavar="TEXT|FILE", help="Show how a text is cut, and stop.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes; default: one a core.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    fresh: Fresh = False,
    smoke: Smoke = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit tokenize`."""
    from llmkit import run
    from llmkit.cli.commands import finish, reporting, show_plan, to_options

    settings = Settings(runs, dry_run, quiet, as_json, fresh, smoke)
    words = [*(overrides or ()), *([f"machine.workers={workers}"] if workers else ())]
    if show is not None and subject is None:
        _show(show, _named(tokenizer), as_json=as_json)
        return
    if subject is None:
        raise UsageError("what shall be tokenized?", hint="llmkit tokenize my.yaml")
    loaded = _load(subject, tokenizer, words, smoke=smoke)
    if dry_run:
        show_plan(loaded, settings, [subject, *words])
        return
    with reporting(settings) as reporter:
        options = to_options(settings, [subject, *words, *(["--smoke"] if smoke else [])])
        if show is not None:
            _show(show, run.tokenizer_of(loaded, options, reporter), as_json=as_json)
            return
        result = run.tokenize(loaded, options, reporter)
    finish(result, settings)


def _load(subject: str, tokenizer: str | None, words: Sequence[str], *, smoke: bool) -> "Loaded":
    """The recipe that is meant: a file, or one made for text that was named instead of a recipe."""
    from llmkit.recipe import load_recipe

    if not _is_text(subject, tokenizer):
        if tokenizer is not None:
            words = [*words, f"tokenize.tokenizer={tokenizer}"]
        return load_recipe(subject, overrides=words, smoke=smoke)
    section: dict[str, Any] = {"data": {"files": subject}}
    if tokenizer is not None:
        # All of the text is wanted; nothing is learnt that would have to be measured on other text.
        section |= {"tokenizer": tokenizer, "held_out": 0}
    name = "stdin" if subject == "-" else run_name(subject)
    return load_recipe({"llmkit": 1, "name": name, "tokenize": section}, overrides=words, smoke=smoke)


def _is_text(subject: str, tokenizer: str | None) -> bool:
    """Whether text is meant. `-` is a recipe on stdin, as everywhere, unless a tokenizer is given."""
    if subject == "-":
        return tokenizer is not None
    if subject.endswith(_RECIPES):
        return False
    return "://" in subject or Path(subject).exists() or bool(glob.glob(subject, recursive=True))


def _named(tokenizer: str | None) -> str:
    if tokenizer is None:
        raise UsageError(
            "--show needs a tokenizer", hint="llmkit tokenize my.yaml --show TEXT, or add --tokenizer DIR"
        )
    return tokenizer


def _show(text: str, tokenizer: str, *, as_json: bool) -> None:
    from llmkit.cli.show import show_pieces

    show_pieces(text, tokenizer, as_json=as_json)
