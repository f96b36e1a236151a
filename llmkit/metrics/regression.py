"""How well numbers were met, and their order.

Shape suffix: N rows.
"""

from typing import Any

import numpy as np

from llmkit.metrics.inputs import Floats, check_rows, finite


def regression_metrics(targets_N: Any, predicted_N: Any) -> dict[str, float]:
    """`pearson`, `spearman`, `mse`, `mae`, `r2`.

    Args:
        targets_N: The true numbers.
        predicted_N: The predicted ones.

    Raises:
        DataError: There are no rows.
        RunError: A number is not finite.
    """
    check_rows(targets_N, predicted_N)
    targets_N, predicted_N = finite(targets_N, "the targets"), finite(predicted_N, "the predictions")
    errors_N = predicted_N - targets_N
    return {
        "pearson": pearson(targets_N, predicted_N),
        "spearman": spearman(targets_N, predicted_N),
        "mse": float(np.mean(errors_N**2)),
        "mae": float(np.mean(np.abs(errors_N))),
        "r2": explained(targets_N, predicted_N),
    }


def pearson(first_N: Any, second_N: Any) -> float:
    """Linear correlation, -1 to 1; 0 where one of the two does not vary, which says nothing of the other.

    Raises:
        DataError: There are no rows.
        RunError: A number is not finite.
    """
    check_rows(first_N, second_N)
    first_N, second_N = _centred(finite(first_N, "the numbers")), _centred(finite(second_N, "the numbers"))
    # Rounding can leave 1 + 1e-16.
    return float(np.clip(first_N @ second_N, -1.0, 1.0))


def spearman(first_N: Any, second_N: Any) -> float:
    """Correlation of the ranks; equal numbers share the mean of their ranks. 0 where one of the two does not vary.

    Raises:
        DataError: There are no rows.
        RunError: A number is not finite.

    **Source**: Spearman, "The Proof and Measurement of Association between Two Things", 1904.
    """
    return pearson(ranked(finite(first_N, "the numbers")), ranked(finite(second_N, "the numbers")))


def ranked(values_N: Any) -> Floats:
    """Ranks from 1, the smallest first; equal numbers share the mean of their ranks."""
    _, group_N, sizes = np.unique(np.asarray(values_N), return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    mean: Floats = last - (sizes - 1) / 2
    return mean[group_N]


def explained(targets_N: Any, predicted_N: Any) -> float:
    """R2: the share of the targets' variance that the predictions explain; below 0 where their mean does better.

    Where the targets do not vary it is 1 for predictions that are all right and 0 for others, as in scikit-learn.

    Raises:
        DataError: There are no rows.
        RunError: A number is not finite.
    """
    check_rows(targets_N, predicted_N)
    targets_N, predicted_N = finite(targets_N, "the targets"), finite(predicted_N, "the predictions")
    left = float(np.sum((targets_N - predicted_N) ** 2))
    spread = float(np.sum((targets_N - targets_N.mean()) ** 2))
    if np.ptp(targets_N) == 0 or spread == 0:
        return float(left == 0)
    return 1 - left / spread


def _centred(values_N: Floats) -> Floats:
    """Without the mean, of length 1; all 0 where nothing varies."""
    if np.ptp(values_N) == 0:  # the mean of equal numbers can be a rounding away from them
        return np.zeros(len(values_N))
    values_N = values_N / np.abs(values_N).max()  # squares of very large or small numbers leave the range
    values_N = values_N - values_N.mean()
    length = float(np.linalg.norm(values_N))
    return values_N / length if length else values_N
