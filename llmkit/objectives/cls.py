"""Classification: which of some classes a text, or a pair of texts, belongs to; or, each by itself, whether it does.

Shape suffixes: B rows, T positions, C classes, L labels of a row in bits.

**Source**: Devlin et al., "BERT", 2019, section 4.1; for decoders Radford et al. 2018, section 3.2.
"""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.metrics.classification import (
    ClassRows,
    calibration_table,
    class_table,
    classification_metrics,
    confusions,
    counts_of,
    label_counts,
    multilabel_metrics,
)
from llmkit.models.heads import Scores
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
from llmkit.objectives.detail import Detail, worst_first
from llmkit.objectives.losses import agreeing, doubled, twofold
from llmkit.objectives.mixing import check_unchanged, is_mixed, mixed_logits, mixed_total, stack_mixed
from llmkit.objectives.texts import encode_texts, stack_texts
from llmkit.recipe.schema import Finetune

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

MOST_SHOWN = 30
"""Classes of a matrix of confusions that a person can read."""


def build(section: Finetune, material: Material) -> "Classification | MultiLabel":
    """The task as the recipe wants it."""
    task = MultiLabel if section.cls.multiple else Classification
    return task(material, r_drop=section.loss.r_drop, mixup=bool(section.loss.mixup))


class Classification:
    """The mean over rows of -log p(class | text).

    Args:
        material: What it is made of.
        r_drop: How far two passes that differ by dropout may lie apart; 0: there is one.
        mixup: Whether training mixes rows.
    """

    sums = ()

    def __init__(self, material: Material, *, r_drop: float = 0.0, mixup: bool = False) -> None:
        self._r_drop = r_drop
        self._mixup = mixup
        self._tokenizer = material.tokenizer
        self._max_length = material.max_length
        self._labels = material.labels
        self._number = {label: number for number, label in enumerate(material.labels)}

    def prepare(self, model: "PreTrainedModel") -> None:
        """See that rows can be mixed, where they are to be."""
        if self._mixup:
            check_unchanged(model)

    def encode(self, row: Mapping[str, Any]) -> Example:
        """`input_ids` [T], `token_type_ids` [T] where the model knows them, and `targets`, the class.

        Args:
            row: `text`, `other` where there are two texts, and `label`, if it is known.
        """
        example = encode_texts(self._tokenizer, row["text"], row.get("other"), self._max_length)
        target = self._number[row["label"]] if "label" in row else NOT_LEARNED
        return {**example, "targets": np.asarray([target])}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to [B, T]; `targets` [B]. Of mixed rows also those that they are mixed with."""
        batch = self._stacked(examples)
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def _stacked(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        if is_mixed(examples[0]):
            return stack_mixed(self._tokenizer, examples, "targets")
        batch = stack_texts(self._tokenizer, examples)
        batch["targets"] = torch.from_numpy(np.concatenate([example["targets"] for example in examples]))
        return batch

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """Sum of the rows' negative log-likelihood."""
        if is_mixed(batch):
            return Loss({TARGETS: self._mixed_loss(mixed_logits(model, batch), batch, criterion)})
        if model.training and self._r_drop:
            twice = doubled(batch)
            logits_NC, targets_N = self._terms(head_logits(model, twice), twice["targets"])
            return Loss({TARGETS: agreeing(logits_NC, targets_N, criterion, self._r_drop)})
        logits_BC = head_logits(model, batch)
        logits_NC, targets_N = self._terms(logits_BC, batch["targets"])
        total = criterion(Scores(logits_NC), targets_N)
        if model.training:
            return Loss({TARGETS: total})
        return Loss({TARGETS: total}, found=list(self._probabilities(logits_BC).cpu().numpy()))

    def _mixed_loss(self, logits_BC: torch.Tensor, batch: Batch, criterion: Criterion) -> torch.Tensor:
        def loss_of(rows: slice, targets: torch.Tensor) -> torch.Tensor:
            logits_NC, targets_N = self._terms(logits_BC[rows], targets)
            return criterion(Scores(logits_NC), targets_N)

        return mixed_total(batch, loss_of)

    def _terms(self, logits_BC: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C] and targets [N] of the terms of the loss."""
        return logits_BC, targets

    def _probabilities(self, logits_BC: torch.Tensor) -> torch.Tensor:
        return logits_BC.float().softmax(1)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats a row."""
        return {"loss": sums["total"] / sums[TARGETS], TARGETS: sums[TARGETS]}

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Accuracy, F1, Matthews' correlation and calibration; see `metrics.classification`."""
        targets_N = np.array([self._number[row["label"]] for row in rows])
        return classification_metrics(targets_N, np.stack(found), self._labels)

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """By class, which classes are taken for each other, how sure the model is, and where it is sure and wrong."""
        targets_N = np.array([self._number[row["label"]] for row in rows])
        counted = ClassRows.of(targets_N, np.stack(found), len(self._labels))
        right = counted.right().tolist()
        matrix_CC = counted.matrix(np.arange(len(rows)))
        lines = [self._line(row, one) for row, one in zip(rows, found, strict=True)]
        tables, files = confusion_tables(matrix_CC, self._labels)
        return Detail(
            keys=[row["place"] for row in rows],
            owner=range(len(rows)),
            figures=counted.figures,
            lines=lines,
            errors=worst_first(counted.confidence_N.tolist(), [not one for one in right]),
            right=right,
            tables={**tables, "calibration": calibration_table(counted.right(), counted.confidence_N)},
            files=files,
            warnings=all_one({line["prediction"] for line in lines}, {row["label"] for row in rows}),
        )

    def _line(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        said = self.predict(row, found)
        confidence = said["probabilities"][said["label"]]
        more = {"input": asked_of(row), "target": row["label"], "prediction": said["label"]}
        return {**more, "score": confidence, "probabilities": said["probabilities"]}

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model says of a row, for people: the likeliest class, and the probability of each."""
        probabilities = dict(zip(self._labels, map(float, found), strict=True))
        return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


class MultiLabel(Classification):
    """The mean over rows and labels of -log p(label applies or not | text)."""

    def encode(self, row: Mapping[str, Any]) -> Example:
        """As `Classification`; `targets` [L] are 0 or 1 for each label."""
        example = encode_texts(self._tokenizer, row["text"], row.get("other"), self._max_length)
        unknown = np.full(len(self._labels), NOT_LEARNED)
        return {**example, "targets": self._bits(row["label"]) if "label" in row else unknown}

    def _bits(self, labels: str | Sequence[str]) -> Any:
        given = {labels} if isinstance(labels, str) else set(labels)
        return np.array([int(label in given) for label in self._labels], dtype=np.int64)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack to [B, T]; `targets` [B, L]. Of mixed rows also those that they are mixed with."""
        batch = self._stacked(examples)
        for name in [name for name in batch if name.startswith("targets")]:
            batch[name] = batch[name].view(len(examples), -1)
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def _terms(self, logits_BC: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each label of each row as two classes, so that every criterion fits."""
        return twofold(logits_BC), targets.flatten()

    def _probabilities(self, logits_BC: torch.Tensor) -> torch.Tensor:
        return logits_BC.float().sigmoid()

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """F1 by labels, rows and in all, and `accuracy`, the share of rows with every label right (`exact_match`)."""
        targets_NL = np.stack([self._bits(row["label"]) for row in rows]).astype(bool)
        figures = multilabel_metrics(targets_NL, np.stack(found) >= 0.5, self._labels)
        return {**figures, "accuracy": figures["exact_match"]}

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """By label, and the rows with a wrong label that the model is surest of."""
        targets_NL = np.stack([self._bits(row["label"]) for row in rows]).astype(bool)
        probabilities_NL = np.stack(found)
        predicted_NL = probabilities_NL >= 0.5
        right = (targets_NL == predicted_NL).all(axis=1).tolist()
        # How sure the model is of the label that is most wrong.
        gaps_NL = np.where(targets_NL, 1 - probabilities_NL, probabilities_NL)

        def figures(items: Ints) -> dict[str, float]:
            of_items = multilabel_metrics(targets_NL[items], predicted_NL[items], self._labels)
            return {**of_items, "accuracy": of_items["exact_match"]}

        lines = []
        for row, one, gap in zip(rows, found, gaps_NL.max(axis=1).tolist(), strict=True):
            said = self.predict(row, one)
            line = {"input": asked_of(row), "target": row["label"], "prediction": said["label"]}
            lines.append({**line, "score": gap, "probabilities": said["probabilities"]})
        return Detail(
            keys=[row["place"] for row in rows],
            owner=range(len(rows)),
            figures=figures,
            lines=lines,
            errors=worst_first(gaps_NL.max(axis=1).tolist(), [not one for one in right]),
            right=right,
            tables={"classes": class_table(label_counts(targets_NL, predicted_NL), self._labels)},
            warnings=all_one(
                {tuple(line["prediction"]) for line in lines},
                {tuple(sorted(line["target"])) for line in lines},
            ),
        )

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """What the model says of a row, for people: the labels that apply, and the probability of each."""
        probabilities = dict(zip(self._labels, map(float, found), strict=True))
        return {
            "label": [name for name, p in probabilities.items() if p >= 0.5],
            "probabilities": probabilities,
        }


def asked_of(row: Mapping[str, Any]) -> Any:
    """The text of a row, or its two texts."""
    return row["text"] if "other" not in row else [row["text"], row["other"]]


def all_one(predicted: Set[Any], true: Set[Any]) -> list[str]:
    """A warning where every prediction is the same, and the truth is not."""
    if len(predicted) != 1 or len(true) < 2:
        return []
    return [f"every row was said to be {next(iter(predicted))!r}: the model tells nothing apart"]


def confusion_tables(matrix_CC: Any, labels: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tables by class and of confusions, and the whole matrix as a file where it has too many classes to be shown."""
    counts = counts_of(matrix_CC)
    whole = {"labels": list(labels), "counts": matrix_CC.tolist()}
    tables = {"classes": class_table(counts, labels), "confusions": confusions(matrix_CC, labels)}
    if len(labels) <= MOST_SHOWN:
        return {**tables, "confusion": whole}, {}
    wrong_C = (counts.found - counts.hits) + (counts.true - counts.hits)
    chosen = np.sort(np.argsort(-wrong_C, kind="stable")[:MOST_SHOWN])
    shown = {
        "labels": [labels[number] for number in chosen],
        "counts": matrix_CC[np.ix_(chosen, chosen)].tolist(),
        "left_out": len(labels) - MOST_SHOWN,
    }
    return {**tables, "confusion": shown}, {"confusion.json": whole}


def head_logits(model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
    """[B, C] or [B, T, C]: what a model of the kind `sequence` says of each row, or of `tokens` of each position."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    logits: torch.Tensor = model(**{name: batch[name] for name in names if name in batch}, **more).logits
    return logits
