"""`llmkit predict`: what a model that was trained for a task says of texts."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.options import AsJson, Debug, Runs, described
from llmkit.cli.output import as_typed, give, give_json, say
from llmkit.errors import UsageError

SHORT_HELP = "Let a fine-tuned model judge texts."
HELP = described(
    """
    llmkit predict runs/reviews-cls "I would buy it again."
    llmkit predict runs/pairs-cls "A man plays." --other "Someone makes music."
    llmkit predict runs/squad-qa "Who wrote it?" --other "Ann wrote it in 1990."
    cat texts.txt | llmkit predict runs/reviews-cls --json
    """,
    "Let a model that was trained for classes, numbers, tags or answers judge texts. Without texts, each line of stdin "
    "is one.",
)


def predict(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run or its folder.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="A text; of `qa`, a question.", show_default=False),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The second of two texts; of `qa`, where the answer is."),
    ] = None,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit predict`."""
    from llmkit.run.tasks import predict as judge

    if not texts and sys.stdin.isatty():
        say("one text a line; Ctrl-D ends")
    given = list(texts or ()) or [line.rstrip("\r\n") for line in sys.stdin]
    if not given:
        raise UsageError("no text: stdin is empty", hint=f'llmkit predict {shlex.quote(model)} "A text."')
    said = judge(model, [_row(text, other) for text in given], runs=runs)
    if as_json:
        give_json({"predictions": [{"text": text, **one} for text, one in zip(given, said, strict=True)]})
        return
    give("\n".join(_shown(text, one) for text, one in zip(given, said, strict=True)))
    say("next: " + as_typed(f"llmkit eval {shlex.quote(model)}"))


def _row(text: str, other: str | None) -> dict[str, Any]:
    """A row of whatever task, for each takes what it knows."""
    row: dict[str, Any] = {"text": text, "tokens": text.split(), "question": text, "source": text, "id": "0"}
    return row if other is None else {**row, "other": other, "context": other}


def _shown(text: str, said: dict[str, Any]) -> str:
    """A prediction on one line: the text, and what is said of it."""
    from llmkit.report.formatting import visible

    if "probabilities" in said:
        best = sorted(said["probabilities"].items(), key=lambda pair: -pair[1])[:3]
        shares = "  ".join(f"{name} {share:.1%}" for name, share in best)
        label = said["label"] if isinstance(said["label"], str) else ", ".join(said["label"]) or "none"
        return f"{label}  ({shares})  {visible(text)}"
    return f"{json.dumps(said, ensure_ascii=False, default=float)}  {visible(text)}"
