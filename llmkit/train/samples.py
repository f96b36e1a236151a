"""A run on labelled rows: what it reads, and its batches for this process."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from llmkit.data.augment import Augmented
from llmkit.data.augment.mixing import Mixing, mixed
from llmkit.data.augment.paraphrases import Paraphrases
from llmkit.data.balance import Groups, by_class
from llmkit.data.loader import Encode, Prefetcher
from llmkit.data.order import RowOrder
from llmkit.data.sample_batches import SampleBatches, held_out_batches
from llmkit.data.samples import Samples
from llmkit.data.taught import TaughtBatches, TaughtStore, made_up
from llmkit.data.tokenizers import load_tokenizer
from llmkit.evaluate.split import ROW_NUMBERS
from llmkit.objectives.base import Batch, Example, Material, Objective, size_of
from llmkit.plan import Plan
from llmkit.recipe.schema import Finetune
from llmkit.registry import goal_of
from llmkit.train.even import make_even
from llmkit.train.job import Job
from llmkit.train.loop import POSITIONS, MicroBatch
from llmkit.train.sending import send

_MOST_DESCRIBED, _DESCRIBED_LETTERS = 4, 80
_SHOWN = ("text", "source", "question", "tokens", "messages", "prompt", "anchor")


@dataclass(frozen=True)
class SampleData:
    """What a run on labelled rows reads.

    Attributes:
        tokenizer: The model's.
        train: Rows to learn from.
        held_out: Rows to measure on.
        material: What the task is made of.
        groups: Rows to learn from by class, where classes are balanced.
        paraphrases: Of each `back_translate` of the recipe, what stands for a text.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Samples
    held_out: Samples
    material: Material
    groups: Groups | None = None
    paraphrases: Sequence[Paraphrases] = ()


def open_samples(job: Job) -> SampleData:
    """Open tokenizer and rows."""
    section = job.section()
    assert isinstance(section, Finetune)
    tokenizer = load_tokenizer(job.tokenizer)
    material = Material(
        tokenizer=tokenizer,
        max_length=section.model.context,
        labels=tuple(job.labels),
        language=job.checked_recipe().language,
        facts=job.plan["rows"],
    )
    folder = Path(job.rows)
    train = Samples(folder, "train")
    held_out, groups = Samples(folder, "held_out"), _groups(section, train)
    said = [Paraphrases(Path(place)) for place in job.paraphrases]
    return SampleData(tokenizer, train, held_out, material, groups, said)


def _groups(section: Finetune, train: Samples) -> Groups | None:
    if section.task != "cls" or section.cls.balance == "none":
        return None
    return by_class((train[number]["label"] for number in range(len(train))), section.cls.balance)


class SampleFeed:
    """Batches for this process: training steps one after the other, and the held-out rows."""

    def __init__(
        self,
        data: SampleData,
        objective: Objective,
        plan: Plan,
        section: Finetune,
        accelerator: Accelerator,
        taught: TaughtStore | None = None,
    ) -> None:
        self._data = data
        self._objective = objective
        self._plan = plan
        self._packed = goal_of(section.task).packs and plan.packed
        self._accelerator = accelerator
        self._taught = taught
        self._draws = bool(section.augment or section.loss.mixup) or getattr(objective, "draws", False)
        self._encode: Encode = objective.encode
        if section.augment:
            self._encode = Augmented(
                objective.encode,
                section.augment,
                task=section.task,
                tokenizer=data.tokenizer,
                language=data.material.language,
                paraphrases=[one.of for one in data.paraphrases],
            )
        self._mixing: Mixing | None = None
        if section.loss.mixup:
            self._mixing = Mixing(self._encode, data.train, section.loss.mixup, data.groups)
        self._even = None
        if taught is None:
            mixes = self._mixing is not None
            self._even = make_even(objective, data.train, plan, packed=self._packed, mixes=mixes)
        self._batches: SampleBatches | None = None

    def steps(self, order: RowOrder, start: int, stop: int, *, workers: int = 0) -> Prefetcher:
        """This process's examples of steps `start` to `stop`, prepared ahead; to be closed. See `Feed.steps`."""
        self._batches = batches = self.batches(order)
        taught = batches if self._taught is None else TaughtBatches(batches, self._taught)
        return Prefetcher(taught, start, stop, workers=workers)

    def batches(self, order: RowOrder) -> SampleBatches:
        """The steps' rows, for this process."""
        return SampleBatches(
            self._data.train,
            order,
            rows_per_step=self._plan.rows_per_step,
            tokens=self._plan.micro_batch_tokens,
            packed=self._packed,
            world_size=self._plan.layout.data_size,
            rank=self._plan.layout.data_rank(self._accelerator.process_index),
            encode=self._mixing or self._encode,
            draws=self._draws,
            partner=self._mixing.partner if self._mixing else None,
            groups=self._data.groups.rows if self._data.groups else None,
            share=self._even.share if self._even else None,
        )

    def in_order(self, steps: Prefetcher) -> Callable[[int], list[MicroBatch]]:
        """A step -> its micro-batches on the device, for steps asked for in the order they are prepared in."""
        prepared = iter(steps)

        def of_step(step: int) -> list[MicroBatch]:
            number, micro = next(prepared)
            assert number == step
            return [(index, self._counted(examples)) for index, examples in micro]

        return of_step

    def describe(self, step: int, micro: Sequence[int] | None = None) -> list[str]:
        """Which rows `step` (counted from 0) learns from, a line each: where it is from, and its beginning.

        Args:
            step: Any step once `steps` has been called.
            micro: Only these micro-batches of it, by their numbers over all processes; None: all.
        """
        assert self._batches is not None
        places = self._batches.places(step, micro)
        lines = [
            f"micro-batch {number}: {row['place']}: {_beginning(row)}"
            for number, row in ((number, self._data.train[at]) for number, at in places[:_MOST_DESCRIBED])
        ]
        left = len(places) - len(lines)
        return [*lines, f"and {left:,} more rows"] if left else lines

    def held_out(self, max_rows: int | None) -> Iterator[Batch | None]:
        """This process's share of the held-out rows; `max_rows` of them over all processes, or all.

        Every process gets the same number of rounds: None stands for a batch that this one does not have.
        """
        for rows in held_out_batches(
            self._data.held_out,
            tokens=self._plan.micro_batch_tokens,
            max_rows=max_rows,
            world_size=self._plan.layout.data_size,
            rank=self._plan.layout.data_rank(self._accelerator.process_index),
        ):
            yield None if rows is None else self._measured(rows)

    def _measured(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        batch = self._batch([self._objective.encode(row) for _, row in rows])
        return {**batch, ROW_NUMBERS: torch.tensor([number for number, _ in rows])}

    @property
    def speaks(self) -> bool:
        """Whether this process counts what it reads; see `Layout.speaks`."""
        return self._plan.layout.speaks(self._accelerator.process_index)

    def largest(self) -> Batch:
        """A batch of the largest shape: the longest row, as often as a micro-batch holds it."""
        lengths = self._data.train.lengths
        row = {**self._data.train[int(np.argmax(lengths))], "seed": 0}
        times = max(1, self._plan.micro_batch_tokens // max(1, int(lengths.max())))
        example = self._objective.encode(row)
        if self._mixing is not None:
            example = mixed(example, example, 0.5)
        if self._taught is not None:
            example = made_up(example, self._taught.top_k, self._taught.outputs)
        if self._even is not None:
            return self._batch(self._even.filled([example] * self._even.rows))
        return self._batch([example] * min(times, self._plan.rows_per_step))

    def _counted(self, examples: Sequence[Example]) -> Batch:
        """A batch with the number of its positions, for the speed."""
        positions = sum(size_of(self._objective, example) for example in examples)
        if self._even is not None:
            examples = self._even.filled(examples)
        return {**self._batch(examples), POSITIONS: torch.tensor(positions)}

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return send(self._objective.collate(examples), self._accelerator.device)


def _beginning(row: Mapping[str, Any]) -> str:
    """A row's first words, on one line and without control characters."""
    found = next((row[name] for name in _SHOWN if name in row), "")
    line = "".join(letter if letter.isprintable() else " " for letter in str(found))
    return '"' + textwrap.shorten(line, _DESCRIBED_LETTERS, placeholder="…") + '"'
