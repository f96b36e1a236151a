"""`llmkit explain`: what in a text makes a model say what it says; coloured on a terminal, JSON in a pipe."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.commands import reporting, to_options
from llmkit.cli.options import AsJson, Debug, Runs, Settings, described
from llmkit.cli.output import as_typed, give, give_json, say
from llmkit.cli.show import Terminal, painted, terminal_of
from llmkit.errors import UsageError
from llmkit.report.explained import FAINT, balance, heading, shares, strongest
from llmkit.report.formatting import cell_width, visible

_MOST_WORDS = 8
# Black letters on light tints, the faintest first.
_FOR = ("38;5;16;48;5;194", "38;5;16;48;5;157", "38;5;16;48;5;77")
_AGAINST = ("38;5;16;48;5;224", "38;5;16;48;5;217", "38;5;16;48;5;203")
_FEW_COLOURS = ("30;42", "30;41")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "explain",
        short_help="Show which words make a model say what it says.",
        help=described(
            """
            llmkit explain runs/reviews-cls "Not bad at all."
            llmkit explain runs/reviews-cls "Not bad at all." --label negative
            llmkit explain runs/pairs-cls "A man plays." --other "Someone makes music."
            llmkit explain runs/my-gpt "The capital of France is" --token " Paris"
            llmkit explain runs/reviews-cls "Not bad at all." --json | jq .explained[0].words
            """,
            "Share out among the words of a text what makes a model give it a class or a number, or go on as it does, "
            "by integrated gradients. Without texts, each line of stdin is one. The report is left in RUN/explain.",
        ),
    )(explain)


def explain(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, its folder, or a model folder.", show_default=False)
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="A text.", show_default=False)
    ] = None,
    other: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The second of two texts.", show_default=False)
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL", help="The class to explain; default: the likeliest.", show_default=False
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Of a model that writes: how it goes on, with its blank; default: next, the likeliest token.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            min=2, max=1000, metavar="N", help="Gradients to take; more where these are not enough."
        ),
    ] = 50,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit explain`."""
    from llmkit.run.explain import explain as find_why

    if not texts and sys.stdin.isatty():
        say("one text a line; Ctrl-D ends")
    given = list(texts or ()) or [line.rstrip("\r\n") for line in sys.stdin]
    if not given:
        raise UsageError("no text: stdin is empty", hint=f'llmkit explain {shlex.quote(model)} "A text."')
    settings = Settings(runs, as_json=as_json)
    with reporting(settings) as reporter:
        found = find_why(
            model,
            given,
            to_options(settings, [model]),
            reporter,
            other=other,
            label=label,
            token=token,
            steps=steps,
        )
    terminal = None if as_json else terminal_of(sys.stdout, os.environ)
    if terminal is None:
        give_json(found.summary)
    else:
        give("\n\n".join("\n".join(shown(row, terminal)) for row in found.summary["explained"]))
    if not as_json:
        say(f"report: {found.summary['report']}")
        say("next: " + as_typed(found.next_command))


def shown(row: Mapping[str, Any], terminal: Terminal) -> list[str]:
    """Lines about one text: what is explained, the text with its words marked, the strongest words, the sum."""
    lines = [heading(row)]
    for part in (0, 1) if row.get("other") else (0,):
        lines += painted(stretches(row, part, terminal.tints), terminal.columns)
    found = strongest(row, 2 * _MOST_WORDS)
    speaking = [[_cell(one) for one in found if one["score"] * sign > 0][:_MOST_WORDS] for sign in (1, -1)]
    pairs = [("for it", "against it"), *zip_longest(*speaking, fillvalue="")]
    width = max(cell_width(cell) for cell, _ in pairs)
    table = (f"{left}{' ' * (width - cell_width(left))}  {right}".rstrip() for left, right in pairs)
    return [*lines, *table, balance(row)]


def _cell(word: Mapping[str, Any]) -> str:
    return f"{word['score']:+.3f} {_plain(word['piece'])}"


def stretches(row: Mapping[str, Any], part: int, tints: Sequence[str]) -> list[tuple[str, str]]:
    """One of the texts as stretches with the codes of their colours; without colours scores stand behind words."""
    text = str(row["other" if part else "text"])
    found, done = [], 0
    for word, share in zip(row["words"], shares(row["words"]), strict=True):
        if word["part"] == part:
            start, end = max(done, word["start"]), max(done, word["end"])
            found += [(_plain(text[done:start]), ""), (_plain(text[start:end]), _style(share, tints))]
            if not tints and abs(share) >= FAINT:
                found.append((f"({word['score']:+.2f})", ""))
            done = end
    return [*found, (_plain(text[done:]), "")]


def _style(share: float, tints: Sequence[str]) -> str:
    """The colour of a word with this share of the strongest score."""
    if not tints or abs(share) < FAINT:
        return ""
    if not tints[0].startswith("38;5"):  # a terminal of few colours
        return _FEW_COLOURS[share < 0]
    return (_FOR if share > 0 else _AGAINST)[min(2, int(3 * abs(share)))]


def _plain(text: str) -> str:
    return visible(text).replace("\t", " ")
