"""Where other models of a run are; imports nothing heavy."""

import hashlib
import json
from pathlib import Path

from llmkit.durable import hash_file, read_manifest
from llmkit.errors import CorruptError, MissingError, UsageError
from llmkit.recipe.architectures import in_words, kind_of_config
from llmkit.registry import goal_of

NEW_TOKENS = "new_tokens"
"""In the manifest of a tokenizer that a recipe has changed: the tokens that the model does not know yet."""


def new_tokens(tokenizer: str) -> list[str]:
    """The tokens of a run's tokenizer, its last ones, that its model does not know yet."""
    try:
        return list(read_manifest(Path(tokenizer)).get(NEW_TOKENS, ()))
    except CorruptError:  # not one that a recipe has changed
        return []


def model_folder(name: str) -> str:
    """Where a model's files are: of a run the model that it trained; a name on the Hub stays as it is."""
    path = Path(name).expanduser()
    for folder in (
        path,
        path / "model",
        *(path / verb / "model" for verb in ("finetune", "pretrain", "merge")),
    ):
        if (folder / "config.json").is_file():
            return str(folder)
    return name


def check_teacher(name: str, objective: str, section: str = "pretrain", student: str = "") -> None:
    """Say before any text is read that a teacher is not there, or is no model for the objective.

    A name on the Hub is left for later, when it is fetched.

    Args:
        name: The teacher's.
        objective: What is learned: an objective or a task.
        section: The recipe's that names it.
        student: The model that learns; of a task that several kinds of model can do, both are of one kind.

    Raises:
        MissingError: It is a folder that holds no model.
        UsageError: It is another kind of model.
    """
    folder = Path(model_folder(name))
    path = folder / "config.json"
    if not path.is_file():
        if folder.exists() or name.count("/") != 1 or name.startswith((".", "~", "/", "runs/")):
            raise MissingError(
                f"{section}.distil.teacher: {name!r} is no model, and no run that has one",
                hint="give a run, its folder, or a folder with config.json and model.safetensors",
            )
        return
    goal, found = goal_of(objective), kind_of_config(json.loads(path.read_bytes()))
    wanted = (goal.model, *goal.also)
    if found not in wanted and not (goal.model == "masked" and found == "pairs"):
        needed = " or ".join(map(in_words, wanted))
        raise UsageError(
            f"{section}.distil.teacher: {name!r} is {in_words(found)}; {objective!r} needs {needed}",
            hint="give a model that learned the same objective",
        )
    own = Path(model_folder(student)) / "config.json"
    if goal.also and student and own.is_file():
        learner = kind_of_config(json.loads(own.read_bytes()))
        if learner != found:
            raise UsageError(
                f"{section}.distil.teacher: {name!r} is {in_words(found)}, and {student!r}, which learns from it, "
                f"is {in_words(learner)}",
                hint=f"give {in_words(learner)} as the teacher",
            )


def teacher_weights(name: str) -> str:
    """The SHA-256 of a teacher's weights, or its name where they are not here: what a resumed run must share."""
    folder = Path(model_folder(name))
    weights = folder / "model.safetensors"
    if weights.is_file():
        return hash_file(weights)
    shards = sorted(folder.glob("model-*-of-*.safetensors")) if folder.is_dir() else []
    hashes = "".join(hash_file(shard) for shard in shards)
    return hashlib.sha256(hashes.encode()).hexdigest() if hashes else name
