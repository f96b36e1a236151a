"""Where other models of a run are; imports nothing heavy."""

import json
from pathlib import Path

from llmkit.durable import hash_file
from llmkit.errors import MissingError, UsageError
from llmkit.recipe.architectures import in_words, kind_of_config
from llmkit.registry import goal_of


def model_folder(name: str) -> str:
    """Where a model's files are: of a run the model that it trained; a name on the Hub stays as it is."""
    path = Path(name).expanduser()
    for folder in (path, path / "model", path / "finetune" / "model", path / "pretrain" / "model"):
        if (folder / "config.json").is_file():
            return str(folder)
    return name


def check_teacher(name: str, objective: str) -> None:
    """Say before any text is read that a teacher is not there, or is no model for the objective.

    A name on the Hub is left for later, when it is fetched.

    Raises:
        MissingError: It is a folder that holds no model.
        UsageError: It is another kind of model.
    """
    folder = Path(model_folder(name))
    path = folder / "config.json"
    if not path.is_file():
        if folder.exists() or name.count("/") != 1 or name.startswith((".", "~", "/", "runs/")):
            raise MissingError(
                f"pretrain.distil.teacher: {name!r} is no model, and no run that has one",
                hint="give a run, its folder, or a folder with config.json and model.safetensors",
            )
        return
    wanted, fields = goal_of(objective).model, json.loads(path.read_bytes())
    found = kind_of_config(fields)
    if found != wanted and not (wanted == "masked" and found == "pairs"):
        raise UsageError(
            f"pretrain.distil.teacher: {name!r} is {in_words(found)}; objective {objective!r} needs {in_words(wanted)}",
            hint="give a model that learned the same objective",
        )


def teacher_weights(name: str) -> str:
    """The SHA-256 of a teacher's weights, or its name where they are not here: what a resumed run must share."""
    weights = Path(model_folder(name)) / "model.safetensors"
    return hash_file(weights) if weights.is_file() else name
