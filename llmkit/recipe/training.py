"""How a model is trained: how long, by which optimizer, what is saved and measured meanwhile."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from llmkit.recipe.block import Block, Words, as_list
from llmkit.recipe.optimizers import with_defaults
from llmkit.recipe.units import (
    Amount,
    Batch,
    Count,
    Every,
    Length,
    Ratio,
    Several,
    Warmup,
    Whole,
    shown,
    unit_error,
)
from llmkit.registry import MEASURED, nearest


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Beta = Annotated[float, Field(ge=0, lt=1)]


def _metric(value: object) -> str:
    """A metric of evaluations while training, whichever objective has it."""
    if isinstance(value, str) and value in MEASURED:
        return value
    meant = nearest(f"eval/{str(value).removeprefix('eval/')}", MEASURED)
    raise unit_error(
        f"`{shown(value)}` is no metric of an evaluation",
        f"did you mean `{meant}`?" if meant else f"write one of {', '.join(MEASURED)}",
    )


Metric = Annotated[str, PlainValidator(_metric), WithJsonSchema({"enum": list(MEASURED)})]


class Group(Block):
    """Parameters, chosen by their names, that are treated otherwise than the others."""

    match: Annotated[str, Field(pattern=r"[^ |]")]
    """Which: `embed*|lm_head` means all parameters with a part between dots of their names that fits; `*`, `?` and
    `[...]` are as in file names, `|` stands between alternatives, a pattern with dots fits several parts
    (`layers.0`). The first entry that matches a parameter rules over it; one that matches none is an error."""
    lr_ratio: Annotated[float, Field(ge=0)] = 1.0
    """Their learning rate as a share of the others'."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Their weight decay, norms, biases and embeddings included; by default as for all."""


Groups = Annotated[list[Group], BeforeValidator(as_list, json_schema_input_type=Group | list[Group])]


class Optim(Block):
    """The optimizer and its learning-rate schedule. What an optimizer does not have is an error."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw8bit", "schedule_free"] = "adamw"
    """Which optimizer: `adamw` (decoupled weight decay), `adam` (L2 instead), `sgd`, `adafactor` (a second moment
    that takes no room), `lion` (signs), `muon` (orthogonal steps for hidden matrices, AdamW for embeddings, head,
    norms and biases), `adamw8bit` (moments in 8 bits), `schedule_free` (AdamW that averages instead of decaying)."""
    lr: Annotated[float, Field(gt=0)] = 6e-4
    """The peak learning rate; by default 6e-4, for `sgd` 0.1, `adafactor` 0.01 (relative to the size of the weights),
    `lion` 1e-4, `schedule_free` 2.5e-3."""
    warmup: Warmup = Amount(2, "percent")
    """How long the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine", "exponential", "polynomial", "inverse_sqrt", "wsd"] = (
        "cosine"
    )
    """What the learning rate does after warm-up: `polynomial` falls as `(1 - progress) ** power`, `inverse_sqrt` as
    `sqrt(warmup / step)`, `wsd` stays at the peak and falls over the last `decay`. With `schedule_free` it is
    `constant` by default."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The last learning rate as a share of the peak; for `inverse_sqrt` the least one."""
    decay: Ratio | None = None
    """For `wsd`: the share of the run, at its end, over which the learning rate falls; by default 0.2."""
    power: Annotated[float, Field(gt=0)] | None = None
    """For `polynomial`: its power; by default 2."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)] | None = None
    """Decay rates of the first and second moment: by default [0.9, 0.95] for `adamw`, `adamw8bit` and `muon` (its
    AdamW part), [0.9, 0.999] for `adam` and `schedule_free`, [0.9, 0.99] for `lion`."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """The term against division by zero of `adamw` and its kin, `adam` and `schedule_free`; by default 1e-8."""
    momentum: Beta | None = None
    """The share of the last direction that is kept: by default 0.9 for `sgd`, 0.95 for `muon`."""
    nesterov: bool | None = None
    """Nesterov's form of momentum: by default `false` for `sgd`, `true` for `muon`."""
    muon_lr: Annotated[float, Field(gt=0)] | None = None
    """For `muon`: the peak learning rate of the hidden matrices; by default `lr`, with `muon_scale: original` 0.02."""
    muon_scale: Literal["rms", "original"] | None = None
    """For `muon`: how steps are scaled by a matrix's shape. `rms`, the default: as large as AdamW's, so that its
    learning rate and weight decay fit; `original`: as first published."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay, in proportion to the learning rate; for `adam` and `sgd` the strength of an L2 penalty. By default
    0.1, for `lion` 0.5, for `adam`, `sgd` and `adafactor` 0. Norms, biases and embeddings are spared."""
    groups: Groups = []
    """Parameters by name that have a learning rate or weight decay of their own:
    `[{match: "embed*|lm_head", lr_ratio: 0.5, weight_decay: 0}]`."""

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, data: Any) -> Any:
        """What is not said is as the optimizer and the schedule have it."""
        return with_defaults(data) if isinstance(data, dict) else data


class Rounded(Block):
    """Learn weights that will be stored in few bits: linear layers compute with rounded ones while the model learns.

    The weights themselves stay as fine as they were, and so are those of the exported model; `compress` with
    `solver: rtn` and the same settings stores just what was computed with. The output layer and the embeddings are not
    rounded.
    """

    bits: Literal[4, 8] = 8
    """Bits of a weight."""
    group: Several | Literal["auto", "row"] = "auto"
    """Weights in a row that share a scale. `auto`: with 4 bits the largest of 128, 64 and 32 that divides all rows,
    else the whole `row`."""
    symmetric: bool = True
    """Scales without an offset."""
    float8: bool = False
    """With 8 bits: floats instead of integers."""
    activations: bool = False
    """Round what the layers read too, to 8 bits with a scale for each token."""
    keep: Words | None = None
    """Linear layers that are not rounded, by name: patterns as in `train.optim.groups`."""

    @model_validator(mode="after")
    def _of_eight_bits(self) -> Self:
        """Floats and activations are of 8 bits, and floats have no offset."""
        if self.float8 and self.bits != 8:
            raise unit_error(f"`float8` has 8 bits, and `bits` is {self.bits}", "keep one of them")
        if self.float8 and not self.symmetric:
            raise unit_error("`float8` has no offset", "leave `symmetric` out")
        if self.activations and self.bits != 8:
            raise unit_error(
                f"`activations` go with 8 bits, and `bits` is {self.bits}", "leave one of them out"
            )
        return self


class Train(Block):
    """How long, how much at once, and how the weights move."""

    length: Length
    """When training ends: `50M tokens`, `3 epochs`, `20k steps` or a time, `1h30m`."""
    batch: Batch = Amount(32 * 1024, "tokens")
    """What one optimizer step sees over all devices: `64Ki tokens` or `32 samples` (rows)."""
    optim: Optim = Optim()
    """The optimizer."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of the gradient; `null` leaves it alone."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of each target's probability that is spread over the whole vocabulary, in training only."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Adds so many times the square of each target's log-normaliser to the loss, in training only, so that logits
    do not drift; 1e-4 is common."""
    l1: Annotated[float, Field(ge=0)] = 0.0
    """The strength of an L1 penalty on what weight decay acts on."""
    gradient_noise: Annotated[float, Field(ge=0)] = 0.0
    """The standard deviation of Gaussian noise that is added to the clipped gradient of the first step; it falls
    as `(1 + step) ** -0.275`."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay, such as 0.999, which remembers about 1000
    steps. Evaluations, samples and the exported model are of the average; training goes on from the weights."""
    bad_numbers: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite: `stop` ends the run and names the rows, `skip`
    leaves the weights as they are, counts it and goes on."""
    max_skipped: Count = 10
    """With `bad_numbers: skip`: so many steps of a run at most; one more ends it."""
    keep_zeros: bool = False
    """Weights of linear layers that are zero in the model that training starts from stay zero: what pruning took out
    stays out."""
    quantized: Rounded | None = None
    """Compute with rounded weights while training, so that the model learns to bear them: `{bits: 4}`."""


class Checkpoint(Block):
    """When the run's whole state is saved, and how many of the saved states are kept."""

    every: Every = Amount(10, "percent")
    """How often: `500 steps`, `10%` of the run, `10m`, or `never` (then only at the end)."""
    keep: Annotated[Whole, Field(ge=1)] = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: Metric | None = None
    """A metric of the evaluations while training, such as `eval/loss`: the checkpoint that was best by it stays,
    whatever its age. One is saved at each evaluation that is better than all before. The evaluation at the end counts
    where `eval.rows` is `null`; else it measures other rows than those before."""
    keep_every: Every = Amount(0, "never")
    """Checkpoints at every so many steps stay for good: `5k steps` or `25%`; they are saved in any case."""


class EvalDuring(Block):
    """Evaluation on the held-out rows while training."""

    every: Every = Amount(10, "percent")
    """How often: `500 steps`, `10%` of the run, or `never` (then only at the end)."""
    rows: Count | None = 256
    """At most so many held-out rows each time; `null` takes all. The last evaluation always takes all."""


class Sampling(Block):
    """How text is drawn from the model."""

    max_new_tokens: Count = 64
    """Tokens to add to each prompt."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0 takes the likeliest token each time; higher is more varied."""
    top_k: Annotated[Whole, Field(ge=1)] | None = 50
    """Draw among the k likeliest tokens only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens that were used less likely."""


class Tuning(Train):
    """How long, how much at once, and how the weights move; the task has its own defaults."""

    length: Length = Amount(3, "epochs")
    """When training ends: `3 epochs`, `500 steps`, or a time, `20m`; by default 3 epochs, for `qa` 2, for `dpo` and
    `embed` 1."""
    batch: Batch = Amount(32, "samples")
    """What one optimizer step sees over all devices, in rows of the data: `32 samples`; by default 32, for `embed`
    64."""


class StopEarly(Block):
    """End when a metric has not become better for some evaluations; the best checkpoint is what is exported."""

    metric: Metric | None = None
    """The metric, such as `eval/accuracy`; by default that of `checkpoint.keep_best`, else the task's own."""
    patience: Count = 3
    """So many evaluations in a row without a better one end the run."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much a value must be better than the best to count."""
