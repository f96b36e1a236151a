"""Loss spikes: where the training loss jumped far above what it had been, told while it runs and in the report."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

WINDOW = 50
"""The losses (of as many records) that say what is usual."""

FEWEST = 20
"""Records before the first alarm: until then the loss falls too fast for anything to be usual."""

DEVIATIONS = 10.0
"""Robust standard deviations above the median that make a spike; the noise of 59 real runs stayed under 3.5."""

SMALLEST = 0.05
"""A spike is at least this share of the usual loss: a loss that hardly varies may rise by a little."""

_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Spike:
    """Consecutive records whose loss is far above the usual.

    Attributes:
        step: The first of them.
        last_step: The last.
        peak: The highest loss, in nats.
        usual: The median of the losses before.
        recovered: Whether the loss came back; if not, it stayed high, or the records end there.
    """

    step: int
    last_step: int
    peak: float
    usual: float
    recovered: bool = False

    def sentence(self) -> str:
        """What a person reads."""
        after = f", back after step {self.last_step:,}" if self.recovered else ", not back since"
        return f"step {self.step:,}: the loss jumped from about {self.usual:.3g} to {self.peak:.3g}{after}"


class SpikeFinder:
    """Takes losses one by one. What belongs to a spike does not count as usual, until it lasts for `FEWEST` records.

    The deviation is 1.4826 times the median distance from the median, which a few wild values do not move.

    **Source**: Leys et al., "Detecting outliers: Do not use standard deviation around the mean, use absolute
    deviation around the median", 2013.

    Attributes:
        spikes: Those found so far, the last of which may still go on.
    """

    def __init__(self) -> None:
        self.spikes: list[Spike] = []
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._high: list[float] = []

    def see(self, step: int, loss: float) -> bool:
        """Take the loss of the next record; return whether a spike begins with it."""
        if len(self._usual) < FEWEST or loss <= self._limit():
            self._back(loss)
            return False
        began = not self._high
        self._high.append(loss)
        if began:
            self.spikes.append(Spike(step, step, loss, median(self._usual)))
        else:
            self._update(last_step=step, peak=max(loss, self.spikes[-1].peak))
        if len(self._high) >= FEWEST:  # no spike, a new level
            self._usual.clear()
            self._usual.extend(self._high)
            self._high = []
        return began

    def _back(self, loss: float) -> None:
        if self._high:
            self._update(recovered=True)
            self._high = []
        self._usual.append(loss)

    def _update(self, **changes: Any) -> None:
        self.spikes[-1] = Spike(**{**asdict(self.spikes[-1]), **changes})

    def _limit(self) -> float:
        middle = median(self._usual)
        deviation = _MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self._usual)
        return middle + max(DEVIATIONS * deviation, SMALLEST * abs(middle))


def find_spikes(records: Iterable[Mapping[str, Any]]) -> list[Spike]:
    """The spikes of a run.

    Args:
        records: As in metrics.jsonl; those without a finite `train/loss` say nothing here.
    """
    finder = SpikeFinder()
    _feed(finder, records)
    return finder.spikes


class SpikeWatch:
    """Watches a run (`train.callbacks.Callback`) and says so at the record with which a spike begins.

    Args:
        warn: Takes the sentence.
        before: Records of the run so far, where it is resumed.
    """

    def __init__(self, warn: Callable[[str], None], before: Iterable[Mapping[str, Any]] = ()) -> None:
        self._warn = warn
        self._finder = SpikeFinder()
        _feed(self._finder, before)

    def on_record(self, record: Mapping[str, Any], *, num_steps: int) -> None:
        """Look at a training record."""
        if _feed(self._finder, [record]):
            spike = self._finder.spikes[-1]
            self._warn(
                f"step {spike.step:,}: the loss jumped to {spike.peak:.3g}, {spike.usual:.3g} is usual; "
                "if it does not come back, a lower `train.optim.lr` or `grad_clip` usually helps"
            )

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """Nothing to see."""

    def on_save(self, step: int) -> None:
        """Nothing to see."""


def _feed(finder: SpikeFinder, records: Iterable[Mapping[str, Any]]) -> int:
    """Show the records to the finder; return how many spikes began."""
    began = 0
    for record in records:
        loss = record.get("train/loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            began += finder.see(int(record.get("step") or 0), float(loss))
    return began
