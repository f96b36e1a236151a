"""`llmkit compress`: what its words and options mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.evaluate import choose_targets
from llmkit.cli.options import AsJson, Debug, DryRun, Fresh, Quiet, Runs, Settings, Smoke, described
from llmkit.cli.output import as_columns, give, give_json
from llmkit.errors import UsageError
from llmkit.registry import METHODS, nearest

if TYPE_CHECKING:
    from llmkit.recipe import Loaded

SHORT_HELP = "Make a model smaller or faster, and measure what that costs."
HELP = described(
    """
    llmkit compress runs/my --method int8                       weights of 8 bits
    llmkit compress runs/my --method int4,solver=awq,group=64   settings of the method
    llmkit compress runs/my --method int8 --max-drop 2%         exit code 4 if more is lost
    llmkit compress runs/my --method prune,what=layers,share=20% --method int8
    llmkit compress path/to/model --method int4 --learn 'texts/*.txt' --data held-out.txt
    llmkit compress my.yaml                                     the steps of a recipe
    """,
    "Compress a model in one or several steps, each an artefact, and compare it with the model before: quality on the "
    "same data, size, speed. Methods: int8, int4, w8a8, fp8, mixed; prune, distil, factorize; onnx, gguf, torch, bf16, "
    "fp16. `llmkit recipe explain compress.steps` names the settings.",
)
_FORMATS = ("int8", "int4", "w8a8", "fp8", "mixed")
_EXPORTS = ("onnx", "gguf", "torch", "bf16", "fp16")


def compress(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL|RECIPE... [KEY=VALUE]...",
            help="A run or a model folder, a recipe, settings.",
            show_default=False,
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,KEY=VALUE]...", help="A step; several are done one after the other."),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Exit code 4 if more of the quality is lost: 2%.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="WHAT=SHARE", help="Instead of --method: size=50% or latency=60%."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the model is for: text, cls, tag, ...")
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(metavar="FILES", help="What steps look at and learn from: by default the run's own."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILES", help="What to measure on: by default what was held out.")
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    fresh: Fresh = False,
    smoke: Smoke = False,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """`llmkit compress`."""
    from llmkit import run
    from llmkit.cli.commands import finish, reporting, to_options

    settings = Settings(runs, dry_run, quiet=quiet, as_json=as_json, fresh=fresh, smoke=smoke)
    section: dict[str, Any] = {}
    if method:
        section["steps"] = list(map(step_of, method))
    if target is not None:
        section["target"] = _target(target)
    given = {"max_drop": max_drop, "task": task}
    section |= {key: value for key, value in given.items() if value is not None}
    section |= {
        key: {"files": files} for key, files in (("learn", learn), ("data", data)) if files is not None
    }
    models, loaded = choose_targets(words, section, settings, verb="compress")
    if len(models) > 1:
        raise UsageError(
            f"{' and '.join(models)}: one model is compressed at a time", hint="give one of them"
        )
    if loaded is None:
        raise UsageError(
            f"{models[0]}: nothing says how to make it smaller",
            hint="--method int8, or a recipe with `compress`",
        )
    if dry_run:
        _outline(models[0] if models else None, loaded, settings)
        return
    with reporting(settings) as reporter:
        result = run.compress(models[0] if models else None, loaded, to_options(settings), reporter)
    finish(result, settings)


def _outline(model: str | None, loaded: "Loaded", settings: Settings) -> None:
    """Say what would be done."""
    from llmkit import run
    from llmkit.cli.commands import reporting, to_options

    with reporting(settings) as reporter:
        facts, rows = run.outline_compression(model, loaded, to_options(settings), reporter)
    if settings.as_json:
        give_json(facts)
    else:
        give(as_columns(rows))


def step_of(word: str) -> dict[str, Any]:
    """A step as the command line has it, `int4,solver=awq,group=64`, as a recipe has it.

    Raises:
        UsageError: There is no such method.
    """
    name, *settings = [part.strip() for part in word.split(",")]
    if name in _FORMATS:
        step: dict[str, Any] = {"method": "quantize", "format": name}
    elif name in _EXPORTS:
        step = {"method": "export", "to": name}
    elif name in METHODS:
        step = {"method": name}
    else:
        known = [*_FORMATS, *METHODS, *_EXPORTS]
        close = nearest(name, known)
        raise UsageError(
            f"--method {word}: `{name}` is no method",
            hint=f"did you mean `{close}`?" if close else f"known: {', '.join(known)}",
        )
    for setting in settings:
        key, mark, value = setting.partition("=")
        if not mark or not key.strip():
            raise UsageError(
                f"--method {word}: `{setting}` is no setting", hint="write KEY=VALUE: --method int4,group=64"
            )
        step[key.strip()] = _plain(value.strip())
    return step


def _plain(value: str) -> Any:
    """A number or a truth value as such, all else as text."""
    from llmkit.recipe.overrides import layer

    node, _ = layer(f"value={value}")
    found = node.plain() if node is not None else None
    return found["value"] if isinstance(found, dict) else value


def _target(word: str) -> Mapping[str, str]:
    wants: Sequence[str] = ("size", "latency")
    found: dict[str, str] = {}
    for part in word.split(","):
        key, mark, value = part.partition("=")
        if not mark or key.strip() not in wants:
            raise UsageError(f"--target {word}: `{part}` is no target", hint="--target size=50%")
        found[key.strip()] = _share(value.strip())
    return found


def _share(value: str) -> str:
    """`0.6x` is `0.6`."""
    return value.removesuffix("x")
