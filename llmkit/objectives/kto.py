"""Answers that are good or bad, each by itself: good ones are to become likelier than they were, bad ones less so.

How much likelier is judged from a reference point: how far the model has gone from what it was at first, as seen in
answers to other prompts. It is one number for the whole step, without gradient. So that it is the same whatever the
micro-batches and the number of processes, each row carries an answer to another prompt (`relate`), of all rows of the
part and not of those that happen to share its batch, and the step looks at all of these before its gradients.

Shape suffixes: B rows of a batch, N rows, I items (prompts), T positions, S positions of the other answer.

**Source**: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024: the loss is equation 8,
the reference point and the weights are of section 4.2.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.data.chat import unshifted
from llmkit.data.split import document_hash
from llmkit.errors import DataError
from llmkit.objectives.answers import log_probs_at_first, sequence_log_probs, without_dropout
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Ints,
    Loss,
    cross_entropy,
    padded,
)
from llmkit.objectives.detail import Detail
from llmkit.objectives.judged import Judged
from llmkit.objectives.pairs import Pairs
from llmkit.objectives.texts import CUT
from llmkit.recipe.tasks import Preferences

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

GOOD, BAD = "good", "bad"
_KL = "settled_kl"
_OWN, _OTHER = ("input_ids", "targets"), ("other_ids", "other_targets")
Row = dict[str, Any]


class Kto:
    """The mean over answers of their weight times 1 - sigmoid(+-(reward - beta * KL))."""

    sums = ()
    looks_ahead = True
    needs_reference = True

    def __init__(self, pairs: Pairs, pad_id: int, settings: Preferences, facts: Mapping[str, Any]) -> None:
        self._pairs = pairs
        self._fills = {"ids": pad_id, "targets": NOT_LEARNED}
        self._settings = settings
        self._beta = settings.beta_or_default
        self._facts = facts
        self._reference: list[PreTrainedModel] = []  # an objective is copied to loader processes without it
        self.stops: frozenset[int] = pairs.stops

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reference": []}

    def refer(self, reference: "PreTrainedModel") -> None:
        """Take the model as it was when training began; see `Refers`."""
        self._reference = [reference]

    # --- rows ------------------------------------------------------------------------------------------------

    def relate(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The rows, each with `others`: for each of its answers one to another prompt; none where all ask the same.

        Prompts stand in a ring by their hash, and each takes from the next one: this depends on no order of the rows.
        """
        keys = [document_hash(json.dumps(row["prompt"], sort_keys=True)) for row in rows]
        inner = [document_hash(json.dumps(_answers(row), sort_keys=True)) for row in rows]
        ordered = sorted(range(len(rows)), key=lambda number: (keys[number], inner[number]))
        ring = [list(group) for _, group in groupby(ordered, key=keys.__getitem__)]
        made = [dict(row) for row in rows]
        for place, group in enumerate(ring if len(ring) > 1 else ()):
            after = ring[(place + 1) % len(ring)]
            for turn, number in enumerate(group):
                theirs = _answers(rows[after[turn % len(after)]])
                mine = range(len(_answers(rows[number])))
                made[number]["others"] = [theirs[which % len(theirs)] for which in mine]
        return made

    def expand(self, row: Mapping[str, Any]) -> list[Row]:
        """The answers of a row, each by itself: of a pair the chosen one is good, the rejected one bad."""
        plain = {name: value for name, value in row.items() if name not in ("chosen", "rejected", "others")}
        answers = _answers(row)
        others = row.get("others", [None] * len(answers))
        labels = (True, False) if "chosen" in row else (row["label"],)
        return [
            {**plain, "completion": answer, "label": label, **({"other": other} if other is not None else {})}
            for answer, label, other in zip(answers, labels, others, strict=True)
        ]

    def whole(self, parts: Sequence[Mapping[str, Any]]) -> Row:
        """The row that `expand` made these of; see `Regroups`."""
        plain = {name: value for name, value in parts[0].items() if name != "other"}
        if len(parts) == 1:
            return plain
        chosen, rejected = (part["completion"] for part in parts)
        left = {name: value for name, value in plain.items() if name not in ("completion", "label", "seed")}
        return {**left, "chosen": chosen, "rejected": rejected}

    def count(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """How many answers are good and how many bad; see `Counts`.

        Raises:
            DataError: All are the same, or answer the same prompt.
        """
        good = sum(row["label"] for row in rows)
        counts = {GOOD: good, BAD: len(rows) - good}
        if len(rows) and not all(counts.values()):
            raise DataError(
                f"all {len(rows):,} answers to learn from are {GOOD if good else BAD}: `kto` tells good from bad",
                hint="add answers of the other kind; from good ones alone learns `task: sft`",
            )
        if len(rows) and not any("other" in row for row in rows):
            raise DataError(
                f"all {len(rows):,} answers to learn from are to one prompt: `kto` compares with answers to others",
                hint="add other prompts; answers to one prompt make pairs, for `dpo.loss: dpo`",
            )
        return counts

    def told(self, counts: Mapping[str, int]) -> str:
        """What a person should know of these counts."""
        good, bad = self._settings.weights(counts[GOOD], counts[BAD])
        return (
            f"{counts[GOOD]:,} good and {counts[BAD]:,} bad answers to learn from; "
            f"a good one weighs {good:.3g}, a bad one {bad:.3g}"
        )

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Of the answer `input_ids` and `targets` [T], of that to another prompt `other_...` [S]; `label`; and `cut`.

        Args:
            row: `prompt`, `completion`, `label`, and `other` where there is one: some messages each.

        Raises:
            DataError: The answers cannot be learned by this template.
        """
        ((ids, targets),), cut = self._pairs.write(row["prompt"], [row["completion"]])
        other = ids[:1], np.full_like(ids[:1], NOT_LEARNED)
        if "other" in row:
            (other,), _ = self._pairs.write(row["prompt"], [row["other"]])
        return {
            "input_ids": ids,
            "targets": targets,
            "ids_other": other[0],
            "targets_other": other[1],
            "label": np.array([int(row["label"])]),
            CUT: np.asarray(cut),
        }

    def size(self, example: Example) -> int:
        """Tokens of the longer of both, which are read one after the other."""
        return max(len(example["input_ids"]), len(example["ids_other"]))

    def texts(self, example: Example) -> dict[str, tuple[Ints, Ints]]:
        """The answer, and that to another prompt, of which nothing is learned; see `Shows`."""
        name = GOOD if example["label"][0] else BAD
        found = {name: unshifted(example["input_ids"], example["targets"])}
        if (example["targets_other"] != NOT_LEARNED).any():
            other, _ = unshifted(example["ids_other"], example["targets_other"])
            found["to another prompt"] = other, np.full_like(other, NOT_LEARNED)
        return found

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to `input_ids`, `targets` [B, T], `other_ids`, `other_targets` [B, S] and `label` [B].

        `num_targets` are the answers of which something was not cut off.
        """
        sides = [(_OWN, _OWN), (("ids_other", "targets_other"), _OTHER)]
        batch: dict[str, torch.Tensor] = {}
        for (ids, targets), names in sides:
            rows = [{"ids": example[ids], "targets": example[targets]} for example in examples]
            batch |= dict(zip(names, padded(rows, self._fills).values(), strict=True))
        batch["label"] = torch.tensor([int(example["label"][0]) for example in examples])
        batch[TARGETS] = _counted(batch["targets"]).sum()
        return batch

    # --- loss ------------------------------------------------------------------------------------------------

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """In training the sum of the answers' losses; a batch that no `settle` looked at has its own reference point.

        In an evaluation what was found of each row: the loss there is over all of its rows; see `measure`. The
        criterion is not asked: the loss is no cross-entropy of tokens.
        """
        counted_B, is_good_B = _counted(batch["targets"]), batch["label"] == 1
        ratios_B = self._log_ratios(model, batch, _OWN)
        if not model.training:
            other_B = self.glimpse(model, batch)
            columns = [ratios_B, counted_B, is_good_B, other_B["ratio"], other_B["is_one"]]
            found = torch.stack([column.double().cpu() for column in columns], dim=1).tolist()
            return Loss({TARGETS: ratios_B.new_zeros(())}, found=found)
        kl = batch[_KL] if _KL in batch else self.settle([self.glimpse(model, batch)], criterion)[0][_KL]
        above_B = self._beta * (ratios_B - kl)
        wrong_B = torch.sigmoid(torch.where(is_good_B, -above_B, above_B))
        counts = self._facts["train_classes"]
        good, bad = self._settings.weights(counts[GOOD], counts[BAD])
        each_B = torch.where(is_good_B, good, bad) * wrong_B
        return Loss({TARGETS: each_B[counted_B].sum()})

    def glimpse(self, model: "PreTrainedModel", batch: Batch) -> dict[str, torch.Tensor]:
        """Of answers to other prompts [B]: how much likelier each is than at first, in nats; and whether there is one.

        Without dropout, whose masks belong to micro-batches.
        """
        with torch.no_grad(), without_dropout(model):
            ratio_B = self._log_ratios(model, batch, _OTHER)
        return {"ratio": ratio_B.float(), "is_one": _counted(batch["other_targets"]).long()}

    def settle(
        self, seen: Sequence[Mapping[str, torch.Tensor]], criterion: Criterion
    ) -> list[dict[str, torch.Tensor]]:
        """The step's reference point in nats: the mean over answers to other prompts, 0 where it is below.

        Added up in float64 and by size, it does not depend on how the rows came.
        """
        ratio_N = torch.cat([one["ratio"][one["is_one"] == 1] for one in seen])
        if not len(ratio_N):
            return [{_KL: ratio_N.new_zeros(())} for _ in seen]
        kl = ratio_N.cpu().double().sort().values.mean().clamp(min=0).float().to(ratio_N.device)
        return [{_KL: kl} for _ in seen]

    def _log_ratios(self, model: "PreTrainedModel", batch: Batch, names: tuple[str, str]) -> torch.Tensor:
        """[B]: log p(answer) now less that at first, in nats."""
        some = dict(zip(_OWN, (batch[name] for name in names), strict=True))
        return sequence_log_probs(model, some) - log_probs_at_first(self._reference, model, some)

    # --- evaluation ------------------------------------------------------------------------------------------

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The number of answers; the loss is measured over all of them together."""
        return {TARGETS: sums[TARGETS]}

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Loss, reference point (`kl`, in nats), what good and bad answers are worth, and how often a good one is more.

        See `Judged.figures`.
        """
        return self._judged(rows, found).figures()

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """By prompt: those whose answers lie furthest on the wrong side of the reference point."""
        return self._judged(rows, found).detail(rows)

    def _judged(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Judged:
        counts = self._facts["train_classes"]
        prompts = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
        weights = self._settings.weights(counts[GOOD], counts[BAD])
        return Judged(prompts, found, beta=self._beta, weights=weights)


def _answers(row: Mapping[str, Any]) -> list[Any]:
    return [row["chosen"], row["rejected"]] if "chosen" in row else [row["completion"]]


def _counted(targets_BT: torch.Tensor) -> torch.Tensor:
    """[B]: the rows that have something to learn, or to look at."""
    return (targets_BT != NOT_LEARNED).any(1)
