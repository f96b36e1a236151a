"""What every metric asks of its input."""

from collections.abc import Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import DataError, RunError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


def check_rows(first: Sized, second: Sized) -> int:
    """The number of rows, the same in both.

    Raises:
        DataError: There are none.
        ValueError: They differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first):,} rows of targets, but {len(second):,} of predictions")
    if len(first) == 0:
        raise DataError("no rows to measure on", hint="give data to evaluate on, or hold out more of it")
    return len(first)


def finite(values: Any, what: str) -> Floats:
    """The values in float64.

    Args:
        values: Numbers, the rows first.
        what: What they are, for the message.

    Raises:
        RunError: Some are NaN or infinite: a figure made of them would look like one.
    """
    array = np.asarray(values, dtype=np.float64)
    good_N = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if not good_N.all():
        first = int(np.argmin(good_N))
        raise RunError(
            f"{what} of {int((~good_N).sum()):,} of {len(array):,} rows are not finite; the first is row {first + 1}",
            hint="the model has diverged: a lower learning rate, more warm-up, or float32",
        )
    return array


def divided(numerator: Any, denominator: Any) -> Floats:
    """Element by element, with 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    )
    result: Floats = np.zeros(denominator.shape)
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result
