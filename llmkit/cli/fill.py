"""`llmkit fill`: the gaps of a text."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.options import AsJson, Debug, Runs, described
from llmkit.cli.output import as_typed, give, give_json, say
from llmkit.errors import UsageError

SHORT_HELP = "Let a trained model fill the gaps of a text."
HELP = described(
    """
    llmkit fill runs/my "To be or not to [MASK]."
    llmkit fill runs/my "床前明月[MASK]，疑是地上霜。" -k 3
    cat texts.txt | llmkit fill runs/my --json
    """,
    "Let a model that was trained on hidden tokens fill each [MASK] of a text. Gaps are filled independently of each "
    "other. Without texts, each line of stdin is one.",
)


def fill(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, its folder, or a model folder.", show_default=False)
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="A text with [MASK] in it.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="Tokens to show for each gap.")] = 5,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit fill`."""
    from llmkit.run.fill import fill as fill_gaps

    if not texts and sys.stdin.isatty():
        say("one text a line; Ctrl-D ends")
    given = list(texts or ()) or [line.rstrip("\r\n") for line in sys.stdin]
    if not given:
        raise UsageError(
            "no text: stdin is empty", hint=f'llmkit fill {shlex.quote(model)} "The [MASK] is blue."'
        )
    filled = fill_gaps(model, given, top=top, runs=runs)
    if as_json:
        give_json({"texts": filled})
        return
    give("\n".join(_shown(one) for one in filled))
    say("next: " + as_typed(f"llmkit fill {shlex.quote(model)} {shlex.quote(given[0])} -k {2 * top}"))


def _shown(filled: dict[str, Any]) -> str:
    """The text as filled, then a line for each gap."""
    from llmkit.report.formatting import format_percent, visible

    def _token(word: str) -> str:
        return visible(word).strip() or repr(word)

    lines = [visible(filled["text"])]
    for gap in filled["gaps"]:
        words = zip(gap["tokens"], gap["probabilities"], strict=True)
        lines.append("  " + "  ".join(f"{_token(word)} {format_percent(share)}" for word, share in words))
    return "\n".join(lines)
