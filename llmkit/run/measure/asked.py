"""What a way of measuring is given: the model, and what is asked of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.evaluate.sharing import ALONE, Share
from llmkit.recipe import Loaded
from llmkit.recipe.schema import Eval, Machine
from llmkit.report.console import Reporter
from llmkit.run.folders import Options

if TYPE_CHECKING:
    from llmkit.run.tasks import TaskRun


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        word: As a person named it.
        place: Its folder, with `config.json`, weights and tokenizer.
        trained: The recipe of the run around it; None for other models.
        task: The run around it, where that trained it for a task.
        precision: What its run computed in, `fp32` or `bf16`; `fp32` for other models.
        trust_remote_code: Whether code that comes with it may run.
        home: The folder that its evaluations go to, where that does not follow from `place`.
        step: Of a checkpoint, its folder's name; else empty.
    """

    word: str
    place: Path
    trained: Loaded | None = None
    task: "TaskRun | None" = None
    precision: str = "fp32"
    trust_remote_code: bool = False
    home: Path | None = None
    step: str = ""


@dataclass(frozen=True)
class Asked:
    """What is asked of a model.

    Attributes:
        section: The recipe's `eval` section, with what the command line said in it.
        base: The folder that its paths may start from.
        language: The recipe's.
        seed: The recipe's: all chance follows from it.
        device: `cpu`, `cuda` or `mps`.
        options: As for every verb.
        reporter: Told what happens.
        share: This process's part of the work.
        held_out_by: Whose run held out what is measured on, where the section names no data; None: the subject's own.
        machine: The recipe's `machine` section.
        others: The other subjects of the command, for what must be timed in turn; else one measures at a time.
    """

    section: Eval
    base: Path
    language: str
    seed: int
    device: str
    options: Options
    reporter: Reporter
    share: Share = ALONE
    others: Sequence[Subject] = ()
    held_out_by: Subject | None = None
    machine: Machine = Machine()  # noqa: RUF009 - frozen
