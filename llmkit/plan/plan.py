"""Recipe x hardware x data = numbers. Pure arithmetic: the same inputs always give the same plan.

`--dry-run` prints it, the run carries it out; there is no second computation of any of these numbers.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from llmkit.plan.length import resolve_every, resolve_warmup
from llmkit.plan.memory import Memory
from llmkit.plan.parallel import Layout
from llmkit.recipe.units import Amount


@dataclass(frozen=True)
class SourceFacts:
    """What one source holds; tokens, documents and bytes (UTF-8, of the text) of its training part."""

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_held_out_tokens: int = 0
    weight: float | None = None


@dataclass(frozen=True)
class DataFacts:
    """What the data holds.

    Attributes:
        num_tokens: Tokens to train on, held-out documents not counted.
        num_documents: Documents to train on.
        num_bytes: UTF-8 bytes of their text.
        exact: False when these are estimates from file sizes, before tokenising.
        per_source: The same by source.
        num_held_out_tokens: Tokens kept out for evaluation.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    exact: bool
    per_source: list[SourceFacts] = field(default_factory=list)
    num_held_out_tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know in numbers.

    Attributes:
        device: `cpu`, `cuda` or `mps`.
        world_size: Processes, one per device.
        precision: `fp32` or `bf16`.
        compile: Whether the model is compiled.
        attention: The kernel, or `auto`: then the worker probes.
        context: Tokens a row.
        rows_per_step: Rows of one optimizer step over all devices.
        micro_batch_size: Rows a device holds at a time.
        gradient_accumulation_steps: Micro-batches a device sees per step.
        tokens_per_step: `rows_per_step * context`.
        num_steps: Optimizer steps; None while the length is a time that has not been measured yet.
        length_seconds: The length where it is a time.
        warmup_steps, checkpoint_every, keep_every, eval_every: Steps; 0 means none (warm-up, `keep_every`) or only
            at the end; None while it depends on a speed that has not been measured yet: `with_steps` settles it.
        deferred: For each of those that are None, what the recipe says.
        background_save: Whether checkpoints are written while training goes on.
        num_rows_per_epoch: Rows of one pass over the training data.
        num_epochs: Passes over the data that `num_steps` make.
        vocab_size: Entries of the tokenizer.
        num_parameters: Weights of the model.
        flops_per_token: See `flops_per_token` in `estimate`.
        memory: Estimated bytes on one device.
        seconds_low, seconds_high: Estimated duration; None where the device is unknown.
        checkpoint_bytes: Size of one checkpoint.
        choices: Each `auto` by dotted key: what was chosen and why.
        notes: Remarks a person should see.
        micro_batch_tokens: For labelled rows: tokens a device holds at a time; 0 where a number of rows says it.
        packed: For labelled rows: whether those of a micro-batch stand in one line.
        num_trained: Of the weights, those that learn; None: all.
        rows: For labelled rows: what is known of them, as preparation found it.
        teacher_cache: What is kept on disk of a teacher, see `taught.plan_cache`; empty where nothing is.
        nodes: Machines that the processes run on.
        parallel: Who shares what, see `layout`; empty: every process holds all of the model.
        recompute: Activations computed again in the backward pass: `none`, `selective` or `full`.
        offload: Whether shards wait in the host's memory.
        communication: What processes send each other, see `communication.with_communication`; empty: plain gradients.
        step_seconds: Shortest and longest seconds of each part of a step, see `cost`; empty: the device is unknown.
        cost: Dollars of the run, low and high; None where time or price are unknown.
        disk_bytes: What the run has on disk at a time, by what it is.
        data: What is known of the text: tokens, documents, bytes, held-out tokens, whether these are counted, and
            positions of a row that are learned, at most.
        activations: Bytes of activations by what is computed again; `recompute` says which of them is planned.
        price: Dollars that an hour of a device is taken to cost, low and high; None where nothing is known.
    """

    device: str
    world_size: int
    precision: str
    compile: bool
    attention: str
    context: int
    rows_per_step: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    num_steps: int | None
    length_seconds: float | None
    warmup_steps: int | None
    checkpoint_every: int | None
    keep_every: int | None
    eval_every: int | None
    background_save: bool
    deferred: Mapping[str, Amount]
    num_rows_per_epoch: int
    num_epochs: float | None
    vocab_size: int
    num_parameters: int
    flops_per_token: int
    memory: Memory
    seconds_low: float | None
    seconds_high: float | None
    checkpoint_bytes: int
    choices: Mapping[str, tuple[Any, str]]
    notes: tuple[str, ...]
    micro_batch_tokens: int = 0
    packed: bool = False
    num_trained: int | None = None
    rows: Mapping[str, Any] = field(default_factory=dict)
    teacher_cache: Mapping[str, Any] = field(default_factory=dict)
    nodes: int = 1
    parallel: Mapping[str, int] = field(default_factory=dict)
    recompute: str = "none"
    offload: bool = False
    communication: Mapping[str, Any] = field(default_factory=dict)
    step_seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    cost: tuple[float, float] | None = None
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)
    price: tuple[float, float] | None = None

    @property
    def layout(self) -> Layout:
        """Who shares what; where nothing was said, every process holds all of the model."""
        return Layout.from_dict(self.parallel) if self.parallel else Layout(replicate=self.world_size)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        plain = asdict(self)
        plain["choices"] = {key: list(choice) for key, choice in self.choices.items()}
        plain["notes"] = list(self.notes)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: Fields are missing or unknown, as after a change of version; the message names them.
        """
        known = {f.name for f in fields(cls)}
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if not needed <= set(plain) <= known:
            raise ValueError(
                f"not a plan of this version; fields that differ: {', '.join(sorted(set(plain) ^ known))}"
            )
        values = dict(plain)
        values["memory"] = Memory(**plain["memory"])
        values["choices"] = {key: (value, why) for key, (value, why) in plain["choices"].items()}
        values["deferred"] = {key: Amount(**amount) for key, amount in plain["deferred"].items()}
        values["notes"] = tuple(plain["notes"])
        values["step_seconds"] = {name: tuple(s) for name, s in plain.get("step_seconds", {}).items()}
        for name in ("cost", "price"):
            values[name] = tuple(plain[name]) if plain.get(name) else None
        return cls(**values)

    def with_steps(self, num_steps: int, *, seconds_per_step: float | None = None) -> "Plan":
        """The plan with the number of steps fixed, and all that waited for it settled.

        Args:
            num_steps: Optimizer steps of the run.
            seconds_per_step: Measured; by default the planned time shared by the steps. Needed only where the
                recipe says `every: 10m` and the length is not a time.

        Raises:
            ValueError: `num_steps` is not positive, or a time is to be turned into steps at an unknown speed.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        if seconds_per_step is None and self.length_seconds is not None:
            seconds_per_step = self.length_seconds / num_steps
        settled: dict[str, int] = {}
        for key, amount in self.deferred.items():
            if key == "warmup_steps":
                steps = resolve_warmup(amount, num_steps=num_steps, tokens_per_step=self.tokens_per_step)
            else:
                steps = resolve_every(
                    amount,
                    num_steps=num_steps,
                    tokens_per_step=self.tokens_per_step,
                    rows_per_step=self.rows_per_step,
                    num_rows_per_epoch=self.num_rows_per_epoch,
                    seconds_per_step=seconds_per_step,
                )
            if steps is None:
                raise ValueError(f"{key} is a time: seconds_per_step is needed to turn it into steps")
            settled[key] = steps
        epochs = num_steps * self.rows_per_step / self.num_rows_per_epoch
        waited: dict[str, Any] = settled
        return replace(self, num_steps=num_steps, num_epochs=epochs, deferred={}, **waited)
