"""Which steps of a run have a checkpoint, by the names of their folders. No torch."""

import os
from pathlib import Path

_BEGIN = "step_"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is; `folder` is `checkpoints/` of the run folder."""
    return folder / f"{_BEGIN}{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending, whole or not; other names are not ours."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(step for name in names if (step := _step_of(name)) is not None)


def _step_of(name: str) -> int | None:
    digits = name.removeprefix(_BEGIN)
    if not (digits.isascii() and digits.isdigit()):
        return None
    step = int(digits)
    return step if checkpoint_path(Path(), step).name == name else None
