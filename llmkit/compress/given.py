"""The contract of a method: what it is given, and what it has made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmkit.objectives.base import Batch, LossModule


@dataclass(frozen=True)
class Given:
    """A model that is to become smaller.

    Attributes:
        core: The model and what it learned, in float32, in evaluation mode; a method may change the model in place.
        batches: Micro-batches of what it learned from, on the host; empty for a method that looks at nothing.
        place: The folder that the model was loaded from, with its tokenizer.
        seed: All chance follows from it.
        told: Takes a line that a person may read meanwhile.
    """

    core: LossModule
    batches: Sequence[Batch]
    place: Path
    seed: int
    told: Callable[[str], None]

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.core.model


@dataclass(frozen=True)
class Made:
    """What a method has made.

    Attributes:
        model: It computes what the artefact will compute: of quantised weights their rounded values.
        facts: What was done, as JSON: what a table and a model card say of it.
        write: Leaves the weights and the configuration in a folder, where that is not `save_pretrained` in the data
            type that the weights came in.
        warnings: What a person should know.
        standard: Whether plain transformers loads what is written.
    """

    model: PreTrainedModel
    facts: Mapping[str, Any]
    write: Callable[[Path], None] | None = None
    warnings: Sequence[str] = field(default_factory=list)
    standard: bool = True
