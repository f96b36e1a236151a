"""`llmkit explain`: what in a text makes a model say what it says."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.hardware import detect_elsewhere
from llmkit.recipe.schema import Machine
from llmkit.registry import ModelKind, kind_for
from llmkit.report.console import Reporter
from llmkit.report.report import write_report
from llmkit.run.folders import Options, Result, find_model, home_of, locked, run_name
from llmkit.run.tasks import TaskRun, task_run

if TYPE_CHECKING:
    from llmkit.evaluate.explain import Explained

_CAN = "a run that was fine-tuned for cls or regression, or a causal language model"


def explain(
    word: str,
    texts: Sequence[str],
    options: Options,
    reporter: Reporter,
    *,
    other: str | None = None,
    label: str | None = None,
    token: str | None = None,
    steps: int = 50,
) -> Result:
    """Explain what a model says of each text, and leave a report beside the model's run.

    Args:
        word: A run, its name, or a model folder.
        texts: The texts.
        options: As for every verb.
        reporter: Told what does not fit.
        other: The second text of pairs.
        label: The class to explain; None: the likeliest of each text.
        token: The continuation to explain; None, or `next`: the likeliest token.
        steps: Points between baseline and text at which gradients are taken; more where these are not enough.

    Raises:
        UsageError: The model cannot be explained, or does not have what is to be explained.
        MissingError: There is no such model, or captum is not installed.
    """
    from llmkit.evaluate.gradients import import_captum

    place = find_model(word, options.runs)
    run = task_run(place)
    kind = _kind(place, run)
    _check_asked(place, kind, other=other, label=label, token=token)
    import_captum()  # before the model is loaded, which may take long
    found = _explained(place, run, kind, texts, other, label, token, steps)
    for one in found:
        _warn(one, reporter)
    rows = [_as_row(one) for one in found]
    home = _home(place, options.runs)
    folder = home / "explain"
    settings = {"method": "integrated gradients", "baseline": found[0].baseline, "steps": steps}
    with locked(folder):
        facts = {"name": home.name, "kind": "explain", "status": "done", "command": options.command}
        write_report(
            folder,
            {**facts, "model": {"folder": str(place)}, "tables": {"explained": rows}, "settings": settings},
        )
    return Result(
        folder,
        {"model": str(place), "explained": rows, "report": str(folder / "report.html")},
        _next(word, texts[0], found[0], kind, asked=label or token),
    )


def _kind(place: Path, run: TaskRun | None) -> ModelKind:
    from llmkit.models.build import kind_of

    return kind_for(run.section.task, run.facts) if run else kind_of(str(place))


def _check_asked(
    place: Path, kind: ModelKind, *, other: str | None, label: str | None, token: str | None
) -> None:
    """Refuse what this kind of model does not say.

    Raises:
        UsageError: It says nothing that can be explained, or not what is asked for.
    """
    if kind == "causal":
        for option, given in (("--label", label), ("--other", other)):
            if given is not None:
                raise UsageError(
                    f"{place}: {option} is for models that judge texts, and this one predicts the next token",
                    hint='--token " word" explains why it would go on so',
                )
    elif kind == "sequence":
        if token is not None:
            raise UsageError(
                f"{place}: --token is for models that go on from a text, and this one judges texts",
                hint="--label LABEL explains a class",
            )
    else:
        raise UsageError(f"{place}: models of this kind ({kind}) cannot be explained", hint=f"give {_CAN}")


def _explained(
    place: Path,
    run: TaskRun | None,
    kind: ModelKind,
    texts: Sequence[str],
    other: str | None,
    label: str | None,
    token: str | None,
    steps: int,
) -> "list[Explained]":
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.explain import NEXT, explain_label, explain_next
    from llmkit.evaluate.model import load_model
    from llmkit.models.build import max_length

    trusted = run is not None and run.section.model.trust_remote_code
    model, tokenizer = load_model(place, kind=kind, trusted=trusted), load_tokenizer(str(place))
    model.requires_grad_(False)  # of the weights; those of the text are what is asked for
    model.to(detect_elsewhere(run.loaded.recipe.machine if run else Machine(), "explain").device)
    longest = run.section.model.context if run else max_length(model.config)
    if kind == "causal":
        return [
            explain_next(model, tokenizer, text, token=token or NEXT, steps=steps, longest=longest)
            for text in texts
        ]
    return [
        explain_label(model, tokenizer, text, other, label=label, steps=steps, longest=longest)
        for text in texts
    ]


def _warn(one: "Explained", reporter: Reporter) -> None:
    if one.cut:
        reporter.warn(
            f"the text {one.text[:30]!r}... is too long for the model: its last {one.cut} tokens are cut"
        )
    if not one.is_complete:
        change = one.value - one.baseline_value
        reporter.warn(
            f"the scores of {one.text[:30]!r} sum to {change + one.delta:+.3f}, and should to {change:+.3f}: "
            f"{one.steps} steps are not enough, so take them with care"
        )


def _as_row(one: "Explained") -> dict[str, Any]:
    row = {name: value for name, value in asdict(one).items() if value is not None}
    return {**row, "complete": one.is_complete}


def _home(place: Path, runs: Path) -> Path:
    """The folder of the model's run, wherever that is; for other models one of their name in `runs`."""
    is_run = (place.parent / "resolved.yaml").is_file()
    own = place.absolute().parent
    beside = own.parent if is_run else runs / run_name(str(own if place.name == "model" else place))
    return home_of(place, runs) or beside


def _next(word: str, text: str, one: "Explained", kind: ModelKind, *, asked: str | None) -> str:
    """Why not the second best, after the best; then what else the model says."""
    again = f"llmkit explain {shlex.quote(word)} {shlex.quote(text)}"
    if one.other is not None:
        again += f" --other {shlex.quote(one.other)}"
    if asked in (None, "next") and one.runner_up and "\ufffd" not in one.runner_up:  # part of a character
        return f"{again} {'--token' if kind == 'causal' else '--label'} {shlex.quote(one.runner_up)}"
    verb = "generate" if kind == "causal" else "predict"
    return f"llmkit {verb} {shlex.quote(word)} {shlex.quote(text)}"
