"""The contract of an objective: rows in, loss out. A loss is a sum and a count, never a mean; two are two of each.

Shape suffixes: B rows of a micro-batch, T positions of a row, N positions in a line, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmkit.models.heads import Scores

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

Ints = npt.NDArray[np.int64]
Example = Mapping[str, Ints]
Batch = Mapping[str, torch.Tensor]

NOT_LEARNED = -100
"""The target of a position that is not in the loss."""

TARGETS = "num_targets"
"""The count of an objective's first loss; every batch has it."""

Criterion = Callable[[Scores, torch.Tensor], torch.Tensor]
"""What a model says of N positions, and their targets (`NOT_LEARNED`: none) -> their loss as a sum in nats.

Label smoothing, a z-loss or a teacher act here, so no objective knows of them."""


def cross_entropy(scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
    """The sum of the targets' negative log-likelihood."""
    return scores.nll(targets_N)


def smoothed_cross_entropy(label_smoothing: float, z_loss: float) -> Criterion:
    """The criterion of a recipe's `label_smoothing` and `z_loss`; the plain one where both are 0."""
    if not label_smoothing and not z_loss:
        return cross_entropy
    return partial(Scores.nll, label_smoothing=label_smoothing, z_loss=z_loss)


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch.

    Attributes:
        totals: Scalar sums in nats by the name of their count in the batch, `num_targets` first. Each is divided by
            its count over the whole step, and the quotients are added: that is what training lowers.
        sums: Further scalar sums to add up over micro-batches, devices and steps, for `summarise`.
        found: In an evaluation, of an objective that `Judges`: what the model says of each row of the batch, in its
            order; small, for it is gathered from all devices.
    """

    totals: Mapping[str, torch.Tensor]
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    found: Sequence[Any] = ()

    @property
    def total(self) -> torch.Tensor:
        """All sums together."""
        return sum(self.totals.values(), torch.zeros((), device=self.totals[TARGETS].device))

    def mean(self, counts: Mapping[str, int | torch.Tensor]) -> torch.Tensor:
        """Each sum over its count, added up.

        Args:
            counts: Terms of each sum, over whatever is meant by the mean; those on a device are one at least.
        """
        means = [
            total / (count if isinstance(count := counts[name], torch.Tensor) else max(1, int(count)))
            for name, total in self.totals.items()
        ]
        return sum(means[1:], means[0])


class Objective(Protocol):
    """Four methods; no state that changes.

    Attributes:
        sums: Names of what `loss` gives besides its first total: further counts, and those of `Loss.sums`.
    """

    sums: Sequence[str]

    def encode(self, row: Any) -> Example:
        """One row of the source -> one example; numpy only, no tensors; in a thread or a process of the loader.

        A function of the row alone: chance comes from `np.random.default_rng(int(row["seed"]))`, never from a
        generator that lives on. Every example has `targets`, `NOT_LEARNED` where there is none.
        """
        ...

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Examples -> a micro-batch, with `num_targets`: how many terms its loss sum has.

        Keys that begin with `num_` are such counts, scalars that stay on the host.
        """
        ...

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """The loss of a micro-batch under `model`."""
        ...

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over a whole split -> metrics by name, without the `eval/` in front.

        Args:
            sums: `total` (that of `num_targets`), every `num_*`, and the sums of `Loss.sums`.
        """
        ...


@runtime_checkable
class HasParts(Protocol):
    """An objective that trains networks beside the model."""

    def parts(self, model: "PreTrainedModel") -> Mapping[str, nn.Module]:
        """These networks by name, made for `model`; torch's seed decides their weights. The objective keeps them."""
        ...


@runtime_checkable
class Judges(Protocol):
    """An objective whose model is judged by what it says of each row, not by sums alone."""

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Metrics by name, without the `eval/` in front.

        Args:
            rows: Labelled rows, in their order; as `encode` takes them.
            found: What `Loss.found` said of each.
        """
        ...


@runtime_checkable
class Predicts(Protocol):
    """A task whose model says something of a row that people can read."""

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model says of a row, as JSON; `found` is what `Loss.found` has of it."""
        ...


@runtime_checkable
class Expands(Protocol):
    """A task that makes several rows of one, such as windows of a long text."""

    def expand(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows that stand for this one; `encode` takes each."""
        ...


@runtime_checkable
class Relates(Protocol):
    """A task that reads a row beside others of its part."""

    def relate(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows, each with what it takes of the others, whatever their order; `expand` and `encode` come after."""
        ...


@runtime_checkable
class Counts(Protocol):
    """A task that goes by how many rows of each kind there are to learn from: `train_classes` of the facts."""

    def count(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """The rows to learn from by their kind.

        Raises:
            DataError: Nothing can be learned from these.
        """
        ...

    def told(self, counts: Mapping[str, int]) -> str:
        """What a person should know of these counts."""
        ...


@runtime_checkable
class Joins(Protocol):
    """A task that makes one finding of those of the rows that stand for a row."""

    def expand(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """As of `Expands`."""
        ...

    def join(self, found: Sequence[Any]) -> Any:
        """What is found of a row, as `predict` takes it; `found` is of each row that stands for it."""
        ...


@runtime_checkable
class Sized(Protocol):
    """An objective whose examples are more than one text each."""

    def size(self, example: Example) -> int:
        """Tokens that the model reads of an example."""
        ...


@runtime_checkable
class Stops(Protocol):
    """A task whose model learns to end what it writes by tokens of its own.

    Attributes:
        stops: Their ids.
    """

    stops: frozenset[int]


@runtime_checkable
class Prepares(Protocol):
    """A task that a model is made ready for, once, before anything is learned."""

    def prepare(self, model: "PreTrainedModel") -> None:
        """Set what is kept with the model, or leave weights alone that the task does not use.

        Raises:
            UsageError: The model cannot be used so.
        """
        ...


@runtime_checkable
class Accompanies(Protocol):
    """A task that leaves files of its own beside the exported model."""

    def accompany(self, folder: Path) -> None:
        """Write them; model and tokenizer are there already."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A task that compares each row with all others of the step, whatever its micro-batches and processes.

    A step then computes what its rows are twice: first without gradients, for `settle` to compare them all, then again
    with gradients, a micro-batch at a time, in `loss`, which finds what `settle` said of its rows in the batch.

    Attributes:
        looks_ahead: Whether it does, with its settings.
    """

    looks_ahead: bool

    def glimpse(self, model: "PreTrainedModel", batch: Batch) -> dict[str, torch.Tensor]:
        """What the comparison needs of a micro-batch; the first dimension of each tensor may be any."""
        ...

    def settle(
        self, seen: Sequence[Mapping[str, torch.Tensor]], criterion: Criterion
    ) -> list[dict[str, torch.Tensor]]:
        """Compare all micro-batches of a step, of all processes; what to add to the batch of each of them."""
        ...


@runtime_checkable
class Lines(Protocol):
    """A task whose examples can stand behind each other in a line, and that collates such lines as they are."""

    def line(self, examples: Sequence[Example], width: int) -> Example:
        """The examples, none or some, in one line of `width` tokens: an example itself.

        What is left of the line is filled up as one more example, of which nothing is learned.
        """
        ...


@runtime_checkable
class Extends(Protocol):
    """A task whose examples become several rows of a batch, so that their arrays do not say how long those are."""

    def extents(self, example: Example) -> Mapping[str, int]:
        """How long each part of it is, and as `num_...` how many rows."""
        ...


@runtime_checkable
class Refers(Protocol):
    """A task that compares the model with what it was when training began.

    Attributes:
        needs_reference: Whether it does, with its settings.
    """

    needs_reference: bool

    def refer(self, reference: "PreTrainedModel") -> None:
        """Take that model, frozen; one that learns an adapter is asked without it where nobody calls this."""
        ...


@runtime_checkable
class Leans(Protocol):
    """A task without probabilities, whose targets can be moved towards what a teacher says."""

    def lean(self, teacher: "PreTrainedModel", batch: Batch, weight: float) -> tuple[Batch, torch.Tensor]:
        """The batch with its targets moved, and what the task's loss of it lacks of that of both targets.

        Args:
            teacher: A frozen model for the same task.
            batch: Of the task.
            weight: The teacher's share of the loss.
        """
        ...


@runtime_checkable
class Shows(Protocol):
    """A task whose examples are not `input_ids` with the targets at the same places."""

    def texts(self, example: Example) -> dict[str, tuple[Ints, Ints]]:
        """What the model reads or writes, by name: ids, and at each token's own place what is learned there."""
        ...


def size_of(objective: "Objective", example: Example) -> int:
    """Tokens that the model reads of an example: its `input_ids`, unless the objective counts otherwise."""
    return objective.size(example) if isinstance(objective, Sized) else len(example["input_ids"])


@dataclass(frozen=True)
class Material:
    """What a task is made of, besides its settings.

    Attributes:
        tokenizer: The model's, from `load_tokenizer`.
        max_length: Tokens that the model reads at most; what is longer is cut.
        labels: Names of classes or tags, in the order of their numbers; empty where there are none.
        language: The recipe's.
        facts: What is known of the rows: their form, counts.
    """

    tokenizer: Any
    max_length: int
    labels: tuple[str, ...] = ()
    language: str = "en"
    facts: Mapping[str, Any] = field(default_factory=dict)


class LossModule(nn.Module):
    """A model and its objective as one module, so that what wraps modules (DDP, compile) wraps the loss too.

    Args:
        model: The network that is exported.
        objective: What it learns.
        bf16: Compute matrix products in bfloat16; weights and the loss stay in float32.
        criterion: What is made of scores and targets while training; an evaluation takes the plain cross-entropy.
        parts: Networks that are trained and saved beside the model, by name; the objective holds them too.
        frozen: Networks that the objective asks and that never change.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        objective: Objective,
        *,
        bf16: bool,
        criterion: Criterion = cross_entropy,
        parts: Mapping[str, nn.Module] | None = None,
        frozen: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.parts = nn.ModuleDict(dict(parts or {}))
        self.frozen = nn.ModuleDict(dict(frozen or {})).requires_grad_(False)
        self.objective = objective
        self.criterion = criterion
        self.bf16 = bf16

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch; see `Objective.loss`."""
        device = batch["targets"].device.type
        criterion = self.criterion if self.training else cross_entropy
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            return self.objective.loss(self.model, batch, criterion)

    def train(self, mode: bool = True) -> "LossModule":
        """Training or evaluation mode; what is frozen stays in the latter."""
        super().train(mode)
        self.frozen.eval()
        return self

    @property
    def trained(self) -> nn.Module:
        """What optimizer and checkpoints hold: the model, and where there are parts, these beside it."""
        if not self.parts:
            return self.model
        return nn.ModuleDict({"model": self.model, **dict(self.parts.items())})


def token_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Loss in nats per target, its perplexity, and the share of targets that were the likeliest token, if counted."""
    loss = sums["total"] / sums[TARGETS]
    metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if "correct" in sums:
        metrics["accuracy"] = sums["correct"] / sums[TARGETS]
    return {**metrics, TARGETS: sums[TARGETS]}


def padded(examples: Sequence[Example], fills: Mapping[str, int], width: int = 0) -> dict[str, torch.Tensor]:
    """Stack arrays of the same name to [B, T], filled up on the right to the longest.

    Args:
        examples: Those that have the names.
        fills: Name -> what to fill up with. A name that the examples do not have is left out.
        width: T at least: the same for every batch where shapes must not change.
    """
    names = [name for name in fills if name in examples[0]]
    longest = max(width, *(len(example[name]) for example in examples for name in names))
    return {
        name: torch.from_numpy(np.stack([_widened(e[name], longest, fills[name]) for e in examples]))
        for name in names
    }


def _widened(array_T: npt.NDArray[np.int64], width: int, fill: int) -> npt.NDArray[np.int64]:
    missing = width - len(array_T)
    return np.pad(array_T, (0, missing), constant_values=fill) if missing else array_T
