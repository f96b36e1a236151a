"""What a worker process is told: everything is decided, nothing is left to look up."""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.durable import write_json
from llmkit.plan import Plan
from llmkit.recipe import load_recipe
from llmkit.recipe.schema import Recipe, Section


@dataclass(frozen=True)
class Job:
    """One training run, decided.

    Attributes:
        recipe: The checked recipe, as JSON.
        plan: Its numbers on this machine; a resumed run has those it began with.
        folder: The run folder.
        tokenizer: Folder or name of the tokenizer.
        tokenizer_figures: What its making found, for the report.
        shards: Token shards, one folder a source.
        weights: The sources' weights in the recipe, or None: by size.
        identity: What a resumed run must share with the saved one.
        command: The command that a person types to do this again.
        face: How progress is shown: `json` and `quiet`.
        deadline: When (`time.monotonic()`, which the processes of one machine share) the run must have saved and
            ended; None for never.
        self_check: Whether the run proves itself before its first step.
        verb: Which section of the recipe it is: `pretrain` or `finetune`.
        rows: For a task on labelled rows, their folder (see `data.samples`); else empty.
        labels: For a task that has them, the names of classes or tags in the order of their numbers.
        teacher_cache: Where what a teacher says is kept (`distil.cache`), by what it follows from; else empty.
        paraphrases: Of each `back_translate` of `augment`, the folder of what stands for a text.
        kill_at: End the first process by SIGKILL once it has recorded this step, to prove what a crash does; None
            for never.
    """

    recipe: dict[str, Any]
    plan: dict[str, Any]
    folder: str
    tokenizer: str
    tokenizer_figures: dict[str, Any]
    shards: list[str]
    weights: list[float] | None
    identity: dict[str, Any]
    command: str
    face: dict[str, bool]
    deadline: float | None = None
    self_check: bool = True
    kill_at: int | None = None
    verb: str = "pretrain"
    rows: str = ""
    labels: list[str] = field(default_factory=list)
    teacher_cache: str = ""
    paraphrases: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it for other processes to load."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_bytes()))

    def checked_recipe(self) -> Recipe:
        """The recipe as an object."""
        return self._recipe

    @cached_property
    def _recipe(self) -> Recipe:
        return load_recipe(self.recipe).recipe

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return int(self.recipe["seed"])

    def section(self) -> Section:
        """The recipe's section that this job carries out."""
        section: Section | None = getattr(self.checked_recipe(), self.verb)
        assert section is not None
        return section

    def checked_plan(self) -> Plan:
        """The plan as an object."""
        return Plan.from_dict(self.plan)
