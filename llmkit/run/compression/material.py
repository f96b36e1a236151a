"""What a model that becomes smaller learned, and from what: to load it, to show it inputs, to measure it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.evaluate.sharing import ALONE
from llmkit.hardware import detect_elsewhere
from llmkit.recipe.compression import Step
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.schema import Compress, Eval, Pretrain, Recipe
from llmkit.registry import TASKS
from llmkit.report.console import Reporter
from llmkit.run.folders import CACHE, Options
from llmkit.run.foreign import foreign_run
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.tasks import TaskRun, load_core

if TYPE_CHECKING:
    from llmkit.objectives.base import Batch, LossModule

MOST_TOKENS = 4096
"""Tokens that are shown to a model together."""
_LONGEST_ROW = 2048


@dataclass(frozen=True)
class Material:
    """A model and what it was made from.

    Attributes:
        subject: The model that the chain begins with.
        section: The recipe's `compress` section.
        asked: What an evaluation of it is told.
        task: What it was trained for; None: text.
    """

    subject: Subject
    section: Compress
    asked: Asked
    task: TaskRun | None

    def of(self, word: str, place: Path) -> Subject:
        """An artefact of the chain, to be measured on what the first model is measured on."""
        task = None if self.subject.task is None else replace(self.subject.task, place=place)
        return replace(self.subject, word=word, place=place, task=task)

    def core(self, place: Path) -> "LossModule":
        """A model of the chain, with what it learned, in float32, ready to be changed."""
        if self.task is not None:
            core, _ = load_core(replace(self.task, place=place, precision="fp32"))
            return core
        from llmkit.data.tokenizers import load_tokenizer
        from llmkit.run.measure.text import text_core

        subject = replace(self.of("", place), precision="fp32")
        return text_core(subject, self.asked, load_tokenizer(str(place)))[0]

    @property
    def learned(self) -> str:
        """What the model is taken to have learned: the task, or how it learned text."""
        if self.task is not None:
            return self.task.section.task
        from llmkit.run.measure.text import learned_by

        return learned_by(self.subject).objective

    def beside(self, step: Step) -> dict[str, Any]:
        """What a step's model follows from besides its parent and its settings."""
        known: dict[str, Any] = {"seed": self.asked.seed, "task": self.learned}
        if looks(step) or step.recover is not None:
            known["calibration"] = self.section.calibration.model_dump(mode="json")
            known["learn"] = self.learn_address()
        return known

    def learn_address(self) -> list[str]:
        """What `learn` names, by the bytes of its files: other text makes another model, a renamed file does not."""
        from llmkit.data import records, sources

        base, cache = self.asked.base, self.asked.options.runs / CACHE
        if self.section.learn is None:
            return []
        if self.task is None:
            return [sources.fingerprint(source, base, cache=cache) for source in self.section.learn]
        return [records.fingerprint(self.labelled(), base, cache=cache)]

    def labelled(self) -> Labelled:
        """The rows of `learn`, in the form and columns of those that the model's run learned from.

        Raises:
            UsageError: It names several sources.
        """
        from llmkit.run.measure.labels import data_of

        learn = self.section.learn or []
        if len(learn) > 1:
            raise UsageError(
                f"compress.learn names {len(learn)} sources, and labelled rows come from one",
                hint="give all files to one source: `learn: {files: [a.csv, b.csv]}`",
            )
        assert self.task is not None
        data = data_of(self.task, replace(self.asked, section=Eval(data=learn)))
        assert data is not None
        return data

    def batches(self, core: "LossModule", step: Step) -> "Sequence[Batch]":
        """What the model learned from, as micro-batches; none for a step that looks at nothing.

        Raises:
            UsageError: The step needs some, and nothing says what the model learned from.
            DataError: There is nothing.
        """
        if not looks(step):
            return []
        made = self._of_rows(core) if self.task is not None else self._of_text(core)
        if not made:
            raise DataError("there is nothing that a step could look at", hint="name more: compress.learn")
        return made

    def _of_text(self, core: "LossModule") -> "list[Batch]":
        from llmkit.data.tokenizers import load_tokenizer
        from llmkit.run.measure.text import learned_by

        settings = self.section.calibration
        streams = self._streams(load_tokenizer(str(self.subject.place)))
        longest = settings.tokens or _LONGEST_ROW
        return text_batches(core, learned_by(self.subject), streams, rows=settings.rows, longest=longest)

    def _learned_rows(self) -> Any:
        from llmkit.run.measure.labels import train_rows

        assert self.task is not None
        try:
            return train_rows(self.task, self.asked.options.runs)
        except MissingError as error:
            raise MissingError(
                f"{self.subject.word}: the rows that its run learned from are gone from the cache",
                hint="give the steps others to look at: --learn FILES (compress.learn)",
            ) from error

    def _streams(self, tokenizer: Any) -> Any:
        from llmkit.run.measure.text import shards_of_run, text_of

        if self.section.learn is not None:
            named = replace(self.asked, section=Eval(data=self.section.learn))
            return text_of(self.subject, named, tokenizer).streams()
        shards = shards_of_run(self.subject, self.asked.options.runs)
        if not shards:
            raise _unknown(self.subject)
        return [shard.split("train") for shard in shards]

    def _of_rows(self, core: "LossModule") -> "list[Batch]":
        from llmkit.data.sample_batches import held_out_batches
        from llmkit.run.measure.labels import rows_of

        assert self.task is not None
        if self.section.learn is not None:
            named = replace(self.asked, section=Eval(labelled=self.labelled()))
            store = rows_of(self.task, self.subject, named, core).store
        elif self.task is not self.subject.task:
            raise _unknown(self.subject)
        else:
            store = self._learned_rows()
        groups = held_out_batches(
            store,
            tokens=MOST_TOKENS,
            max_rows=self.section.calibration.rows,
            world_size=1,
            rank=0,
        )
        objective = core.objective
        return [objective.collate([objective.encode(row) for _, row in group]) for group in groups if group]


def text_batches(
    core: "LossModule",
    learned: Pretrain,
    streams: Sequence[Any],
    *,
    rows: int | None = None,
    batches: int = 1,
    longest: int = _LONGEST_ROW,
) -> "list[Batch]":
    """Micro-batches of text, evenly spaced over it.

    Args:
        core: A model and its objective.
        learned: What it learned, and in which rows.
        streams: The text.
        rows: How many rows at most; None: as many as `batches` hold.
        batches: How many micro-batches at most.
        longest: Tokens of a row at most, where the model predicts the next one.
    """
    from llmkit.data.loader import evaluation_rows, evenly_spaced
    from llmkit.data.rows import Rows
    from llmkit.evaluate.text import read_window, windows_of
    from llmkit.plan import layout_of
    from llmkit.registry import goal_of

    goal, layout, objective = goal_of(learned.objective), layout_of(learned), core.objective
    isolate = learned.isolate_documents
    if learned.objective == "clm":
        context = min(learned.model.context, longest)
        size = max(1, MOST_TOKENS // context)
        windows = windows_of(streams, context, None)
        chosen = [windows[number] for number in evenly_spaced(len(windows), rows or batches * size).tolist()]
        read = [read_window(streams[one.source], one, isolate=isolate) for one in chosen]
        groups: Any = (read[start : start + size] for start in range(0, len(read), size))
    else:
        size = max(1, MOST_TOKENS // layout.stride)
        groups = evaluation_rows(
            Rows(streams, layout.stride, overlap=layout.overlap, partial=True),
            micro_batch_size=size,
            max_rows=rows or batches * size,
            world_size=1,
            rank=0,
            isolate=isolate or goal.positions,
            other=goal.other,
        )
    return [objective.collate([objective.encode({"seed": 0, **row}) for row in group]) for group in groups]


def material_of(
    subject: Subject, section: Compress, recipe: Recipe, base: Path, options: Options, reporter: Reporter
) -> Material:
    """What is known of a model that is to become smaller.

    Args:
        subject: The model.
        section: The recipe's `compress` section.
        recipe: Says seed, language and machine.
        base: The folder that paths may start from.
        options: As for every verb.
        reporter: Told what happens.

    Raises:
        UsageError: Nothing says what to measure it on.
    """
    judged = Eval(task=section.task, data=section.data, rows=section.rows, reference=[])
    asked = Asked(
        section=judged,
        base=base,
        language=recipe.language,
        seed=recipe.seed,
        device=detect_elsewhere(recipe.machine, "compress", reporter.note).device,
        options=options,
        reporter=reporter,
        share=ALONE,
        held_out_by=subject,
        machine=recipe.machine,
    )
    task = subject.task
    if section.task in TASKS and (task is None or task.section.task != section.task):
        task = foreign_run(subject, section.task, asked)
    elif section.task == "text":
        task = None
    return Material(subject, section, asked, task)


def looks(step: Step) -> bool:
    """Whether a step looks at what the model learned from."""
    if step.method == "quantize":
        plain = step.solver == "rtn" or (step.solver == "auto" and step.format in ("int8", "fp8"))
        smooth = step.format == "w8a8" and bool(step.smooth)
        return not plain or smooth or step.format == "mixed"
    if step.method == "prune":
        return step.by != "magnitude"
    if step.method == "factorize":
        return step.by != "weights"
    if step.method == "distil":
        return step.choose == "influence" or (step.channels or 1) < 1
    return step.to in ("onnx", "gguf", "torch")


def _unknown(subject: Subject) -> UsageError:
    return UsageError(
        f"{subject.word}: no run trained it, and nothing says what it learned from",
        hint="give some for the steps to look at: --learn FILES (compress.learn)",
    )
