"""Regression: a number for a text, or for a pair of texts, learned by its squared error.

Targets are learned as they are, so the exported model says numbers in the user's own unit; labels of other magnitude
than a few units learn badly at usual learning rates, and are better divided first.

Shape suffixes: B rows, T positions, N rows of a split.

**Source**: Devlin et al., "BERT", 2019, appendix B.1 (STS-B, after Cer et al. 2017); transformers' heads for one label.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.data.augment.mixing import MIXED, SHARE
from llmkit.metrics.regression import regression_metrics
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
)
from llmkit.objectives.cls import asked_of, head_logits
from llmkit.objectives.detail import Detail, worst_first
from llmkit.objectives.mixing import check_unchanged, is_mixed, mixed_logits, stack_mixed
from llmkit.objectives.texts import encode_texts, stack_texts
from llmkit.recipe.schema import Finetune

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel


def build(section: Finetune, material: Material) -> "Regression":
    """The task as the recipe wants it."""
    return Regression(material, mixup=bool(section.loss.mixup))


class Regression:
    """The mean over rows of (prediction - number) squared.

    Args:
        material: What it is made of.
        mixup: Whether training mixes rows.
    """

    sums = ()

    def __init__(self, material: Material, *, mixup: bool = False) -> None:
        self._mixup = mixup
        self._tokenizer = material.tokenizer
        self._max_length = material.max_length

    def prepare(self, model: "PreTrainedModel") -> None:
        """See that rows can be mixed, where they are to be."""
        if self._mixup:
            check_unchanged(model)

    def encode(self, row: Mapping[str, Any]) -> Example:
        """As `Classification.encode`; `numbers` [1] is the target and `targets` whether there is one.

        Args:
            row: `text`, `other` where there are two texts, and `label`, a number, if it is known.
        """
        example = encode_texts(self._tokenizer, row["text"], row.get("other"), self._max_length)
        known = "label" in row
        number = np.asarray([row["label"] if known else 0.0], dtype=np.float32)
        return {**example, "numbers": number, "targets": np.asarray([0 if known else NOT_LEARNED])}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to [B, T]; `numbers` and `targets` [B]. Of mixed rows also those that they are mixed with."""
        if is_mixed(examples[0]):
            batch = stack_mixed(self._tokenizer, examples, "numbers", "targets")
            batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
            return batch
        batch = stack_texts(self._tokenizer, examples)
        for name in ("numbers", "targets"):
            batch[name] = torch.from_numpy(np.concatenate([example[name] for example in examples]))
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the rows' squared errors; in float32, whatever the model computes in."""
        logits_B1 = mixed_logits(model, batch) if is_mixed(batch) else head_logits(model, batch)
        predicted_B = logits_B1.float().squeeze(1)
        errors_B = (predicted_B - batch["numbers"]).square()
        if is_mixed(batch):
            others_B = (predicted_B - batch[f"numbers{MIXED}"]).square()
            errors_B = batch[SHARE] * errors_B + (1 - batch[SHARE]) * others_B
        total = errors_B.masked_fill(batch["targets"] == NOT_LEARNED, 0.0).sum()
        if model.training:
            return Loss({TARGETS: total})
        return Loss({TARGETS: total}, found=predicted_B.tolist())

    def lean(self, teacher: "PreTrainedModel", batch: Batch, weight: float) -> tuple[Batch, torch.Tensor]:
        """The squared distances p - n from the number and p - t from what the teacher says, as one.

        (1 - w) (p - n)^2 + w (p - t)^2 = (p - m)^2 + w (1 - w) (n - t)^2 with m = (1 - w) n + w t; see `Leans`.
        """
        taught_B = head_logits(teacher, batch).float().squeeze(1)
        numbers_B = batch["numbers"]
        apart_B = weight * (1 - weight) * (numbers_B - taught_B).square()
        total = apart_B.masked_fill(batch["targets"] == NOT_LEARNED, 0.0).sum()
        return {**batch, "numbers": (1 - weight) * numbers_B + weight * taught_B}, total

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The mean squared error."""
        return {"loss": sums["total"] / sums[TARGETS], TARGETS: sums[TARGETS]}

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Pearson's and Spearman's correlation, and errors; see `metrics.regression`."""
        return regression_metrics([row["label"] for row in rows], found)

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """The largest errors first."""
        targets_N, predicted_N = np.array([float(row["label"]) for row in rows]), np.array(found)

        def figures(items: Ints) -> dict[str, float]:
            of_items = regression_metrics(targets_N[items], predicted_N[items])
            return {"loss": of_items["mse"], **of_items}

        lines = [
            {"input": asked_of(row), "target": target, "prediction": said, "score": said - target}
            for row, target, said in zip(rows, targets_N.tolist(), predicted_N.tolist(), strict=True)
        ]
        same = len(rows) > 1 and np.ptp(predicted_N) == 0 and np.ptp(targets_N) > 0
        return Detail(
            keys=[row["place"] for row in rows],
            owner=range(len(rows)),
            figures=figures,
            lines=lines,
            errors=worst_first(np.abs(predicted_N - targets_N).tolist()),
            warnings=[f"every row was given the same number, {predicted_N[0]:g}"] if same else [],
        )

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model says of a row, for people."""
        return {"score": float(found)}
