"""Distillation: any objective or task, taught by a frozen model besides its own targets.

The teacher computes the same batch by the same objective; where the objective asks its criterion for a loss, that of
the student also measures how far its distribution is from the teacher's at the same targets. A task whose model says
numbers instead moves its targets towards the teacher's.

Shape suffixes: B rows, T positions, N = B*T positions in a line, C positions of one chunk, H hidden size (of the
student and of the teacher), A heads, S keys, V vocabulary.

**Source**: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2 (temperature and
its square); Gu et al., "MiniLLM", 2024, section 2 (reverse divergence); Jiao et al., "TinyBERT", 2020, section 3.1
(states, with a projection); Wang et al., "MiniLM", 2020, section 3.1 (divergence of attention).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmkit.errors import UsageError
from llmkit.models.heads import Scores
from llmkit.models.layers import attention_weights, blocks_of, listening
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Leans,
    Loss,
    Objective,
    cross_entropy,
)
from llmkit.recipe.objectives import Distil
from llmkit.registry import ModelKind

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

STATES = "num_states"
_CHUNK = 512
_EVERYWHERE: tuple[ModelKind, ...] = ("masked", "pairs", "detector", "sequence", "tokens", "answers")
"""Kinds of model whose layers are compared at all positions that are read, not only where something is learned."""


class Distilled:
    """An objective and its teacher.

    Args:
        base: What the student learns by itself.
        teacher: Of the same kind and vocabulary, frozen.
        settings: The recipe's.
        kind: What both models are: those that fill gaps are compared at every position, others where they learn.
    """

    def __init__(
        self, base: Objective, teacher: "PreTrainedModel", settings: Distil, kind: ModelKind
    ) -> None:
        self.base = base
        self._teacher = [teacher]  # in a list, for an objective is copied to loader processes without it
        self._settings = settings
        self._projections: nn.ModuleList | None = None
        self._everywhere = kind in _EVERYWHERE
        self._by_layers = bool(settings.hidden or settings.attention)
        self.sums: Sequence[str] = (*base.sums, STATES) if self._by_layers else tuple(base.sums)
        # What a task has beside the methods here is its own: how its rows are read and what is measured of them. Set
        # one by one, for a protocol that is looked for at run time is not found behind `__getattr__`.
        for name in dir(base):
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, getattr(base, name))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_teacher": [], "_projections": None}

    def encode(self, row: Any) -> Example:
        """As the base."""
        return self.base.encode(row)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """As the base; with layers to compare also `num_states`, the positions at which they are."""
        batch = self.base.collate(examples)
        if self._by_layers:
            batch[STATES] = self._compared(batch).sum()
        return batch

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """As the base: an evaluation measures the student by itself."""
        return self.base.summarise(sums)

    def parts(self, model: "PreTrainedModel") -> Mapping[str, nn.Module]:
        """The projections from the student's width to the teacher's, where states of other widths are compared.

        Raises:
            UsageError: The base trains networks beside the model, or layers cannot be compared.
        """
        if hasattr(self.base, "parts"):
            raise UsageError("an objective with two models cannot be distilled", hint="leave `distil` out")
        if not self._by_layers:
            return {}
        pairs = self._pairs(model)
        if self._settings.attention:
            _same_heads(model, self._teacher[0])
        widths = (model.config.hidden_size, self._teacher[0].config.hidden_size)
        if not self._settings.hidden or widths[0] == widths[1]:
            return {}
        self._projections = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in pairs)
        return {"projections": self._projections}

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """The base's loss and the teacher's, by the recipe's weights; in an evaluation the base's alone."""
        if not model.training:
            return self.base.loss(model, batch, criterion)
        teacher, scores = self._teacher[0], list[Scores]()

        def remember(found: Scores, targets_N: torch.Tensor) -> torch.Tensor:
            scores.append(found)
            return targets_N.new_zeros((), dtype=torch.float32)

        def compare(found: Scores, targets_N: torch.Tensor) -> torch.Tensor:
            taught = _divergence(found, scores.pop(0), targets_N, self._settings)
            return (1 - self._settings.weight) * criterion(found, targets_N) + self._settings.weight * taught

        pairs = self._pairs(model) if self._by_layers else []
        with torch.no_grad(), listening([theirs for _, theirs in pairs]) as their_states:
            # By its own mark alone the teacher is training: its layers are not, but an objective counts what an
            # evaluation reports only where the model says that it is evaluated, and here no one reads that.
            teacher.training = True
            apart = None
            if isinstance(self.base, Leans):
                batch, apart = self.base.lean(teacher, batch, self._settings.weight)
            else:
                self.base.loss(teacher, batch, remember)
            teacher.training = False
        with listening([mine for mine, _ in pairs]) as my_states:
            loss = self.base.loss(model, batch, criterion if apart is not None else compare)
        totals = dict(loss.totals)
        if apart is not None:
            totals[TARGETS] = totals[TARGETS] + apart
        if self._by_layers:
            totals[STATES] = self._distance(pairs, my_states, their_states, self._compared(batch))
        return Loss(totals, loss.sums)

    def _pairs(self, model: "PreTrainedModel") -> list[tuple[nn.Module, nn.Module]]:
        """Blocks of the student with those of the teacher that they are compared with."""
        mine, theirs = blocks_of(model), blocks_of(self._teacher[0])
        if self._settings.layers == "last":
            return [(mine[-1], theirs[-1])]
        return [
            (block, theirs[max(1, round((place + 1) * len(theirs) / len(mine))) - 1])
            for place, block in enumerate(mine)
        ]

    def _compared(self, batch: Batch) -> torch.Tensor:
        """[B, T]: at which positions layers are compared."""
        if not self._everywhere:
            return batch["targets"] != NOT_LEARNED
        mask = batch.get("attention_mask")
        return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def _distance(
        self,
        pairs: list[tuple[nn.Module, nn.Module]],
        my_states: list[torch.Tensor],
        their_states: list[torch.Tensor],
        compared_BT: torch.Tensor,
    ) -> torch.Tensor:
        """The sum over compared positions; over layers, the mean."""
        total = my_states[0].new_zeros((), dtype=torch.float32)
        for place, (mine, theirs) in enumerate(pairs):
            if self._settings.hidden:
                states_BTH = my_states[place]
                if self._projections is not None:
                    states_BTH = self._projections[place](states_BTH)
                error_BT = (states_BTH.float() - their_states[place].float()).square().mean(-1)
                total = total + self._settings.hidden * (error_BT * compared_BT).sum()
            if self._settings.attention:
                apart_BT = _apart(attention_weights(mine), attention_weights(theirs))
                total = total + self._settings.attention * (apart_BT * compared_BT).sum()
        return total / len(pairs)


def _divergence(mine: Scores, theirs: Scores, targets_N: torch.Tensor, settings: Distil) -> torch.Tensor:
    """The sum over targets of the divergence of both distributions, times the square of the temperature, in nats."""
    index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
    total = mine.features_NH.new_zeros((), dtype=torch.float32)
    for part in index.split(_CHUNK):
        # Made again in the backward pass: kept, they would take as much memory as all logits at once.
        total = total + checkpoint(_divergence_of, mine, theirs, part, settings, use_reentrant=False)
    return total


def _divergence_of(mine: Scores, theirs: Scores, index_C: torch.Tensor, settings: Distil) -> torch.Tensor:
    ours_CV = mine.logits(index_C).float()
    with torch.no_grad():
        taught_CV = theirs.logits(index_C).float()
    size = min(
        ours_CV.shape[1], taught_CV.shape[1]
    )  # beyond the vocabulary both there may be rows of padding
    ours_CV, taught_CV = (
        functional.log_softmax(logits_CV[:, :size] / settings.temperature, dim=1)
        for logits_CV in (ours_CV, taught_CV)
    )
    first_CV, second_CV = (taught_CV, ours_CV) if settings.direction == "forward" else (ours_CV, taught_CV)
    return (first_CV.exp() * (first_CV - second_CV)).sum() * settings.temperature**2


def _apart(mine_BATS: torch.Tensor, theirs_BATS: torch.Tensor) -> torch.Tensor:
    """[B, T]: the divergence of the student's attention from the teacher's, its mean over heads, in nats."""
    theirs_BATS = theirs_BATS.float()
    logs_BATS = (mine_BATS.float().clamp(min=1e-12)).log()
    apart_BATS = theirs_BATS * (theirs_BATS.clamp(min=1e-12).log() - logs_BATS)
    return apart_BATS.sum(-1).mean(1)


def _same_heads(model: "PreTrainedModel", teacher: "PreTrainedModel") -> None:
    mine, theirs = (one.config.num_attention_heads for one in (model, teacher))
    if mine != theirs:
        raise UsageError(
            f"distil.attention: the model has {mine} attention heads, the teacher {theirs}",
            hint="give the model as many, or leave `attention` out",
        )
