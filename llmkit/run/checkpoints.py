"""Checkpoints as models: exported once into the cache, then found again by their content."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.durable import hash_file, make_folders, one_at_a_time, write_file
from llmkit.errors import MissingError
from llmkit.recipe import Loaded, load_recipe
from llmkit.report.console import Reporter
from llmkit.run import finetune as tuning
from llmkit.run import pretrain as training
from llmkit.run.folders import CACHE, Options

if TYPE_CHECKING:
    from llmkit.train.job import Job

_BESIDE = ("resolved.yaml", "plan.json", "data.json")
"""What tells how the model was trained."""


def is_checkpoint(place: Path) -> bool:
    """Whether a folder is a run's checkpoint."""
    return place.parent.name == "checkpoints" and (place / "state.json").is_file()


def exported_checkpoint(place: Path, options: Options, reporter: Reporter) -> Path:
    """The model folder of a checkpoint, made where it is not there yet.

    Args:
        place: `RUN/checkpoints/step_...`.
        options: As for every verb.
        reporter: Told what happens.

    Raises:
        MissingError: The run's recipe is not there.
        CorruptError: The checkpoint is damaged.
        RunError: It is of another recipe.
        UsageError: It holds an adapter.
    """
    run = place.absolute().parent.parent
    recipe = run / "resolved.yaml"
    if not recipe.is_file():
        raise MissingError(
            f"{recipe}: it tells what the checkpoint is of, and it is gone", hint="measure the run's model"
        )
    loaded = load_recipe(recipe)
    runs = run.parents[loaded.recipe.name.count("/") + 1]
    # However many processes trained it, or measure it now: one makes the model, of the same numbers.
    options = replace(options, runs=runs, fresh=False, processes=1)
    target = runs / CACHE / "exports" / hash_file(place / "manifest.json")[:32]
    if (target / "model" / "config.json").is_file():
        return target / "model"
    from llmkit.train.export import export_checkpoint

    reporter.phase("export", str(place))
    make_folders(target)
    with one_at_a_time(target.with_suffix(".lock")):
        if not (
            target / "model" / "config.json"
        ).is_file():  # while this process waited, another may have made it
            for name in _BESIDE:
                write_file(target / name, (run / name).read_bytes())
            job = _job(loaded, options, reporter, run)
            export_checkpoint(replace(job, folder=str(target)), place)
    return target / "model"


def _job(loaded: Loaded, options: Options, reporter: Reporter, run: Path) -> "Job":
    """The run, decided as it was when it was trained."""
    if loaded.recipe.finetune is not None and run.name == "finetune":
        return tuning.prepare_job(loaded, options, reporter, run, None)
    return training.prepare_job(loaded, options, reporter, run, None)[0]
