"""Where other models of a run are; imports nothing heavy."""

from pathlib import Path

from llmkit.durable import hash_file


def teacher_folder(name: str) -> str:
    """Where a teacher's files are: of a run the model that it trained; a name on the Hub stays as it is."""
    path = Path(name).expanduser()
    for folder in (path, path / "model", path / "pretrain" / "model"):
        if (folder / "config.json").is_file():
            return str(folder)
    return name


def teacher_weights(name: str) -> str:
    """The SHA-256 of a teacher's weights, or its name where they are not here: what a resumed run must share."""
    weights = Path(teacher_folder(name)) / "model.safetensors"
    return hash_file(weights) if weights.is_file() else name
