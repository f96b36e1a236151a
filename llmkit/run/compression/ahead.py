"""What a compression would do, for `--dry-run`: nothing is made, measured or written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.recipe.compression import Step
from llmkit.run.compression.artefacts import Artefact, finished, next_address
from llmkit.run.compression.material import Material, looks


@dataclass(frozen=True)
class Ahead:
    """A step that is to come.

    Attributes:
        folder: Where its model goes.
        step: What is done.
        made: Whether it is there already.
        looks: Whether it looks at what the model learned from.
        length: How long is trained, in all; None: not at all.
    """

    folder: Path
    step: Step
    made: bool
    looks: bool
    length: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        settings = {
            name: value for name, value in self.step.model_dump(mode="json").items() if value is not None
        }
        return {
            "folder": str(self.folder),
            "settings": settings,
            "made": self.made,
            "looks": self.looks,
            "trains": self.length,
        }


def steps_ahead(
    first: Artefact, steps: Sequence[Step], folder: Path, material: Material, *, fresh: bool
) -> list[Ahead]:
    """The steps of a chain, and which of them are done.

    Args:
        first: The model that the chain begins with.
        steps: The steps.
        folder: Where the chain's models go.
        material: What they are made of.
        fresh: Whether all are made anew.
    """
    parent, found = first, []
    for number, step in enumerate(steps, 1):
        place = folder / f"{number}-{step.method}"
        address = next_address(parent, step, material.beside(step))
        made = not fresh and finished(place, address) is not None
        length = None
        if step.recover is not None:
            stages = step.stages or 1
            length = str(step.recover.train.length) + (f", {stages} times" if stages > 1 else "")
        found.append(Ahead(place, step, made, looks(step), length))
        parent = Artefact(place.name, place / "model", address, step)
    return found


def outlined(subject: str, ahead: dict[str, list[Ahead]]) -> list[tuple[str, ...]]:
    """The steps as lines of cells, headings first.

    Args:
        subject: The model that all begin with.
        ahead: The steps of each chain, by its name.
    """
    rows: list[tuple[str, ...]] = [("model", "method", "looks at data", "trains", "")]
    rows += [(subject, "as it is", "", "", "")]
    for name, steps in ahead.items():
        for one in steps:
            word = f"{name}/{one.folder.name}" if name else one.folder.name
            method = " ".join(
                str(part)
                for part in (one.step.method, one.step.format or one.step.what or one.step.to)
                if part
            )
            state = "made already" if one.made else "to be made"
            rows.append((word, method, "yes" if one.looks else "no", one.length or "no", state))
    return rows
