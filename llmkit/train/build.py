"""The parts of a run, built from a job in the order in which they depend on each other."""

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.data.loader import MicroBatches, Prefetcher, evaluation_rounds, evaluation_rows
from llmkit.data.order import RowOrder
from llmkit.data.rows import Row, Rows
from llmkit.data.shards import TokenShards
from llmkit.data.taught import TaughtBatches, TaughtStore, made_up, store_of
from llmkit.data.tokenizers import load_tokenizer, special_ids
from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.errors import UsageError
from llmkit.models.attention import choose_attention, drops_attention, kernels_of
from llmkit.models.build import build_model
from llmkit.models.growing import check_new_tokens, grow_vocabulary
from llmkit.models.heads import choose_heads
from llmkit.models.rounded import round_weights
from llmkit.models.tasks import build_task_model
from llmkit.objectives.base import (
    Batch,
    Example,
    HasParts,
    LossModule,
    Material,
    Objective,
    Prepares,
    Refers,
    Stops,
    smoothed_cross_entropy,
)
from llmkit.objectives.distil import Distilled
from llmkit.objectives.losses import make_criterion
from llmkit.objectives.make import make_objective, make_task
from llmkit.objectives.taught import Taught
from llmkit.objectives.texts import pad_id
from llmkit.optim import describe_groups, lr_at, make_optimizer, mark_zeros
from llmkit.plan import Plan, layout_of
from llmkit.recipe.schema import Finetune, Pretrain, Section
from llmkit.registry import goal_of, kind_for
from llmkit.train.job import Job
from llmkit.train.learning import choose_what_learns, paces
from llmkit.train.loop import MicroBatch, Schedule
from llmkit.train.places import model_folder, new_tokens
from llmkit.train.samples import SampleData
from llmkit.train.sending import send
from llmkit.train.state import mix_seed
from llmkit.train.teacher import load_task_teacher, load_teacher

_RECORDS_A_RUN = 500
_PARTS = 1 << 44  # keeps their seed apart from those of micro-batches
_MOST_DESCRIBED = 4
_DESCRIBED_TOKENS, _DESCRIBED_LETTERS = 48, 80


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        tokenizer: Made the shards, and travels with the model.
        train: Full rows to learn from.
        held_out: Rows of held-out documents; the last of a source may be shorter.
        bytes_per_token: UTF-8 bytes of held-out text for each of its tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    held_out: Rows
    bytes_per_token: float


def open_data(job: Job) -> Data:
    """Open tokenizer and shards."""
    shards = [TokenShards.open(Path(folder)) for folder in job.shards]
    layout = layout_of(text_section(job))
    held_out = [shard.split("held_out") for shard in shards]
    tokens = sum(stream.num_tokens for stream in held_out)
    return Data(
        tokenizer=load_tokenizer(job.tokenizer),
        train=Rows([shard.split("train") for shard in shards], layout.stride, overlap=layout.overlap),
        held_out=Rows(held_out, layout.stride, overlap=layout.overlap, partial=True),
        bytes_per_token=sum(stream.num_bytes for stream in held_out) / max(1, tokens),
    )


def text_section(job: Job) -> Pretrain:
    """The section of a job on text."""
    section = job.section()
    assert isinstance(section, Pretrain)
    return section


def build_core(job: Job, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> LossModule:
    """The model with the weights it starts from, and its objective."""
    section = text_section(job)
    kind = goal_of(section.objective).model
    model = build_model(
        section.model,
        kind,
        vocab_size=len(tokenizer),
        special_ids=special_ids(tokenizer),
        seed=job.seed,
    )
    choose_heads(model, kind)
    end = goal_of(section.objective).end
    if end:
        ends = [tokenizer.eos_token_id, Vocabulary.of(tokenizer).id_of(end)]
        model.generation_config.eos_token_id = ends
    objective = make_objective(section, tokenizer)
    frozen: dict[str, PreTrainedModel] = {}
    objective = _with_teacher(objective, job, plan, frozen, lambda: find_teacher(job, tokenizer, None))
    if section.train.quantized is not None:
        round_weights(model, section.train.quantized)
    torch.manual_seed(mix_seed(job.seed, _PARTS))  # a model that was loaded left torch's seed as it was
    parts = objective.parts(model) if isinstance(objective, HasParts) else {}
    return LossModule(
        model,
        objective,
        bf16=plan.precision != "fp32",
        criterion=smoothed_cross_entropy(section.train.label_smoothing, section.train.z_loss),
        parts=parts,
        frozen=frozen,
    )


def build_task_core(job: Job, plan: Plan, data: SampleData) -> tuple[LossModule, tuple[str, ...]]:
    """A pretrained model with a head for the task, and the task; and the names of the head's weights that are new."""
    section = job.section()
    assert isinstance(section, Finetune)
    spec = section.model
    kind = kind_for(section.task, data.material.facts)
    model, new = build_task_model(
        model_folder(str(spec.name)),
        kind,
        labels=data.material.labels,
        number=section.task == "regression",
        pad_token_id=pad_id(data.tokenizer),
        dropout=spec.dropout,
        trusted=spec.trust_remote_code,
        seed=job.seed,
    )
    if section.task == "cls":  # else transformers guesses it, and pipelines show the wrong kind of score
        kinds = ("single_label_classification", "multi_label_classification")
        model.config.problem_type = kinds[section.cls.multiple]
    added = new_tokens(job.tokenizer)
    if added:
        grow_vocabulary(model, len(data.tokenizer), len(added), seed=job.seed)
    objective = make_task(section, data.material)
    if isinstance(objective, Prepares):
        objective.prepare(model)
    choose_what_learns(
        model,
        section,
        device=torch.device(plan.device),
        new=new,
        base=model_folder(str(spec.name)),
        seed=job.seed,
    )
    choose_heads(model, kind)
    if isinstance(objective, Prepares):
        objective.prepare(model)  # also what an adapter has brought there
    check_new_tokens(model, added)
    if isinstance(objective, Stops):
        model.generation_config.eos_token_id = sorted(
            {*objective.stops, data.tokenizer.eos_token_id} - {None}
        )
    frozen = _reference(objective, model, section)
    objective = _with_teacher(
        objective, job, plan, frozen, lambda: find_teacher(job, data.tokenizer, data.material)
    )
    if section.train.quantized is not None:
        round_weights(model, section.train.quantized)
    torch.manual_seed(mix_seed(job.seed, _PARTS))
    core = LossModule(
        model,
        objective,
        bf16=plan.precision != "fp32",
        criterion=make_criterion(section, data.material),
        parts=objective.parts(model) if isinstance(objective, HasParts) else {},
        frozen=frozen,
    )
    return core, new


def find_teacher(job: Job, tokenizer: Any, material: Material | None) -> PreTrainedModel:
    """The teacher of a job, loaded and checked; see `teacher.py`.

    Args:
        job: Its section names one.
        tokenizer: The run's.
        material: What the task is made of; None for an objective on text.
    """
    section = job.section()
    assert section.distil is not None
    name = section.distil.teacher
    if material is None:
        kind = goal_of(section.objective).model
        return load_teacher(name, kind, tokenizer, context=section.model.context)
    number = section.objective == "regression"
    return load_task_teacher(
        name,
        kind_for(section.objective, material.facts),
        tokenizer,
        labels=() if number else material.labels,
        number=number,
        context=material.max_length,
    )


def _with_teacher(
    objective: Objective,
    job: Job,
    plan: Plan,
    frozen: dict[str, PreTrainedModel],
    find: Callable[[], PreTrainedModel],
) -> Objective:
    """The objective with its teacher, which goes to `frozen`; or with what that said, where this is kept on disk."""
    section = job.section()
    if section.distil is None:
        return objective
    if job.teacher_cache:
        cache = plan.teacher_cache
        return Taught(objective, section.distil, top_k=cache["top_k"], outputs=cache["outputs"])
    frozen["teacher"] = find()
    return Distilled(objective, frozen["teacher"], section.distil, goal_of(section.objective).model)


def teacher_store(job: Job, plan: Plan) -> TaughtStore | None:
    """Where what the teacher says is kept; None where it is asked at every step, or there is none."""
    return store_of(Path(job.teacher_cache), plan.teacher_cache) if job.teacher_cache else None


def _reference(objective: Objective, model: PreTrainedModel, section: Finetune) -> dict[str, PreTrainedModel]:
    """The model as it is now, where the objective compares with it and it is not the model without its adapter."""
    if not isinstance(objective, Refers) or not objective.needs_reference:
        return {}
    if section.adapter is not None and section.adapter.start is None:
        return {}
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    objective.refer(reference)
    return {"reference": reference}


def build_optimizer(
    core: LossModule, section: Section, plan: Plan, note: Callable[[str], None]
) -> torch.optim.Optimizer:
    """The optimizer of all that is trained; where parameters are treated differently, `note` is told how.

    Raises:
        UsageError: Zeros are to be kept, and there are none.
    """
    spec = section.train
    if spec.keep_zeros:
        zeros, numbers = mark_zeros(core.model)
        if not zeros:
            raise UsageError(
                f"train.keep_zeros: none of the {numbers:,} weights of linear layers that learn is zero",
                hint="start from a model that was pruned (llmkit compress RUN --method prune), or leave it out",
            )
        note(f"zeros: {zeros:,} of {numbers:,} weights of linear layers stay zero")
    optimizer = make_optimizer(
        core.trained, spec.optim, l1=spec.l1, ema=spec.ema, paces=paces(core.model, section, plan)
    )
    if spec.optim.groups or spec.optim.name == "muon":
        for line in describe_groups(optimizer):
            note(f"parameters: {line}")
    return optimizer


def pick_attention(plan: Plan, core: LossModule, *, isolate: bool) -> tuple[str, str]:
    """The fastest attention kernel in a probe of the run's shapes, and why."""
    config, known = core.model.config, kernels_of(core.model)
    if "compiled" not in known:
        return "sdpa", "its own attention" if known else "it has no attention"
    heads = config.num_attention_heads
    name, why, _ = choose_attention(
        device=plan.device,
        dtype=torch.bfloat16 if core.bf16 else torch.float32,
        batch=plan.micro_batch_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        seq_len=plan.context,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        compiled=plan.compile,
        isolate=isolate,
        drops=drops_attention(config),
    )
    return name, why


def make_order(job: Job, data: Data | SampleData) -> RowOrder:
    """Which training row comes when."""
    if isinstance(data, SampleData) and data.groups is not None:
        return RowOrder([len(rows) for rows in data.groups.rows], data.groups.shares, job.seed)
    sizes = data.train.sizes if isinstance(data, Data) else [len(data.train)]
    return RowOrder(sizes, job.weights, job.seed)


def make_schedule(section: Section, plan: Plan) -> Schedule:
    """When things happen in a run whose length is known."""
    optim, num_steps = section.train.optim, plan.num_steps
    assert num_steps is not None
    assert not plan.deferred
    warmup_steps = plan.warmup_steps or 0
    return Schedule(
        num_steps=num_steps,
        tokens_per_step=plan.tokens_per_step,
        log_every=max(1, num_steps // _RECORDS_A_RUN),
        eval_every=plan.eval_every or 0,
        eval_rows=_rows_measured(section, plan),
        checkpoint_every=plan.checkpoint_every or 0,
        keep_every=plan.keep_every or 0,
        lr_at=lambda step: lr_at(step, optim, num_steps=num_steps, warmup_steps=warmup_steps),
        grad_clip=section.train.grad_clip or math.inf,
        grad_noise=section.train.gradient_noise,
    )


def _rows_measured(section: Section, plan: Plan) -> int | None:
    """The held-out rows of an evaluation; None where these are all that there are, as at the end."""
    held_out = plan.rows.get("held_out", {}).get("num_rows")
    most = section.eval.rows
    return None if most is not None and held_out is not None and held_out <= most else most


class Feed:
    """Batches for this process: training steps one after the other, and the held-out rows."""

    def __init__(
        self,
        data: Data,
        objective: Objective,
        plan: Plan,
        section: Pretrain,
        accelerator: Accelerator,
        taught: TaughtStore | None = None,
    ) -> None:
        self._data = data
        self._objective = objective
        self._plan = plan
        self._section = section
        self._accelerator = accelerator
        self._taught = taught
        self._goal = goal_of(section.objective)
        self._tells_positions = section.isolate_documents or self._goal.positions
        self._batches: MicroBatches | None = None

    def steps(self, order: RowOrder, start: int, stop: int, *, workers: int = 0) -> Prefetcher:
        """This process's examples of steps `start` to `stop`, prepared ahead; to be closed.

        Args:
            order: Which row comes when.
            start: First step, counted from 0.
            stop: The step to end before.
            workers: Processes that prepare them (`machine.loader_workers`); 0: a thread.
        """
        self._batches = batches = self.batches(order)
        taught = batches if self._taught is None else TaughtBatches(batches, self._taught)
        return Prefetcher(taught, start, stop, workers=workers)

    def batches(self, order: RowOrder) -> MicroBatches:
        """The steps' rows, for this process."""
        return MicroBatches(
            self._data.train,
            order,
            rows_per_step=self._plan.rows_per_step,
            micro_batch_size=self._plan.micro_batch_size,
            world_size=self._plan.layout.data_size,
            rank=self._plan.layout.data_rank(self._accelerator.process_index),
            isolate=self._tells_positions,
            other=self._goal.other,
            encode=self._objective.encode,
        )

    def in_order(self, steps: Prefetcher) -> Callable[[int], list[MicroBatch]]:
        """A step -> its micro-batches on the device, for steps asked for in the order they are prepared in."""
        prepared = iter(steps)

        def of_step(step: int) -> list[MicroBatch]:
            number, micro = next(prepared)
            assert number == step
            return [(index, self._batch(examples)) for index, examples in micro]

        return of_step

    def describe(self, step: int, micro: Sequence[int] | None = None) -> list[str]:
        """Which rows `step` (counted from 0) learns from, a line each: source, number, first words.

        Args:
            step: Any step once `steps` has been called, whether prepared yet or not.
            micro: Only these micro-batches of it, by their numbers over all processes; None: all.
        """
        batches = self._batches
        assert batches is not None
        numbers = list(range(batches.num_micro)) if micro is None else list(micro)
        _, sources, rows = batches.places(step, numbers)
        size = batches.micro_batch_size
        lines = [
            f"micro-batch {numbers[i // size]}: {self._data.train.streams[source].name!r} row {row:,}: "
            f"{self._first_words(source, row)}"
            for i, (source, row) in enumerate(
                zip(sources[:_MOST_DESCRIBED].tolist(), rows[:_MOST_DESCRIBED].tolist(), strict=True)
            )
        ]
        left = len(rows) - len(lines)
        return [*lines, f"and {left:,} more rows"] if left else lines

    def _first_words(self, source: int, row: int) -> str:
        """The start of a training row's text, on one line and without control characters."""
        [found] = self._data.train.take([source], [row])
        text = self._data.tokenizer.decode(found["ids"][:_DESCRIBED_TOKENS].tolist())
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        return '"' + textwrap.shorten(line, _DESCRIBED_LETTERS, placeholder="…") + '"'

    def held_out(self, max_rows: int | None) -> Iterator[Batch | None]:
        """This process's share of the held-out rows; `max_rows` of them over all processes, or all.

        Every process gets the same number of rounds: None stands for a batch that this one does not have.
        """
        held_out, size, layout = self._data.held_out, self._plan.micro_batch_size, self._plan.layout
        world_size = layout.data_size
        batches = evaluation_rows(
            held_out,
            micro_batch_size=size,
            max_rows=max_rows,
            world_size=world_size,
            rank=layout.data_rank(self._accelerator.process_index),
            isolate=self._tells_positions,
            other=self._goal.other,
        )
        rounds = evaluation_rounds(held_out, micro_batch_size=size, max_rows=max_rows, world_size=world_size)
        for _ in range(rounds):
            rows = next(batches, None)
            yield None if rows is None else self._batch([self._objective.encode(row) for row in rows])

    @property
    def speaks(self) -> bool:
        """Whether this process counts what it reads; see `Layout.speaks`."""
        return self._plan.layout.speaks(self._accelerator.process_index)

    def largest(self) -> Batch:
        """A made-up batch of the largest shape."""
        layout = layout_of(self._section)
        ids = np.arange(layout.stride + layout.overlap, dtype=np.int64) % self._plan.vocab_size
        row: Row = {"ids": ids, "seed": np.asarray(0)}
        if self._tells_positions:
            row["positions"] = np.arange(len(ids), dtype=np.int64)
        if self._goal.other:
            row |= {"other": ids, "other_positions": np.arange(len(ids), dtype=np.int64)}
        example = self._objective.encode(row)
        if self._taught is not None:
            example = made_up(example, self._taught.top_k, self._taught.outputs)
        return self._batch([example] * self._plan.micro_batch_size)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return send(self._objective.collate(examples), self._accelerator.device)
