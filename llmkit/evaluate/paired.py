"""Two models side by side, target by target: how much likelier one finds each, and where they agree.

Both see the same micro-batches, so the noise of the data is in both and falls out of their difference: one of a
thousandth of a nat can be told from chance where two losses beside each other say nothing. Targets of a row depend on
each other, so the error is that of rows, not of targets.

Shape suffixes: N positions in a line, C targets of one chunk, V vocabulary or classes, R rows, D dimensions.

**Source**: Cochran, "Sampling Techniques", 1977, sections 2.11 and 9A.7 (the error of a ratio of sums over clusters of
unequal size); Kullback and Leibler, "On Information and Sufficiency", 1951, section 2.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from llmkit.models.heads import Scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    Batch,
    Criterion,
    HasParts,
    Leans,
    LooksAhead,
    Loss,
    LossModule,
)

Floats = npt.NDArray[np.float64]
_NUMBERS_AT_ONCE = 2**23
"""Logits of each model that are held at a time."""


@dataclass(frozen=True)
class Paired:
    """What two models say of the same targets. What does not belong to their objective is None.

    Attributes:
        num_targets: Targets, or what else was compared: vectors, numbers.
        num_rows: The rows that they are of.
        nll_difference: The other's mean -log p(target) less the reference's, in nats.
        error: Its standard error.
        kl: The mean over targets of KL(reference || other), in nats.
        agreement: The share of targets of which both find the same token or class the likeliest.
        cosine: The mean cosine of both models' vectors of a text.
        correlation: Pearson's, of the numbers that both say.
        mean_absolute: The mean absolute difference of these numbers.
        why: Why nothing was compared.
    """

    num_targets: int = 0
    num_rows: int = 0
    nll_difference: float | None = None
    error: float | None = None
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    correlation: float | None = None
    mean_absolute: float | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: only what there is."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def compare_targets(reference: LossModule, other: LossModule, batches: Iterable[Batch]) -> Paired:
    """Compare two models of the same objective and vocabulary.

    Logits are made in chunks and for targets only.

    Args:
        reference: The one that the other is measured by.
        other: The one that is judged.
        batches: Micro-batches, as the objective's `collate` made them.
    """
    objective = reference.objective
    with _evaluating(reference), _evaluating(other), torch.inference_mode():
        if isinstance(objective, HasParts):
            return Paired(why="what is learned is judged by a network beside the model")
        if isinstance(objective, LooksAhead):
            return _vectors(reference, other, batches)
        if isinstance(objective, Leans):
            return _numbers(reference, other, batches)
        return _targets(reference, other, batches)


# --- objectives with probabilities


@dataclass
class _Sums:
    """What is added up over chunks."""

    difference_R: list[Floats] = field(default_factory=list)
    targets_R: list[Floats] = field(default_factory=list)
    kl: float = 0.0
    agreed: int = 0

    def paired(self) -> Paired:
        difference_R, targets_R = (np.concatenate(column) for column in (self.difference_R, self.targets_R))
        difference_R, targets_R = difference_R[targets_R > 0], targets_R[targets_R > 0]
        total, num_rows = float(targets_R.sum()), len(targets_R)
        mean = float(difference_R.sum()) / total
        error = None
        if num_rows > 1:
            spread = float(np.square(difference_R - mean * targets_R).sum())
            error = math.sqrt(spread * num_rows / (num_rows - 1)) / total
        return Paired(round(total), num_rows, mean, error, self.kl / total, self.agreed / total)


def _targets(reference: LossModule, other: LossModule, batches: Iterable[Batch]) -> Paired:
    sums = _Sums()
    for batch in batches:
        pairs = list(zip(_asked(reference, batch), _asked(other, batch), strict=True))
        rows = _rows_of(batch, [len(targets_N) for (_, targets_N), _ in pairs])
        num_rows = 1 + max((int(row_N.max()) for row_N in rows if len(row_N)), default=0)
        difference_R, targets_R = np.zeros(num_rows), np.zeros(num_rows)
        for ((theirs, targets_N), (mine, same_N)), row_N in zip(pairs, rows, strict=True):
            if not torch.equal(targets_N.cpu(), same_N.cpu()):
                return Paired(why="the objective draws other targets for each model")
            _add(sums, theirs, mine, targets_N, row_N, difference_R, targets_R)
        sums.difference_R.append(difference_R)
        sums.targets_R.append(targets_R)
    if not sum(float(some.sum()) for some in sums.targets_R):
        return Paired(why="there is no target whose probability the objective asks for")
    return sums.paired()


def _add(
    sums: _Sums,
    theirs: Scores,
    mine: Scores,
    targets_N: torch.Tensor,
    row_N: npt.NDArray[np.int64],
    difference_R: Floats,
    targets_R: Floats,
) -> None:
    """Add what one call of the criterion brings; the last two are changed."""
    index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
    size = theirs.features_NH.shape[1] if theirs.weight_VH is None else len(theirs.weight_VH)
    for part in index.split(max(1, _NUMBERS_AT_ONCE // size)):
        learned_C = targets_N[part]
        theirs_CV = theirs.logits(part).float()
        mine_CV = mine.logits(part.to(mine.features_NH.device)).float().to(theirs_CV.device)
        lower_C = functional.cross_entropy(theirs_CV, learned_C, reduction="none")
        upper_C = functional.cross_entropy(mine_CV, learned_C, reduction="none")
        difference_C = (upper_C.double() - lower_C.double()).cpu().numpy()
        row_C = row_N[part.cpu().numpy()]
        difference_R += np.bincount(row_C, weights=difference_C, minlength=len(difference_R))
        targets_R += np.bincount(row_C, minlength=len(targets_R))
        sums.agreed += int((theirs_CV.argmax(1) == mine_CV.argmax(1)).sum())
        sums.kl += float(_divergence(theirs_CV, mine_CV).double().sum())


def _divergence(theirs_CV: torch.Tensor, mine_CV: torch.Tensor) -> torch.Tensor:
    """KL(theirs || mine) of each target [C], in nats; what the first excludes adds nothing."""
    size = min(
        theirs_CV.shape[1], mine_CV.shape[1]
    )  # beyond the vocabulary both there may be rows of padding
    first_CV = functional.log_softmax(theirs_CV[:, :size], dim=1)
    second_CV = functional.log_softmax(mine_CV[:, :size], dim=1)
    apart_CV = (first_CV - second_CV).masked_fill(first_CV == -torch.inf, 0.0)
    return (first_CV.exp() * apart_CV).sum(1).clamp(min=0.0)


def _asked(core: LossModule, batch: Batch) -> list[tuple[Scores, torch.Tensor]]:
    """What the objective asks its criterion of a batch."""
    found: list[tuple[Scores, torch.Tensor]] = []

    def keep(scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
        found.append((scores, targets_N))
        return targets_N.new_zeros((), dtype=torch.float32)

    _loss(core, batch, keep)
    return found


def _rows_of(batch: Batch, sizes: list[int]) -> list[npt.NDArray[np.int64]]:
    """The row of each position, for each call of the criterion: packed rows begin where positions begin anew."""
    targets, positions = batch["targets"], batch.get("position_ids")
    num_rows = len(targets)
    if all(size == 1 for size in sizes) and len(sizes) % num_rows == 0:  # asked row by row
        return [np.array([number % num_rows]) for number in range(len(sizes))]
    found = []
    for size in sizes:
        if positions is not None and positions.numel() == size:
            begins = (positions == 0).cpu()
            begins[:, 0] = True
            found.append(begins.flatten().cumsum(0).numpy() - 1)
        elif size % num_rows == 0:
            found.append(np.arange(size) // max(1, size // num_rows))
        else:
            found.append(np.zeros(size, np.int64))
    return found


# --- objectives without


def _vectors(reference: LossModule, other: LossModule, batches: Iterable[Batch]) -> Paired:
    """Of texts as vectors: the cosine of both models' vectors."""
    cosines, num_rows = [], 0
    for batch in batches:
        theirs, mine = (_glimpse(core, batch) for core in (reference, other))
        for side in ("anchor", "document"):
            if side not in theirs:
                continue
            if theirs[side].shape != mine[side].shape:
                return Paired(why="the models' vectors have other widths, so they cannot be compared")
            cosines.append(functional.cosine_similarity(theirs[side].cpu(), mine[side].cpu()).double())
        num_rows += len(batch["targets"])
    if not cosines:
        return Paired(why="there is nothing to compare on")
    all_of_them = torch.cat(cosines)
    return Paired(len(all_of_them), num_rows, cosine=float(all_of_them.mean()))


def _glimpse(core: LossModule, batch: Batch) -> Mapping[str, torch.Tensor]:
    placed = _placed(core, batch)
    with _computing(core):
        found: Mapping[str, torch.Tensor] = core.objective.glimpse(core.model, placed)  # type: ignore[attr-defined]
    return {name: tensor.float() for name, tensor in found.items()}


def _numbers(reference: LossModule, other: LossModule, batches: Iterable[Batch]) -> Paired:
    """Of numbers: how they go together, and how far they are apart."""
    theirs: list[float] = []
    mine: list[float] = []
    for batch in batches:
        for core, found in ((reference, theirs), (other, mine)):
            found.extend(float(value) for value in _loss(core, batch, _nothing).found)
    if not theirs:
        return Paired(why="there is nothing to compare on")
    first_R, second_R = np.array(theirs), np.array(mine)
    varied = len(theirs) > 1 and np.ptp(first_R) > 0 and np.ptp(second_R) > 0
    correlation = float(np.corrcoef(first_R, second_R)[0, 1]) if varied else None
    apart = float(np.abs(first_R - second_R).mean())
    return Paired(len(theirs), len(theirs), correlation=correlation, mean_absolute=apart)


def _nothing(scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
    return targets_N.new_zeros((), dtype=torch.float32)


# --- models


def _loss(core: LossModule, batch: Batch, criterion: Criterion) -> Loss:
    placed, model = _placed(core, batch), core.model
    with _computing(core):
        # By its own mark alone an encoder-decoder is training, none of its layers is: an evaluation would have it write
        # a text to each row, and here no one reads that.
        model.training = bool(getattr(model.config, "is_encoder_decoder", False))
        try:
            return core.objective.loss(model, placed, criterion)
        finally:
            model.training = False


def _placed(core: LossModule, batch: Batch) -> Batch:
    return {
        name: tensor if name.startswith("num_") else tensor.to(core.model.device)
        for name, tensor in batch.items()
    }


def _computing(core: LossModule) -> torch.autocast:
    return torch.autocast(core.model.device.type, dtype=torch.bfloat16, enabled=core.bf16)


@contextmanager
def _evaluating(core: LossModule) -> Iterator[None]:
    training = core.training
    core.eval()
    try:
        yield
    finally:
        core.train(training)
