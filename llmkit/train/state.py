"""What changes in a run besides weights and optimizer: little, for order and lr follow from the step."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """How far a run is.

    Attributes:
        step: Optimizer steps made.
        tokens: Positions computed, over all devices.
        elapsed_s: Wall seconds spent in steps, over all sessions of the run.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def after(self, *, tokens: int, seconds: float) -> "TrainState":
        """The state after one more step."""
        return TrainState(self.step + 1, self.tokens + tokens, self.elapsed_s + seconds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def mix_seed(*parts: int) -> int:
    """A 63-bit seed that is a pure function of `parts`, such as (seed, step, micro-batch).

    **Source**: the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014, figure 15.
    """
    mask = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state + (part & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
