"""Preferences: of two answers to a prompt, the chosen one is to become likelier than the rejected one.

Shape suffixes: B pairs, T positions, N positions in a line. A batch has 2B rows: the chosen ones, then the rejected.

**Source**: DPO: Rafailov et al., "Direct Preference Optimization", 2023, equation 7; label smoothing: Mitchell, "A note
on DPO with noisy preferences", 2023; IPO: Azar et al., "A General Theoretical Paradigm to Understand Learning from
Human Preferences", 2023, equation 17, per token; ORPO: Hong et al., "ORPO: Monolithic Preference Optimization
without Reference Model", 2024, equations 4 to 7; SimPO: Meng et al., "SimPO: Simple Preference Optimization with a
Reference-Free Reward", 2024, equation 6.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from llmkit.data.chat import padding_id, unshifted
from llmkit.objectives.answers import log_probs_at_first, sequence_log_probs
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Ints,
    Loss,
    Material,
    cross_entropy,
    padded,
)
from llmkit.objectives.detail import Detail, worst_first
from llmkit.objectives.kto import Kto
from llmkit.objectives.pairs import Pairs
from llmkit.objectives.texts import CUT
from llmkit.recipe.schema import Finetune
from llmkit.recipe.tasks import Preferences

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

ANSWERS = "num_answer_tokens"
"""The count of the second loss of `orpo`: tokens of chosen answers."""
SIDES = ("chosen", "rejected")


def build(section: Finetune, material: Material) -> "Dpo | Kto":
    """The task as the recipe wants it; see `kto` for the loss that needs no pairs.

    Raises:
        UsageError: The chat template ends no turn, or does not allow what is to be learned.
    """
    pairs = Pairs(material.tokenizer, material.max_length)
    if section.dpo.loss == "kto":
        return Kto(pairs, padding_id(material.tokenizer), section.dpo, material.facts)
    return Dpo(pairs, padding_id(material.tokenizer), section.dpo)


class Dpo:
    """The mean over pairs of a loss of how much likelier the chosen answer is than the rejected one."""

    def __init__(self, pairs: Pairs, pad_id: int, settings: Preferences) -> None:
        self._pairs = pairs
        self._fills = {"input_ids": pad_id, "targets": NOT_LEARNED}
        self._settings = settings
        self._beta = settings.beta_or_default
        self._reference: list[PreTrainedModel] = []  # an objective is copied to loader processes without it
        self.needs_reference = settings.needs_reference
        self.stops: frozenset[int] = pairs.stops
        more = (ANSWERS, "nll") if settings.loss == "orpo" else ()
        self.sums = (*more, "correct", "margin", "chosen", "rejected")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reference": []}

    def refer(self, reference: "PreTrainedModel") -> None:
        """Take the model as it was when training began; see `Refers`."""
        self._reference = [reference]

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Of each side `ids_...` and `targets_...` [T]; and `cut`.

        Args:
            row: `prompt`, `chosen` and `rejected`, each some messages.

        Raises:
            DataError: The row is of another form, or its answers cannot be learned by this template.
        """
        chosen, rejected, cut = self._pairs.encode(row)
        example = {CUT: np.asarray(cut)}
        for side, (ids, targets) in zip(SIDES, (chosen, rejected), strict=True):
            example |= {f"ids_{side}": ids, f"targets_{side}": targets}
        return example

    def size(self, example: Example) -> int:
        """Tokens of both, the shorter filled up to the longer."""
        return 2 * max(len(example[f"ids_{side}"]) for side in SIDES)

    def texts(self, example: Example) -> dict[str, tuple[Ints, Ints]]:
        """Both sides; see `Shows`."""
        return {side: unshifted(example[f"ids_{side}"], example[f"targets_{side}"]) for side in SIDES}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to [2B, T]: `input_ids` and `targets`. A pair of which one answer was cut off entirely counts as none.

        `num_targets` are the pairs.
        """
        rows = [
            {"input_ids": example[f"ids_{side}"], "targets": example[f"targets_{side}"]}
            for side in SIDES
            for example in examples
        ]
        batch = padded(rows, self._fills)
        counted_B = _counted(batch["targets"])
        batch[TARGETS] = counted_B.sum()
        if ANSWERS in self.sums:
            batch[ANSWERS] = (batch["targets"][: len(examples)] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the pairs' losses; with `orpo` also of the chosen answers' negative log-likelihood.

        The criterion is not asked: none of these losses is a cross-entropy of tokens.
        """
        targets = batch["targets"]
        lengths, counted_B = (targets != NOT_LEARNED).sum(1), _counted(targets)
        asked = log_probs_at_first(self._reference, model, batch) if self.needs_reference else None
        log_probs = sequence_log_probs(model, batch)
        chosen_B, rejected_B = self._rewards(log_probs, asked, lengths).chunk(2)
        difference_B = (chosen_B - rejected_B)[counted_B]
        totals = {TARGETS: self._losses(difference_B).sum()}
        nll = -log_probs.chunk(2)[0].sum()
        if self._settings.loss == "orpo":
            totals = {TARGETS: self._beta * totals[TARGETS], ANSWERS: nll}
        if model.training:
            return Loss(totals)
        found = [chosen_B, rejected_B, counted_B, self._losses(chosen_B - rejected_B)]
        if self._settings.loss == "orpo":
            found[3] = self._beta * found[3]
            found += [-log_probs.chunk(2)[0], lengths.chunk(2)[0]]
        each = torch.stack([column.double().cpu() for column in found], dim=1).tolist()
        return Loss(totals, self._sums(chosen_B, rejected_B, counted_B, nll), each)

    def _rewards(
        self, log_probs: torch.Tensor, asked: torch.Tensor | None, lengths: torch.Tensor
    ) -> torch.Tensor:
        """What each answer is worth [2B], as its loss compares them."""
        mean = log_probs / lengths.clamp(min=1)
        if self._settings.loss == "orpo":  # log odds of the mean probability of a token
            return mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-7))
        if asked is None:
            return self._beta * mean
        if self._settings.loss == "ipo":
            return mean - asked / lengths.clamp(min=1)
        return self._beta * (log_probs - asked)

    def _losses(self, difference_B: torch.Tensor) -> torch.Tensor:
        if self._settings.loss == "ipo":
            return (difference_B - 1 / (2 * self._beta)).square()
        if self._settings.loss == "orpo":
            return -functional.logsigmoid(difference_B)
        if self._settings.loss == "simpo":
            difference_B = difference_B - self._settings.margin_or_default
        share = self._settings.label_smoothing
        return (share - 1) * functional.logsigmoid(difference_B) - share * functional.logsigmoid(
            -difference_B
        )

    def _sums(
        self, chosen_B: torch.Tensor, rejected_B: torch.Tensor, counted_B: torch.Tensor, nll: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        difference_B = torch.where(counted_B, chosen_B - rejected_B, 0)
        ties = (difference_B == 0) & counted_B
        sums = {
            "correct": (difference_B > 0).sum() + 0.5 * ties.sum(),
            "margin": difference_B.sum(),
            "chosen": chosen_B[counted_B].sum(),
            "rejected": rejected_B[counted_B].sum(),
        }
        return {**sums, "nll": nll} if self._settings.loss == "orpo" else sums

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """The pairs whose rejected answer is worth most above the chosen one."""
        found_NK = np.array(found, dtype=np.float64)
        known_N = np.flatnonzero(found_NK[:, 2])
        found_NK = found_NK[known_N]
        margins = (found_NK[:, 0] - found_NK[:, 1]).tolist()
        owner = np.full(len(rows), -1)
        owner[known_N] = np.arange(len(known_N))
        lines = []
        for number, margin in zip(known_N.tolist(), margins, strict=True):
            row = rows[number]
            answers = {side: row[side][-1].get("content") for side in SIDES if side in row}
            said = answers.get("chosen" if margin > 0 else "rejected")
            line = {"input": row["prompt"], "target": answers.get("chosen"), "prediction": said}
            lines.append({**line, "score": margin, "rejected": answers.get("rejected")})
        return Detail(
            keys=[rows[number]["place"] for number in known_N.tolist()],
            owner=owner.tolist(),
            figures=lambda items: _figures(found_NK[items]),
            lines=lines,
            errors=worst_first([-margin for margin in margins], [margin <= 0 for margin in margins]),
            right=[margin > 0 for margin in margins],
        )

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss a pair; the share of pairs in which the chosen answer is worth more; by how much; what each is."""
        pairs = sums[TARGETS]
        metrics = {"loss": sums["total"] / pairs, "accuracy": sums["correct"] / pairs}
        metrics |= {name: sums[name] / pairs for name in ("margin", "chosen", "rejected")}
        if sums.get(ANSWERS):
            metrics["chosen_loss"] = sums["nll"] / sums[ANSWERS]
            metrics["loss"] += metrics["chosen_loss"]
        return {**metrics, TARGETS: pairs}


def _figures(found_NK: npt.NDArray[np.float64]) -> dict[str, float]:
    """As `Dpo.summarise`, from what was found of pairs of which both answers have something to learn."""
    if not len(found_NK):
        return {}
    chosen, rejected = found_NK[:, 0], found_NK[:, 1]
    loss = float(found_NK[:, 3].mean())
    figures = {
        "accuracy": float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean()),
        "margin": float((chosen - rejected).mean()),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
    }
    if found_NK.shape[1] > 4:
        figures["chosen_loss"] = float(found_NK[:, 4].sum() / found_NK[:, 5].sum())
        loss += figures["chosen_loss"]
    return {"loss": loss, **figures}


def _counted(targets: torch.Tensor) -> torch.Tensor:
    """[B]: the pairs of which both answers have something to learn."""
    chosen, rejected = (targets != NOT_LEARNED).any(1).chunk(2)
    return chosen & rejected
