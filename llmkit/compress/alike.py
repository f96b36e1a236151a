"""How alike two models are that should say the same: on inputs that the exporter's model saw, position by position.

Shape suffixes: B rows, T positions, N places that are compared, C what a model says of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.compress.given import Given
from llmkit.compress.torch_export import OUTPUTS
from llmkit.models.build import max_length
from llmkit.models.heads import choose_heads
from llmkit.objectives.base import TARGETS, Batch, LossModule
from llmkit.registry import ModelKind

Inputs = Mapping[str, torch.Tensor]

_MOST_BATCHES = 2
_MOST_ROWS = 4
_MOST_LENGTH = 256
_AT_ONCE = 256
_MADE_UP_LENGTH = 32
_STEP_ID = 7919
_CHOOSES: tuple[ModelKind, ...] = ("causal", "masked", "seq2seq", "sequence", "tokens", "answers")
_SCORED: tuple[ModelKind, ...] = ("causal", "masked", "sequence", "tokens", "answers")
"""Kinds whose loss needs nothing of a model but that it is called."""


@dataclass(frozen=True)
class Alike:
    """What came of a comparison.

    Attributes:
        places: How many places were compared.
        largest: The largest difference of any number that the models give.
        scale: The largest number that the first gives.
        relative: The root of the mean squared difference, over the spread of what the first says of a place.
        kl: The mean divergence of the second's probabilities from the first's, in nats; None: they give none.
        same: The share of places of which both find the same likeliest; None likewise.
    """

    places: int
    largest: float
    scale: float
    relative: float
    kl: float | None
    same: float | None

    def to_dict(self) -> dict[str, Any]:
        """As facts of an artefact."""
        found = {
            "places": self.places,
            "largest_difference": self.largest,
            "relative_difference": self.relative,
        }
        more = {"kl": self.kl, "same_choice": self.same}
        return found | {name: value for name, value in more.items() if value is not None}


def probes_of(given: Given, kind: ModelKind) -> list[dict[str, torch.Tensor]]:
    """Inputs [B, T] to compare models on: of what the model learned from, or made up where there is nothing.

    The last has other sizes than all before it.

    Args:
        given: The model, and its batches.
        kind: What it does.
    """
    size = int(given.model.get_input_embeddings().weight.shape[0])
    longest = min(_MOST_LENGTH, max_length(given.model.config) or _MOST_LENGTH)
    found = [one for one in map(_inputs_of, given.batches) if one is not None][:_MOST_BATCHES]
    if not found:
        length = min(_MADE_UP_LENGTH, longest)
        ids_BT = ((torch.arange(2 * length) * _STEP_ID + 1) % size).view(2, length)
        found = [{"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}]
    found = [{name: value[:_MOST_ROWS, :longest] for name, value in one.items()} for one in found]
    if kind == "seq2seq":
        found = [{**one, "decoder_input_ids": one["input_ids"][:, : max(2, longest // 2)]} for one in found]
    half = max(1, found[0]["input_ids"].shape[1] // 2)
    return [*found, {name: value[:1, :half] for name, value in found[0].items()}]


def _inputs_of(batch: Batch) -> dict[str, torch.Tensor] | None:
    """What a model reads of a batch; None where that is not said in the usual words."""
    if "input_ids" in batch:
        ids_BT, mask_BT = batch["input_ids"], batch.get("attention_mask")
    elif "anchor_ids" in batch:
        ids_BT, mask_BT = batch["anchor_ids"], batch.get("anchor_mask")
    else:
        return None
    if ids_BT.ndim != 2 or ids_BT.shape[1] < 2:
        return None
    if mask_BT is None or mask_BT.shape != ids_BT.shape:
        mask_BT = torch.ones_like(ids_BT)
    found = {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
    if "token_type_ids" in batch:
        found["token_type_ids"] = batch["token_type_ids"]
    return found


@torch.no_grad()
def compare(model: nn.Module, other: nn.Module, probes: Sequence[Inputs], kind: ModelKind) -> Alike:
    """How a second model's answers differ from a first's.

    Args:
        model: The first.
        other: The second.
        probes: Inputs.
        kind: What both do.
    """
    sums = _Sums()
    for inputs in probes:
        first, second = model(**inputs), other(**inputs)
        for name in OUTPUTS[kind]:
            ours_NC = _places(first[name].float(), inputs, kind)
            theirs_NC = _places(second[name].float(), inputs, kind)
            for ours, theirs in zip(ours_NC.split(_AT_ONCE), theirs_NC.split(_AT_ONCE), strict=True):
                sums.add(ours, theirs)
    chooses = kind in _CHOOSES and sums.choices > 1
    return Alike(
        sums.places,
        sums.largest,
        sums.scale,
        (sums.squares / max(sums.spread, 1e-30)) ** 0.5,
        max(0.0, sums.kl / sums.places) if chooses else None,
        sums.same / sums.places if chooses else None,
    )


@dataclass
class _Sums:
    """What adds up over places."""

    places: int = 0
    choices: int = 0
    largest: float = 0.0
    scale: float = 0.0
    squares: float = 0.0
    spread: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, ours_NC: torch.Tensor, theirs_NC: torch.Tensor) -> None:
        """Some more places."""
        gap_NC = (theirs_NC - ours_NC).nan_to_num(nan=torch.inf)
        self.choices = ours_NC.shape[1]
        self.places += len(ours_NC)
        self.largest = max(self.largest, float(gap_NC.abs().max()))
        self.scale = max(self.scale, float(ours_NC.abs().max()))
        self.squares += float(gap_NC.square().sum(dtype=torch.float64))
        centre = ours_NC.mean(1, keepdim=True) if self.choices > 1 else 0.0
        self.spread += float((ours_NC - centre).square().sum(dtype=torch.float64))
        ours_NC, theirs_NC = ours_NC.log_softmax(1), theirs_NC.log_softmax(1)
        self.kl += float((ours_NC.exp() * (ours_NC - theirs_NC)).sum(dtype=torch.float64))
        self.same += int((ours_NC.argmax(1) == theirs_NC.argmax(1)).sum())


def _places(value: torch.Tensor, inputs: Inputs, kind: ModelKind) -> torch.Tensor:
    """[N, C]: what is said of each place that is no filling."""
    if kind == "seq2seq":
        return value.flatten(0, 1)
    is_read_BT = inputs["attention_mask"].bool()
    if value.shape[:2] != is_read_BT.shape:
        return value
    if value.ndim == 2:  # one number for each place of a row: where an answer is
        return value.masked_fill(~is_read_BT, 0.0)
    return value[is_read_BT]


@torch.no_grad()
def loss_of(core: LossModule, model: Any, kind: ModelKind, batches: Sequence[Batch]) -> float | None:
    """The mean loss that a model has of what was learned; None where it cannot be had of an exported model.

    Args:
        core: Knows what was learned.
        model: Whose loss.
        kind: What it does.
        batches: What was learned from; packed ones are left out.
    """
    usable = [batch for batch in batches[:_MOST_BATCHES] if "position_ids" not in batch]
    if kind not in _SCORED or not usable:
        return None
    if not isinstance(model, PreTrainedModel):
        choose_heads(model, kind)
    total, targets = 0.0, 0
    for batch in usable:
        total += float(core.objective.loss(model, batch).totals[TARGETS])
        targets += int(batch[TARGETS])
    return total / max(1, targets)
