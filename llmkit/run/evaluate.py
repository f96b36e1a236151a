"""`llmkit eval`: a model's figures on held-out text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmkit.durable import write_json
from llmkit.errors import MissingError, UsageError
from llmkit.hardware import detect_hardware
from llmkit.recipe import Loaded, load_recipe
from llmkit.recipe.preparation import Prepare
from llmkit.recipe.schema import Model, Pretrain, Train
from llmkit.recipe.units import Amount
from llmkit.registry import ModelKind, goal_of
from llmkit.report.console import Reporter
from llmkit.report.formatting import format_number
from llmkit.report.report import write_report
from llmkit.report.trying import try_command
from llmkit.run.folders import (
    CACHE,
    Options,
    Result,
    base_of,
    find_model,
    home_of,
    leave_record,
    locked,
    refuse_variants,
    run_folder,
)
from llmkit.run.tasks import data_for, evaluate_run, task_run

if TYPE_CHECKING:
    from llmkit.data.shards import TokenShards, TokenStream

_LONGEST_ROW = 2048
_FIRST: dict[ModelKind, Literal["clm"]] = {"causal": "clm"}


@dataclass(frozen=True)
class _Text:
    """What to measure on: shards, and which part of them."""

    shards: "Sequence[TokenShards]"
    held_out: bool

    def streams(self) -> "list[TokenStream]":
        return [shard.split("held_out" if self.held_out else "train") for shard in self.shards]


def evaluate(target: str | None, loaded: Loaded | None, options: Options, reporter: Reporter) -> Result:
    """Measure a model: the one a recipe trained, a run's, or any folder's on text that the recipe names.

    Args:
        target: A run or a model folder; None: the one `loaded` names or made.
        loaded: A recipe whose `eval` section says how; None: as training measured.
        options: As for every verb.
        reporter: Told what happens.

    Raises:
        UsageError: Nothing says what to measure on.
        MissingError: There is no such model.
    """
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.model import evaluate_model, load_model
    from llmkit.models.build import kind_of, max_length

    if loaded is not None:
        refuse_variants(loaded)
    section = loaded.recipe.eval if loaded else None
    word = target or (section.model if section else None) or (loaded.recipe.name if loaded else "")
    place = find_model(word, options.runs)
    tuned = task_run(place)
    if tuned is not None:
        reporter.phase("eval", str(place))
        data, base = data_for(tuned, loaded)
        return evaluate_run(tuned, data, base, options, reporter, section.rows if section else None)
    run = _trained_by(place)
    trained = run.recipe.pretrain if run else None
    if loaded is None and run is None:
        raise UsageError(f"{word}: nothing says what to measure it on", hint="give text: --data FILES")
    about = loaded or run
    assert about is not None
    reporter.phase("eval", str(place))
    text = _text(place, loaded, options, reporter)
    folder = _folder(place, about, options, text)
    with locked(folder):
        leave_record(folder, about)
        model = load_model(place)
        learned = trained or _learned_by(kind_of(str(place)), max_length(model.config))
        figures = evaluate_model(
            model,
            text.streams(),
            section=learned,
            tokenizer=load_tokenizer(str(place)),
            device=detect_hardware(about.recipe.machine).device,
            folder=place,
            bf16=_precision_of(place) == "bf16",
            max_rows=section.rows if section else None,
        )
        final = {f"eval/{name}": value for name, value in figures.items() if name != "tokens_per_s"}
        _write(folder, about, options, text, place, final)
    known = goal_of(learned.objective).metrics
    for name in section.metrics if section and section.metrics else known:
        known_here = name in figures  # of held-out text that is one document there are no pairs, for one
        reporter.note(
            f"{name} {format_number(figures[name])}" if known_here else f"{name}: nothing to measure"
        )
    if section and section.rows:
        reporter.note(f"measured on {section.rows:,} rows at most; a run's own last evaluation takes all")
    kind = goal_of(learned.objective).model
    metrics = {name.removeprefix("eval/"): value for name, value in final.items()}
    return Result(
        folder,
        {
            "model": str(place),
            "metrics": metrics,
            "context": learned.model.context,
            "report": str(folder / "report.html"),
        },
        try_command(kind, str(place), trained.prompts if trained else []),
    )


def _learned_by(kind: ModelKind, longest: int | None) -> Pretrain:
    """What a model that comes without a recipe is measured by: what models of its kind learn first.

    Raises:
        UsageError: Nothing is known to measure such a model by.
    """
    objective = _FIRST.get(kind)
    if objective is None:
        raise UsageError(
            f"a model of this kind ({kind}) comes without a recipe, and nothing says what it learned",
            hint="measure the run that trained it",
        )
    model = Model(preset=None, context=min(longest or 512, _LONGEST_ROW))
    return Pretrain(objective=objective, model=model, train=Train(length=Amount(1, "steps")))


def _write(
    folder: Path, about: Loaded, options: Options, text: _Text, place: Path, final: dict[str, float]
) -> None:
    from llmkit.data.prepare import data_card

    write_json(folder / "data.json", data_card(text.shards))
    facts = {"name": about.recipe.name, "kind": "eval", "status": "done", "command": options.command}
    write_report(folder, {**facts, "model": {"folder": str(place)}, "final": final})


def _folder(place: Path, about: Loaded, options: Options, text: _Text) -> Path:
    """Where the figures go: beside the model's run where it has one, one folder for each text.

    `eval/` is for what the run held out; other text has its address in the name, so that nothing is overwritten.
    """
    home = home_of(place, options.runs) or run_folder(about, options, "eval").parent
    if text.held_out:
        return home / "eval"
    return home / f"eval-{text.shards[0].folder.name[:8]}"


def _precision_of(model: Path) -> str:
    """What the model's run computed in, so that its own evaluation and this one agree; fp32 for other models."""
    path = model.parent / "plan.json"
    return str(json.loads(path.read_bytes())["precision"]) if path.is_file() else "fp32"


def _trained_by(model: Path) -> Loaded | None:
    """The recipe that the run around a model folder was trained with."""
    path = model.parent / "resolved.yaml"
    return load_recipe(path) if path.is_file() else None


def _text(model: Path, loaded: Loaded | None, options: Options, reporter: Reporter) -> _Text:
    """The recipe's own `eval.data`, all of it; else what the model's run held out."""
    from llmkit.data.corpus import Corpus, engine_of
    from llmkit.data.shards import TokenShards
    from llmkit.data.tokenizers import load_tokenizer

    section = loaded.recipe.eval if loaded else None
    if loaded is not None and section is not None and section.data is not None:
        text = Corpus(
            section.data,
            Prepare(),
            held_out=0.0,
            base=base_of(loaded),
            cache=options.runs / CACHE,
            engine=engine_of(loaded.recipe.machine),
            reporter=reporter,
        )
        return _Text(text.shards(load_tokenizer(str(model))), held_out=False)
    card = model.parent / "data.json"
    if not card.is_file():
        raise UsageError(f"{model}: nothing was held out for it", hint="give text: --data FILES")
    cache = options.runs / CACHE / "shards"
    folders = [cache / source["address"] for source in json.loads(card.read_bytes())["sources"]]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise MissingError(
            f"{missing[0]}: the shards of the model's run are gone",
            hint=f"make them again: llmkit tokenize {model.parent / 'resolved.yaml'}",
        )
    return _Text([TokenShards.open(folder) for folder in folders], held_out=True)
