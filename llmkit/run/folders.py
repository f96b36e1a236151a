"""Run folders: where a verb's artefacts are, who may write there, what was made by what."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.durable import RunLock, naming_full_disks, sweep, write_file
from llmkit.errors import LlmkitError, MissingError, UsageError
from llmkit.launch.hub import Hub
from llmkit.launch.world import World
from llmkit.recipe import Loaded
from llmkit.report.environment import write_environment

CACHE = ".cache"
CHAIN = "chain.json"
"""In a folder of `llmkit compress`: which model the chain ended with."""
STEP = "step.json"
"""Beside a compressed model: what was done, and to which model."""
ADAPTER = "adapter_config.json"
"""What a folder in PEFT's form has."""
MERGE = "merge"
"""The folder of `llmkit merge` in that of a run."""
_MAKES_MODELS = ("finetune", "pretrain", MERGE)
"""The verbs that leave a model, the last of a run's life first."""


@dataclass(frozen=True)
class Options:
    """What a command was told besides its recipe.

    Attributes:
        runs: The folder of run folders.
        fresh: Start over instead of going on.
        processes: Worker processes, or None: as the plan chooses.
        deadline: When (`time.monotonic()`) training must have saved and ended; None for never.
        restarts: How often training that a crash ended is started again.
        self_check: Whether training proves itself before its first step.
        json: Progress as JSON lines.
        quiet: Warnings only.
        command: What the person typed, for the report.
        subject: The recipe and what is said about it, as typed, for the next command.
        hub: Where the other nodes are met, on node 0 of several.
    """

    runs: Path = Path("runs")
    fresh: bool = False
    processes: int | None = None
    deadline: float | None = None
    restarts: int = 0
    self_check: bool = True
    json: bool = False
    quiet: bool = False
    command: str = "llmkit"
    subject: str = "RECIPE"
    hub: Hub | None = None


@dataclass(frozen=True)
class Result:
    """What a command made.

    Attributes:
        folder: The run folder.
        summary: The figures a pipeline wants.
        next_command: What a person types next.
        table: Lines of cells to show on a terminal, the first of them headings.
        failed: What ends the command, after its result was given: a gate that did not hold.
    """

    folder: Path
    summary: dict[str, Any]
    next_command: str
    table: Sequence[tuple[str, ...]] = ()
    failed: LlmkitError | None = None


def run_folder(loaded: Loaded, options: Options, verb: str) -> Path:
    """The folder that `verb` writes into.

    Raises:
        UsageError: The recipe has several variants, and none was chosen.
    """
    refuse_variants(loaded)
    return options.runs / loaded.recipe.name / verb


def run_name(path: str) -> str:
    """A recipe name made from a path: `data/my model.yaml` -> `my-model`."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).absolute().stem).strip("._-")
    return plain[:64] or "run"


def refuse_variants(loaded: Loaded) -> None:
    """Refuse a recipe that is several, where one is needed.

    Raises:
        UsageError: It has variants, and none was chosen.
    """
    if loaded.variants:
        names = list(loaded.variants)
        raise UsageError(
            f"the recipe has {len(names)} variants, and this command does one: {', '.join(names)}",
            hint=f"say which: variant={names[0]}; `llmkit run` does them all and compares them",
        )


def base_of(loaded: Loaded) -> Path:
    """The folder that a recipe's relative paths may start from, besides the current one."""
    return loaded.path.parent if loaded.path else Path.cwd()


@contextmanager
def locked(folder: Path, world: World | None = None) -> Iterator[None]:
    """Be the folder's one writer, and remove what a killed one left half-written.

    Of the processes that another launcher started, the first alone locks and writes.
    """
    if world is not None and world.rank != 0:
        yield
        return
    with naming_full_disks(folder), RunLock(folder):
        for place in (folder, folder / "checkpoints"):
            sweep(place)
        yield


def leave_record(folder: Path, loaded: Loaded) -> None:
    """Leave the recipe as given and the environment in the run folder."""
    write_file(folder / "recipe.yaml", loaded.text)
    write_environment(folder)


def placed(loaded: Loaded) -> Loaded:
    """The recipe with the paths of what it begins with or learns from: an adapter, a teacher, word vectors.

    A relative one counts from the current folder if something is there, else from the recipe's if something is there;
    else it stays as it is, for it may be a name on the Hub.
    """
    base = base_of(loaded).absolute()

    def found(path: str | None) -> str | None:
        if not path or Path(path).expanduser().exists() or not (base / path).exists():
            return path
        return str(base / path)

    def adapter(path: str | None) -> str | None:
        there = [one for one in _adapters_of(Path(path or "").expanduser()) if (one / ADAPTER).is_file()]
        return str(there[0]) if path and there else path

    def changed(block: Any, **paths: str | None) -> Any:
        """The block with other paths; the same object where none is another."""
        new = {name: path for name, path in paths.items() if path != getattr(block, name)}
        return block.model_copy(update=new) if new else block

    sections: dict[str, Any] = {}
    for name in ("pretrain", "finetune"):
        section = getattr(loaded.recipe, name)
        if section is None:
            continue
        parts = {"model": changed(section.model, embeddings=found(section.model.embeddings))}
        if section.distil is not None:
            parts["distil"] = changed(section.distil, teacher=found(section.distil.teacher))
        if name == "finetune" and section.adapter is not None:
            parts["adapter"] = changed(section.adapter, start=adapter(found(section.adapter.start)))
        if any(part is not getattr(section, key) for key, part in parts.items()):
            sections[name] = section.model_copy(update=parts)
    return replace(loaded, recipe=loaded.recipe.model_copy(update=sections)) if sections else loaded


def _absolute(section: Any) -> Any:
    """A section whose paths of a teacher, an adapter and word vectors are absolute, where something is there."""
    updates: dict[str, Any] = {}
    for key, name in (("model", "embeddings"), ("distil", "teacher"), ("adapter", "start")):
        block: Any = getattr(section, key, None)
        path = getattr(block, name, None)
        if path and Path(path).expanduser().exists():
            made = str(Path(path).expanduser().absolute())
            updates[key] = block.model_copy(update={name: made})
    return section.model_copy(update=updates) if updates else section


def anchored(loaded: Loaded) -> Loaded:
    """The recipe with its files' paths made absolute, so that it means the same from any folder.

    As everywhere, a relative path counts from the current folder if something is there, else from the recipe's.
    """
    base = base_of(loaded).absolute()

    def absolute(pattern: str) -> str:
        if pattern == "-" or pattern.startswith("stdlib:") or "://" in pattern or Path(pattern).is_absolute():
            return pattern
        here = any(Path().glob(pattern)) or Path(pattern).exists()
        return str((Path.cwd() if here else base) / pattern)

    def with_files(source: Any) -> Any:
        if source is None or not source.files:
            return source
        return source.model_copy(update={"files": [absolute(pattern) for pattern in source.files]})

    def anchor(section: Any) -> Any:
        if section is None or section.data is None:
            return section
        return section.model_copy(update={"data": [with_files(source) for source in section.data]})

    recipe = placed(loaded).recipe
    sections = {name: anchor(getattr(recipe, name)) for name in ("tokenize", "pretrain", "eval")}
    if sections["pretrain"] is not None:
        sections["pretrain"] = _absolute(sections["pretrain"])
    if recipe.finetune is not None:
        tuned = _absolute(recipe.finetune)
        parts = {name: with_files(getattr(tuned, name)) for name in ("data", "validation")}
        if tuned.model.name is not None and Path(tuned.model.name).exists():
            parts["model"] = tuned.model.model_copy(update={"name": str(Path(tuned.model.name).absolute())})
        if tuned.chat_template not in (None, "chatml", "none"):
            parts["chat_template"] = str(base / Path(tuned.chat_template).expanduser())
        sections["finetune"] = tuned.model_copy(update=parts)
    return replace(loaded, recipe=recipe.model_copy(update=sections))


def find_model(word: str, runs: Path, *, adapters: bool = False) -> Path:
    """The model folder that `word` means: a model folder, a run, a run's folder, or a run's name.

    Args:
        word: As a person typed it.
        runs: The folder of run folders.
        adapters: The folder of an adapter that was not merged will do where there is no model.

    Raises:
        MissingError: There is none.
    """
    places = [Path(word), runs / word]
    for place in places:
        tries = [
            place,
            place / "model",
            *(place / verb / "model" for verb in _MAKES_MODELS),
            *_end_of_chain(place),
        ]
        for folder in tries:
            if (folder / "config.json").is_file():
                return folder
    for place in places if adapters else ():
        for folder in _adapters_of(place):
            if (folder / ADAPTER).is_file():
                return folder
    names = sorted(
        str(place.relative_to(runs))
        for pattern in ("*", "*/*")  # a run, or a variant in its recipe's folder
        for place in runs.glob(pattern)
        if any((place / verb / "model").is_dir() for verb in _MAKES_MODELS)
    )
    raise MissingError(
        f"no model in {word!r}",
        hint=f"runs with a model in {runs}: {', '.join(names)}" if names else "train one: llmkit demo",
    )


def _adapters_of(place: Path) -> tuple[Path, ...]:
    """Where a run's adapter may be."""
    return (place, place / "adapter", place / "finetune" / "adapter", place / MERGE / "adapter")


def find_adapter(word: str, runs: Path) -> Path:
    """The folder of the adapter that `word` means: a folder in PEFT's form, a run, its folder, or its name.

    Raises:
        MissingError: There is none.
    """
    for place in (Path(word).expanduser(), runs / word):
        for folder in _adapters_of(place):
            if (folder / ADAPTER).is_file():
                return folder
    raise MissingError(
        f"no adapter in {word!r}",
        hint="give a run that learned one (`finetune.adapter.method=lora`), or a folder with adapter_config.json",
    )


def _end_of_chain(folder: Path) -> list[Path]:
    """The last model that a chain of compressions made, if `folder` is one's."""
    try:
        return [folder / str(json.loads((folder / CHAIN).read_bytes())["model"])]
    except (OSError, ValueError, KeyError):
        return []


def home_of(place: Path, runs: Path) -> Path | None:
    """The folder of the run that a model belongs to, `NAME` or a variant's `NAME/VARIANT` in `runs`; None elsewhere."""
    place, root = place.resolve(), runs.resolve()
    if not place.is_relative_to(root):
        return None
    parts = place.relative_to(root).parts
    made = (n for n, part in enumerate(parts) if part in _MAKES_MODELS or part.startswith("compress"))
    verb = next((number for number in made if number), 1)
    return runs.joinpath(*parts[: max(1, verb)])


def report_of(folder: Path) -> Mapping[str, Any]:
    """The folder's report.json; empty while there is none."""
    path = folder / "report.json"
    if not path.is_file():
        return {}
    report: Mapping[str, Any] = json.loads(path.read_bytes())
    return report
