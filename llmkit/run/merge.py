"""`llmkit merge`: one or several adapters and their base as one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit import __version__
from llmkit.durable import write_file, write_json
from llmkit.errors import MissingError, UsageError
from llmkit.report.console import Reporter
from llmkit.run.adapters import Adapted, Chosen, choose_adapters, load_adapted
from llmkit.run.folders import MERGE, Options, Result, locked, run_name

if TYPE_CHECKING:
    from torch import Tensor

_OF_RUN = ("resolved.yaml", "data.json", "plan.json")
"""What `eval`, `predict` and `compress` know a model's task by."""
_ROWS = 4
_WORDS_READ = 64


@dataclass(frozen=True)
class How:
    """How adapters become one.

    Attributes:
        method: `linear` adds them up; see `models.combining.merge_by` for the others.
        density: With `ties` and `dare`: the share of each adapter's changes that is kept.
        max_kl: With `linear`: how far predictions may lie apart, as `finetune.adapter.max_kl`.
        adapter_only: Leave one adapter instead of a whole model.
        seed: Decides what `dare` keeps.
    """

    method: Literal["linear", "ties", "dare"] = "linear"
    density: float = 0.2
    max_kl: float = 1e-3
    adapter_only: bool = False
    seed: int = 42


def merge(words: Sequence[str], name: str, how: How, options: Options, reporter: Reporter) -> Result:
    """Leave one model (or adapter) that does what several adapters do, in `RUNS/NAME/merge`.

    The files of the first run among them lie beside it: it is measured, asked and compressed as that run is.

    Args:
        words: Adapters, each with `=WEIGHT` behind it or not.
        name: What comes of it is called.
        how: How they become one.
        options: As for every verb.
        reporter: Told what is done.

    Raises:
        MissingError: An adapter or the base is not there.
        UsageError: They do not go together, or the name is taken.
        GateError: The merged model predicts otherwise than the adapters do together.
    """
    chosen = choose_adapters(words, options.runs)
    if how.adapter_only and (how.method != "linear" or len(chosen) == 1):
        alone = (
            "one adapter is an adapter already" if len(chosen) == 1 else f"`{how.method}` fills whole weights"
        )
        raise UsageError(f"--adapter-only: {alone}", hint="leave it out")
    home = options.runs / _checked(name)
    if any((home / verb).is_dir() for verb in ("pretrain", "finetune", "tokenize")):
        raise UsageError(f"{home} is another run", hint="--name ANOTHER")
    reporter.phase("merge", f"{len(chosen)} adapters, {how.method}" if len(chosen) > 1 else chosen[0].word)
    made = load_adapted(chosen)
    with locked(home / MERGE):
        facts = _merged(home / MERGE, made, chosen, how, options.runs)
        run = next((one.run for one in chosen if one.run is not None), None)
        if run is not None:
            for file in _OF_RUN:
                write_file(home / MERGE / file, (run.place.parent / file).read_bytes())
        write_json(home / MERGE / "merge.json", facts)
    for one, apart in facts["apart"].items():
        reporter.note(f"{apart:.3g} nats from the model with {one} alone, on {facts['compared_on']}")
    if facts["kl"] is not None:
        reporter.note(f"{facts['kl']:.2g} nats from the model with its adapters: the merge is exact")
    kind = "adapter" if how.adapter_only else "model"
    summary = {**facts, kind: str(home / MERGE / kind)}
    return Result(home / MERGE, summary, f"llmkit eval {home}" if run else f'llmkit generate {home} "Once"')


def _checked(name: str) -> str:
    if run_name(name) != name:
        raise UsageError(
            f"--name {name}: a name has letters, digits, `-`, `_` and `.`", hint=f"--name {run_name(name)}"
        )
    return name


def _merged(folder: Path, made: Adapted, chosen: Sequence[Chosen], how: How, runs: Path) -> dict[str, Any]:
    """Write what comes of it; what is to be known of it."""
    import torch

    from llmkit.data.tokenizers import save_tokenizer
    from llmkit.models.adapter_files import hash_adapter, save_adapter
    from llmkit.models.adapters import activate, using_adapter
    from llmkit.models.combining import JOINED, join_adapters, merge_by
    from llmkit.models.merging import divergence, merge_adapters
    from llmkit.models.save import save_model
    from llmkit.objectives.base import Accompanies
    from llmkit.train.adapted import chooses, predictions

    read, compared_on = _what_is_read(made, chosen, runs)
    run = next((one.run for one in chosen if one.run is not None), None)
    several = run is not None and run.section.task == "cls" and run.section.cls.multiple
    classes = chooses(made.model)

    def said() -> "Tensor":
        return torch.cat([predictions(made.model, some, several=several) for some in read])

    def add(place: Path) -> None:
        save_tokenizer(made.tokenizer, place)
        if made.task is not None and isinstance(made.task, Accompanies):
            made.task.accompany(place)

    def beside(place: Path) -> None:
        save_tokenizer(made.tokenizer, place)

    alone: dict[str, Tensor] = {}
    kl: float | None = None
    manifest = {"llmkit": __version__, "adapters": [hash_adapter(one.place) for one in chosen]}
    with torch.no_grad():
        for one, inside in zip(chosen, made.names, strict=True) if len(chosen) > 1 else ():
            with using_adapter(made.model, inside):
                alone[one.word] = said().float().cpu()
        if how.method == "linear" and len(chosen) > 1:
            join_adapters(made.model, made.names, base=made.base)
            facts = {**manifest, "kind": "adapter"}
            save_adapter(folder / "adapter", made.model, name=JOINED, facts=facts, companions=[beside])
        if how.adapter_only:
            before = said()
            activate(made.model, [JOINED])
            kl = divergence(before, said(), classes=classes)
        elif how.method == "linear":
            kl = merge_adapters(made.model, said, max_kl=how.max_kl, classes=classes)
        else:
            merge_by(made.model, made.names, how.method, density=how.density, seed=how.seed)
        after = said().float().cpu()
    if not how.adapter_only:
        save_model(folder / "model", made.model, facts={**manifest, "kind": "model"}, companions=[add])
    return {
        "base": made.base,
        "method": how.method,
        "adapters": {one.word: one.weight for one in chosen},
        **({"density": how.density} if how.method != "linear" else {}),
        "kl": kl,
        "apart": {word: divergence(its, after, classes=classes) for word, its in alone.items()},
        "compared_on": compared_on,
    }


def _what_is_read(
    made: Adapted, chosen: Sequence[Chosen], runs: Path
) -> "tuple[list[dict[str, Tensor]], str]":
    """What the model is asked before and after: some rows of each run, else random tokens; and in words which."""
    import torch

    from llmkit.objectives.base import LossModule
    from llmkit.objectives.make import make_task
    from llmkit.run.measure.labels import train_rows
    from llmkit.train.adapted import what_is_read

    found: list[dict[str, Tensor]] = []
    for one in chosen:
        if one.run is None:
            continue
        try:
            rows = train_rows(one.run, runs)
        except MissingError:  # the cache was emptied
            continue
        task = make_task(one.run.section, one.run.material())
        some = [task.encode({**rows[number], "seed": 0}) for number in range(min(_ROWS, len(rows)))]
        core = LossModule(made.model, task, bf16=False).eval()
        found.append(what_is_read(core, task.collate(some)))
    if found:
        return found, "rows that their runs learned from"
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(len(made.tokenizer), (_ROWS, _WORDS_READ), generator=chance)
    both = {"decoder_input_ids": ids} if made.model.config.is_encoder_decoder else {}
    return [{"input_ids": ids, **both}], "random tokens, for no rows of their runs are here"
