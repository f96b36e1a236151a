"""`llmkit generate`: text from a trained model."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.options import AsJson, Debug, Runs, Settings, described
from llmkit.cli.output import as_typed, give, give_json, say
from llmkit.errors import UsageError

SHORT_HELP = "Let a trained model write, or answer."
HELP = described(
    """
    llmkit generate runs/my "Once upon a time"
    llmkit generate runs/my "Once" "Twice" -n 3 --temperature 0.7
    cat prompts.txt | llmkit generate runs/my --json
    llmkit generate runs/my-chat "Who are you?" --system "Be brief."
    llmkit generate path/to/base "Who?" --adapter runs/polite --adapter runs/short=0.5
    """,
    "Let a trained model write: go on from a text, or, where it has learned to chat, answer it. Without prompts, each "
    "line of stdin is one.",
)


def generate(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, its folder, or a model folder.", show_default=False)
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="How the text begins.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Texts for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to each prompt.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time; higher is more varied.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens with this share in sum."),
    ] = 1.0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Ask by the model's chat template, or go on from the text as it stands; default: as it learned.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str,
        typer.Option(metavar="TEXT", help="What the system says before the question.", show_default=False),
    ] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN[=WEIGHT]",
            help="An adapter for this model; several are added up.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same texts.")] = 42,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit generate`."""
    from llmkit import run
    from llmkit.cli.commands import reporting
    from llmkit.recipe.schema import Sampling
    from llmkit.report.formatting import visible

    if not prompts and sys.stdin.isatty():
        say("one prompt a line; Ctrl-D ends")
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p
    )
    texts = list(prompts or ()) or [line.rstrip("\r\n") for line in sys.stdin]
    if not texts:
        raise UsageError("no prompt: stdin is empty", hint=f'llmkit generate {shlex.quote(model)} "Once"')
    with reporting(Settings(runs, as_json=as_json)) as reporter:
        written = run.generate(
            model,
            texts,
            sampling,
            samples=samples,
            seed=seed,
            runs=runs,
            reporter=reporter,
            chat=chat,
            system=system,
            adapters=adapter or (),
        )
    if as_json:
        give_json({"samples": written})
        return
    # A young model writes control bytes too; only --json gives them back as they are.
    shown = (
        sample["text"] if sample["chat"] else f"{sample['prompt']}{sample['text']}" for sample in written
    )
    give("\n---\n".join(map(visible, shown)))
    say(
        "next: "
        + as_typed(
            f"llmkit generate {shlex.quote(model)} {shlex.quote(texts[0])} "
            + "".join(f"--adapter {shlex.quote(word)} " for word in adapter or ())
            + f"-n 3 --seed {seed + 1}"
        )
    )
