"""The learning rate as a pure function of the step: nothing to save, and any step can be asked for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmkit.recipe.schema import Optim

_LEAST = 1e-3
"""An exponential never reaches 0: with `min_lr_ratio: 0` it ends at a thousandth."""


def lr_at(step: int, spec: Optim, *, num_steps: int, warmup_steps: int) -> float:
    """The learning rate of the update that leads from `step` to `step + 1`.

    It rises linearly over `warmup_steps` updates, the last of which has the peak, and then follows the
    schedule down to `min_lr_ratio * lr`, which the run's last update has exactly (`inverse_sqrt` only never falls
    below it, `constant` stays at the peak).

    Args:
        step: Updates made so far, 0 to `num_steps - 1`.
        spec: The recipe's `optim` block.
        num_steps: Updates of the whole run.
        warmup_steps: Updates of the warm-up.

    **Source**: cosine: Loshchilov and Hutter, "SGDR", 2017, eq. 5. Inverse square root: Vaswani et al., "Attention
    Is All You Need", 2017, eq. 3. WSD: Hu et al., "MiniCPM", 2024, sec. 4.
    """
    if step < warmup_steps:
        return spec.lr * (step + 1) / warmup_steps
    return spec.lr * _SHAPES[spec.schedule](_At(step + 1, num_steps, warmup_steps), spec)


@dataclass(frozen=True)
class _At:
    """A place after the warm-up: the update's number counted from 1, of how many, after how many of warm-up."""

    update: int
    num_steps: int
    warmup_steps: int

    @property
    def progress(self) -> float:
        """The share of what comes after the warm-up that is done with this update."""
        return min(1.0, (self.update - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))


def _constant(at: _At, spec: Optim) -> float:
    return 1.0


def _linear(at: _At, spec: Optim) -> float:
    return 1.0 - (1.0 - spec.min_lr_ratio) * at.progress


def _cosine(at: _At, spec: Optim) -> float:
    low = spec.min_lr_ratio
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * at.progress))


def _exponential(at: _At, spec: Optim) -> float:
    return float(max(spec.min_lr_ratio, _LEAST) ** at.progress)


def _polynomial(at: _At, spec: Optim) -> float:
    assert spec.power is not None
    low = spec.min_lr_ratio
    return float(low + (1.0 - low) * (1.0 - at.progress) ** spec.power)


def _inverse_sqrt(at: _At, spec: Optim) -> float:
    return max(spec.min_lr_ratio, math.sqrt(max(1, at.warmup_steps) / at.update))


def _wsd(at: _At, spec: Optim) -> float:
    assert spec.decay is not None
    share = min(1.0, spec.decay * at.num_steps / max(1, at.num_steps - at.warmup_steps))
    falling = (at.progress - (1.0 - share)) / share if share > 0 else 0.0
    return 1.0 - (1.0 - spec.min_lr_ratio) * min(1.0, max(0.0, falling))


_SHAPES: Mapping[str, Callable[[_At, Optim], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}
