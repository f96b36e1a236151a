"""`llmkit tokenize`: a recipe's text, or any text, to a tokenizer and token shards; or one text to its pieces."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.options import (
    AsJson,
    Debug,
    DryRun,
    Fresh,
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
            metavar="RECIPE|FILE",
            help="A recipe (`-`: on stdin); or text: paths, a glob, and with --tokenizer `-` for text on stdin.",
            show_default=False,
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE|FILE",
            help="Settings to change: tokenize.vocab_size=8k; or more files of text.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Use this tokenizer: a folder, a run, or a Hub name.", show_default=False
        ),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="Show how a text is cut, and stop; in a pipe, as JSON with offsets in bytes.",
            show_default=False,
        ),
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
    tokenizer = _tokenizer_folder(tokenizer, runs)
    if show is not None:
        _refuse_missing_file(show)
    if show is not None and subject is None:
        _show(show, _named(tokenizer), as_json=as_json)
        return
    if subject is None:
        raise UsageError("what shall be tokenized?", hint="llmkit tokenize my.yaml")
    files, overrides = _files_and_overrides(subject, words or (), tokenizer)
    overrides += [f"machine.workers={workers}"] if workers else []
    loaded = _load(subject, files, tokenizer, overrides, smoke=smoke)
    if dry_run:
        show_plan(loaded, settings, [subject, *overrides], verb="tokenize")
        return
    with reporting(settings) as reporter:
        options = to_options(settings, [subject, *overrides, *(["--smoke"] if smoke else [])])
        if show is not None:
            _show(show, run.tokenizer_of(loaded, options, reporter), as_json=as_json)
            return
        result = run.tokenize(loaded, options, reporter)
    finish(result, settings)


def _files_and_overrides(
    subject: str, words: Sequence[str], tokenizer: str | None
) -> tuple[list[str], list[str]]:
    """The files of text that are named (none where a recipe is), and the settings that are changed."""
    if not _is_text(subject, tokenizer):
        return [], list(words)
    more = [word for word in words if "=" not in word or Path(word).exists()]
    return [subject, *more], [word for word in words if word not in more]


def _tokenizer_folder(word: str | None, runs: Path) -> str | None:
    """The tokenizer's folder that is meant, if a run or its folder is named."""
    if word is None:
        return None
    for place in (Path(word), runs / word):
        for folder in (place, place / "tokenizer", place / "tokenize/tokenizer", place / "model"):
            if (folder / "tokenizer_config.json").is_file():
                return str(folder)
    return word


def _refuse_missing_file(text: str) -> None:
    looks_like_a_path = "/" in text and not any(map(str.isspace, text)) and Path(text).suffix
    if looks_like_a_path and not Path(text).exists():
        raise UsageError(
            f"--show {text}: there is no such file", hint="echo TEXT | llmkit tokenize ... --show -"
        )


def _load(
    subject: str, files: Sequence[str], tokenizer: str | None, words: Sequence[str], *, smoke: bool
) -> "Loaded":
    """The recipe that is meant: a file, or one made for text that was named instead of a recipe."""
    from llmkit.recipe import load_recipe

    if not files:
        if tokenizer is not None:
            words = [*words, f"tokenize.tokenizer={tokenizer}"]
        return load_recipe(subject, overrides=words, smoke=smoke)
    section: dict[str, Any] = {"data": {"files": list(files)}}
    if tokenizer is not None:
        # All of the text is wanted; nothing is learnt that would have to be measured on other text.
        section |= {"tokenizer": tokenizer, "held_out": 0}
    name = "stdin" if subject == "-" else run_name(_before_the_wildcard(subject))
    return load_recipe({"llmkit": 1, "name": name, "tokenize": section}, overrides=words, smoke=smoke)


def _before_the_wildcard(pattern: str) -> str:
    """What a glob begins with: `data/web-*.jsonl` -> `data/web`, `data/web/*.jsonl` -> `data/web`."""
    return re.split(r"[*?\[]", pattern)[0].rstrip("/-_.") or "text"


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
