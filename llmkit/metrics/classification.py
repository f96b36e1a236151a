"""How well classes were told apart: precision, recall, F1, Matthews' correlation, calibration.

Shape suffixes: N rows, C classes, L labels that each apply or not.

A class that is neither among the targets nor the predictions says nothing and is left out of the macro average, as in
scikit-learn. In the multi-label case every label counts, again as there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.metrics.inputs import Booleans, Floats, Integers, check_rows, divided, finite

CALIBRATION_BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Counts:
    """Right answers of each class, or of all together.

    Attributes:
        hits: Found and true.
        found: Predicted.
        true: There were.
    """

    hits: Integers
    found: Integers
    true: Integers

    @property
    def precision(self) -> Floats:
        """Share of what was predicted that is true; 0 where nothing was predicted."""
        return divided(self.hits, self.found)

    @property
    def recall(self) -> Floats:
        """Share of what is true that was predicted; 0 where nothing is true."""
        return divided(self.hits, self.true)

    @property
    def f1(self) -> Floats:
        """Harmonic mean of the two; 0 where nothing was predicted or true."""
        return divided(2 * self.hits, self.found + self.true)

    def of(self, which: Any) -> "Counts":
        """Those of some classes."""
        return Counts(self.hits[which], self.found[which], self.true[which])

    def total(self) -> "Counts":
        """All classes as one."""
        return Counts(*(np.asarray(part.sum()) for part in (self.hits, self.found, self.true)))


def confusion_matrix(targets_N: Any, predicted_N: Any, num_classes: int) -> Integers:
    """[C, C]: rows of class i (the truth) that were taken for class j.

    Args:
        targets_N: Numbers of the true classes.
        predicted_N: Numbers of the predicted ones.
        num_classes: C.

    Raises:
        DataError: There are no rows.
        ValueError: A number is not that of a class.
    """
    check_rows(targets_N, predicted_N)
    targets_N, predicted_N = (np.asarray(one, dtype=np.int64) for one in (targets_N, predicted_N))
    for what, numbers_N in (("target", targets_N), ("prediction", predicted_N)):
        wrong = numbers_N[(numbers_N < 0) | (numbers_N >= num_classes)]
        if len(wrong):
            raise ValueError(f"{what} {wrong[0]} is not the number of one of {num_classes} classes")
    flat = np.bincount(targets_N * num_classes + predicted_N, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def counts_of(matrix_CC: Integers) -> Counts:
    """Hits, predictions and truth of each class."""
    return Counts(np.diagonal(matrix_CC), matrix_CC.sum(axis=0), matrix_CC.sum(axis=1))


def averages(counts: Counts) -> dict[str, float]:
    """`{macro,micro,weighted}_{precision,recall,f1}`: the mean over classes, all as one, the mean weighted by truth."""
    result = {}
    for name in ("precision", "recall", "f1"):
        each: Floats = getattr(counts, name)
        result[f"macro_{name}"] = float(each.mean()) if len(each) else 0.0
        result[f"micro_{name}"] = float(getattr(counts.total(), name))
        result[f"weighted_{name}"] = float(divided((each * counts.true).sum(), counts.true.sum()))
    return result


def matthews(matrix_CC: Integers) -> float:
    """Correlation of truth and prediction, -1 to 1; 0 where either has one class only.

    **Source**: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """
    # In float64, not integers: the products of 64-bit counts overflow from three billion rows on.
    found_C, true_C = matrix_CC.sum(axis=0).astype(np.float64), matrix_CC.sum(axis=1).astype(np.float64)
    rows, hits = float(matrix_CC.sum()), float(np.trace(matrix_CC))
    spread_found = rows**2 - float(found_C @ found_C)
    spread_true = rows**2 - float(true_C @ true_C)
    if spread_found == 0 or spread_true == 0:
        return 0.0
    return float((hits * rows - found_C @ true_C) / np.sqrt(spread_found * spread_true))


def calibration_error(targets_N: Any, probabilities_NC: Any, *, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: how far the probability of the likeliest class is from being right, on average.

    Rows are put into equal-width bins of that probability, each open at its lower end; the error is the mean over rows
    of |share right - mean probability| of their bin.

    Args:
        targets_N: Numbers of the true classes.
        probabilities_NC: Of each class; each row sums to 1.
        bins: How many.

    Raises:
        RunError: A probability is not finite.

    **Source**: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2.
    """
    check_rows(targets_N, probabilities_NC)
    probabilities_NC = finite(probabilities_NC, "the probabilities")
    confidence_N = probabilities_NC.max(axis=1)
    right_N = probabilities_NC.argmax(axis=1) == np.asarray(targets_N)
    return _calibration_error(right_N, confidence_N, bins)


def _calibration_error(right_N: Booleans, confidence_N: Floats, bins: int) -> float:
    bin_N = _bins(confidence_N, bins)
    right, confident = (np.bincount(bin_N, weights=each, minlength=bins) for each in (right_N, confidence_N))
    return float(np.abs(right - confident).sum() / len(bin_N))


def _bins(confidence_N: Floats, bins: int) -> Integers:
    return np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)


def classification_metrics(targets_N: Any, probabilities_NC: Any, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, averages of precision, recall and F1, `mcc`, and `ece` from the probabilities.

    Args:
        targets_N: Numbers of the true classes.
        probabilities_NC: Of each class; each row sums to 1. The first of equal ones is predicted.
        labels: Names of the classes, C of them.

    Returns:
        `accuracy`, `{macro,micro,weighted}_{precision,recall,f1}`, `mcc`, `ece`. With one class a row the micro
        averages all equal the accuracy.

    Raises:
        DataError: There are no rows.
        RunError: A probability is not finite.
    """
    counted = ClassRows.of(targets_N, probabilities_NC, len(labels))
    return counted.figures(np.arange(len(counted.cells_N)))


@dataclass(frozen=True)
class ClassRows:
    """What each row contributes to the figures of classes, counted once, so that figures of any rows are quick.

    Attributes:
        cells_N: Each row's place in the matrix of truth and prediction, row by row of it.
        confidence_N: The probability of the class that was predicted.
        num_classes: C.
    """

    cells_N: Integers
    confidence_N: Floats
    num_classes: int

    @classmethod
    def of(cls, targets_N: Any, probabilities_NC: Any, num_classes: int) -> "ClassRows":
        """See `classification_metrics`.

        Raises:
            DataError: There are no rows.
            RunError: A probability is not finite.
        """
        probabilities_NC = finite(probabilities_NC, "the probabilities")
        predicted_N = probabilities_NC.argmax(axis=1)
        confusion_matrix(targets_N, predicted_N, num_classes)  # refuses what is no class
        cells_N = np.asarray(targets_N, dtype=np.int64) * num_classes + predicted_N
        return cls(cells_N, probabilities_NC.max(axis=1), num_classes)

    def right(self) -> Booleans:
        """Whether each row's prediction is its target."""
        right_N: Booleans = self.cells_N % (self.num_classes + 1) == 0
        return right_N

    def matrix(self, items: Integers) -> Integers:
        """[C, C] of some rows, one of them several times if it is named so."""
        flat = np.bincount(self.cells_N[items], minlength=self.num_classes**2)
        return flat.reshape(self.num_classes, self.num_classes).astype(np.int64)

    def figures(self, items: Integers) -> dict[str, float]:
        """As `classification_metrics`, of some rows."""
        matrix_CC = self.matrix(items)
        counts = counts_of(matrix_CC)
        seen_C = (counts.found > 0) | (counts.true > 0)
        return {
            "accuracy": float(np.trace(matrix_CC) / matrix_CC.sum()),
            **averages(counts.of(seen_C)),
            "mcc": matthews(matrix_CC),
            "ece": _calibration_error(self.right()[items], self.confidence_N[items], CALIBRATION_BINS),
        }


def calibration_table(
    right_N: Any, confidence_N: Any, *, bins: int = CALIBRATION_BINS
) -> list[dict[str, Any]]:
    """The bins of `calibration_error` that hold rows: `low`, `high`, `num`, mean `confidence`, share right `accuracy`.

    Args:
        right_N: Whether each row's likeliest class is the true one.
        confidence_N: The probability of that class.
        bins: How many.
    """
    right_N, confidence_N = np.asarray(right_N), np.asarray(confidence_N)
    bin_N = _bins(confidence_N, bins)
    return [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "num": int((bin_N == number).sum()),
            "confidence": float(confidence_N[bin_N == number].mean()),
            "accuracy": float(right_N[bin_N == number].mean()),
        }
        for number in np.unique(bin_N).tolist()
    ]


def class_table(counts: Counts, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a class: `label`, `precision`, `recall`, `f1`, `support` (true rows) and `predicted` (rows)."""
    columns: Mapping[str, NDArray[Any]] = {
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
        "support": counts.true,
        "predicted": counts.found,
    }
    return [
        {"label": label, **{name: column[number].item() for name, column in columns.items()}}
        for number, label in enumerate(labels)
    ]


def confusions(matrix_CC: Integers, labels: Sequence[str], *, top: int = 10) -> list[dict[str, Any]]:
    """The classes most often taken for each other: `label`, `predicted`, `rows`, the commonest first."""
    wrong_CC = matrix_CC - np.diag(np.diagonal(matrix_CC))
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:top]
    places = [divmod(int(place), len(labels)) for place in order]
    return [
        {"label": labels[true], "predicted": labels[found], "rows": int(wrong_CC[true, found])}
        for true, found in places
        if wrong_CC[true, found]
    ]


def label_counts(targets_NL: Any, predicted_NL: Any) -> Counts:
    """Hits, predictions and truth of each label of rows that can have several.

    Raises:
        DataError: There are no rows.
    """
    check_rows(targets_NL, predicted_NL)
    return _counted(np.asarray(targets_NL, dtype=bool), np.asarray(predicted_NL, dtype=bool), axis=0)


def multilabel_metrics(targets_NL: Any, predicted_NL: Any, labels: Sequence[str]) -> dict[str, float]:
    """Figures for rows that can have several labels, or none.

    Args:
        targets_NL: Whether each label applies.
        predicted_NL: Whether it was said to.
        labels: Their names, L of them.

    Returns:
        `{macro,micro,weighted}_{precision,recall,f1}` over labels, `samples_{precision,recall,f1}` (the mean over
        rows), and `exact_match`, the share of rows with every label right. A row without labels that was given none
        scores 0 in the `samples_` figures, as in scikit-learn, and is an exact match.

    Raises:
        DataError: There are no rows.
    """
    counts = label_counts(targets_NL, predicted_NL)
    targets_NL, predicted_NL = np.asarray(targets_NL, dtype=bool), np.asarray(predicted_NL, dtype=bool)
    if targets_NL.shape != predicted_NL.shape or targets_NL.shape[1] != len(labels):
        raise ValueError(
            f"{targets_NL.shape} targets, {predicted_NL.shape} predictions, {len(labels)} labels"
        )
    rows = _counted(targets_NL, predicted_NL, axis=1)
    return {
        **averages(counts),
        **{f"samples_{name}": float(getattr(rows, name).mean()) for name in ("precision", "recall", "f1")},
        "exact_match": float((targets_NL == predicted_NL).all(axis=1).mean()),
    }


def _counted(targets_NL: Booleans, predicted_NL: Booleans, *, axis: int) -> Counts:
    parts = (targets_NL & predicted_NL, predicted_NL, targets_NL)
    return Counts(*(part.sum(axis=axis).astype(np.int64) for part in parts))
