"""Distillation without the teacher: what it said of each target was kept on disk (`data.taught`) before training.

Of each position the teacher's K likeliest outputs are kept with their probabilities p, and what all others have
together, r. The model's probabilities q of the same outputs, and of all others together, are compared with these: the
divergence of two distributions over K + 1 events,

    sum_k p_k log(p_k / q_k) + r log(r / (1 - sum_k q_k)).

That is never more than the divergence over all outputs, for distributions are no easier to tell apart where events are
put together, and it is the same where K is all of them. Leaving r out instead, or scaling p up to 1, would teach that
what was not kept is impossible. How r is shared out is not taught.

Shape suffixes: B rows, T positions, N = B*T positions in a line, L those that are learned, C positions of one chunk, K
kept outputs, V all outputs.

**Source**: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025 (teachers
kept on disk, and why K probabilities alone are biased); Cover and Thomas, "Elements of Information Theory", 2006,
theorem 2.7.1 (the log sum inequality: the bound).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmkit.data.taught import IDS, LOGS, REST, Lines
from llmkit.models.heads import Scores
from llmkit.objectives.base import NOT_LEARNED, Batch, Criterion, Example, Loss, Objective, cross_entropy
from llmkit.recipe.objectives import Distil

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_CHUNK = 512
_KEPT = (IDS, LOGS, REST)


class Taught:
    """An objective, and what a teacher said of its targets, in the batch.

    Args:
        base: What the model learns by itself; it asks its criterion once a batch.
        settings: The recipe's.
        top_k: Outputs that are kept of each target.
        outputs: Outputs that there are: tokens of the vocabulary, or labels.
    """

    def __init__(self, base: Objective, settings: Distil, *, top_k: int, outputs: int) -> None:
        self.base = base
        self.top_k = top_k
        self.outputs = outputs
        self._settings = settings
        self.sums: Sequence[str] = tuple(base.sums)
        # As in `Distilled`: what a task has beside the methods here is its own.
        for name in dir(base):
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, getattr(base, name))

    def encode(self, row: Any) -> Example:
        """As the base."""
        return self.base.encode(row)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """As the base; with what was said of the targets, in the order in which they stand in the batch [N, K].

        Filled up to N lines, so that shapes change only where the base's do. Of rows that are not learned from, such as
        held-out ones, nothing is kept.
        """
        plain = [{name: value for name, value in one.items() if name not in _KEPT} for one in examples]
        batch = self.base.collate(plain)
        if REST in examples[0]:
            order = self._order(plain)
            for name in _KEPT:
                lines = np.concatenate([example[name] for example in examples])[order]
                spare = batch["targets"].numel() - len(lines)
                filled = np.pad(lines, [(0, spare)] + [(0, 0)] * (lines.ndim - 1))
                batch[name] = torch.from_numpy(filled)
        return batch

    def _order(self, examples: Sequence[Example]) -> Any:
        """The numbers of the targets, counted over the examples, in the order in which they stand in a batch [L]."""
        numbered, count = [], 0
        for example in examples:
            learned = example["targets"] != NOT_LEARNED
            numbers = np.full_like(example["targets"], NOT_LEARNED)
            numbers[learned] = count + np.arange(learned.sum())
            count += int(learned.sum())
            numbered.append({**example, "targets": numbers})
        found = self.base.collate(numbered)["targets"].flatten().numpy()
        return found[found != NOT_LEARNED]

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """As the base: an evaluation measures the model by itself."""
        return self.base.summarise(sums)

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """The base's loss and the teacher's, by the recipe's weights; without what it said the base's alone."""
        if not model.training or REST not in batch:
            return self.base.loss(model, batch, criterion)
        plain = {name: tensor for name, tensor in batch.items() if name not in _KEPT}
        kept, settings, outputs = (batch[IDS], batch[LOGS], batch[REST]), self._settings, self.outputs

        def compare(found: Scores, targets_N: torch.Tensor) -> torch.Tensor:
            apart = divergence_from_kept(found, targets_N, kept, settings.temperature, outputs)
            return (1 - settings.weight) * criterion(found, targets_N) + settings.weight * apart

        return self.base.loss(model, plain, compare)

    def ask(self, teacher: "PreTrainedModel", examples: Sequence[Example]) -> list[Lines]:
        """What a teacher says of each example's targets.

        Args:
            teacher: A frozen model in evaluation mode.
            examples: Of the base; computed together.
        """
        heard: list[tuple[Scores, torch.Tensor]] = []

        def remember(found: Scores, targets_N: torch.Tensor) -> torch.Tensor:
            heard.append((found, targets_N))
            return targets_N.new_zeros((), dtype=torch.float32)

        device = teacher.device
        batch = {name: tensor.to(device) for name, tensor in self.base.collate(examples).items()}
        teacher.training = (
            True  # by its own mark alone, as in `Distilled`: nothing is counted for an evaluation
        )
        self.base.loss(teacher, batch, remember)
        teacher.training = False
        ((scores, targets_N),) = heard
        said = likeliest(scores, targets_N, self.top_k, self._settings.temperature, self.outputs)
        counts = [int((example["targets"] != NOT_LEARNED).sum()) for example in examples]
        ends = np.cumsum(counts)
        in_order = said[np.argsort(self._order(examples))]
        return [in_order[end - count : end] for end, count in zip(ends.tolist(), counts, strict=True)]


@torch.no_grad()
def likeliest(scores: Scores, targets_N: torch.Tensor, top_k: int, temperature: float, outputs: int) -> Lines:
    """The likeliest outputs of each target at a temperature, and what all others have together.

    Args:
        scores: What a model says of N positions.
        targets_N: Which of them are learned.
        top_k: K; not more than there are.
        temperature: Logits are divided by it.
        outputs: V; beyond it there may be rows of padding.
    """
    index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
    found: list[tuple[torch.Tensor, ...]] = []
    for part in index.split(_CHUNK):
        logs_CV = _logs(scores, part, temperature, outputs)
        logs_CK, ids_CK = logs_CV.topk(top_k, dim=1)
        found.append((ids_CK, logs_CK, _rest(logs_CV, ids_CK)))
    if not len(index):
        none = np.zeros((0, top_k), np.float32)
        return Lines(none.astype(np.int64), none, none[:, 0])
    ids_LK, logs_LK, rest_L = (torch.cat(some).cpu().numpy() for some in zip(*found, strict=True))
    return Lines(ids_LK, logs_LK, rest_L)


def divergence_from_kept(
    scores: Scores,
    targets_N: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    temperature: float,
    outputs: int,
) -> torch.Tensor:
    """The sum over targets of the divergence from what was kept, times the square of the temperature, in nats.

    Args:
        scores: What the model says of N positions.
        targets_N: Which of them are learned.
        kept: Of the learned ones, in their order: the outputs that were kept [N, K], the logarithms of their
            probabilities at that temperature [N, K], and that of all others together [N]. What follows fills up.
        temperature: As they were kept with.
        outputs: V.
    """
    index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
    total = scores.features_NH.new_zeros((), dtype=torch.float32)
    for start in range(0, len(index), _CHUNK):
        part = index[start : start + _CHUNK]
        ids_CK, logs_CK, rest_C = (one[start : start + len(part)] for one in kept)
        # Made again in the backward pass: kept, they would take as much memory as all logits at once.
        total = total + checkpoint(
            _apart, scores, part, ids_CK, logs_CK, rest_C, temperature, outputs, use_reentrant=False
        )
    return total * temperature**2


def _apart(
    scores: Scores,
    index_C: torch.Tensor,
    ids_CK: torch.Tensor,
    logs_CK: torch.Tensor,
    rest_C: torch.Tensor,
    temperature: float,
    outputs: int,
) -> torch.Tensor:
    ours_CV = _logs(scores, index_C, temperature, outputs)
    total = (logs_CK.exp() * (logs_CK - ours_CV.gather(1, ids_CK))).sum()
    if ids_CK.shape[1] == ours_CV.shape[1]:
        return total
    # A teacher that is quite sure leaves no rest; its logarithm is then minus infinity, and counts for nothing.
    apart_C = rest_C.exp() * (rest_C.clamp(min=-1e4) - _rest(ours_CV, ids_CK).clamp(min=-1e4))
    return total + apart_C.sum()


def _logs(scores: Scores, index_C: torch.Tensor, temperature: float, outputs: int) -> torch.Tensor:
    return functional.log_softmax(scores.logits(index_C).float()[:, :outputs] / temperature, dim=1)


def _rest(logs_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    """The logarithm of what all other outputs have together [C]."""
    if ids_CK.shape[1] == logs_CV.shape[1]:
        return logs_CV.new_full((len(logs_CV),), -torch.inf)
    return logs_CV.scatter(1, ids_CK, -torch.inf).logsumexp(1)
