"""What changes in a run besides weights and optimizer: little, for order and lr follow from the step."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from llmkit.data.seeds import mix_seed as mix_seed


@dataclass(frozen=True)
class TrainState:
    """How far a run is.

    Attributes:
        step: Optimizer steps made.
        tokens: Positions computed, over all devices.
        elapsed_s: Wall seconds spent in steps, over all sessions of the run.
        skipped: Of the steps, those that left the weights alone because their numbers were not finite.
        judged: With `stop_early`: the last step whose evaluation was counted.
        best: The best value up to then; None before there was one.
        waited: Evaluations in a row since then that were not better.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    judged: int = 0
    best: float | None = None
    waited: int = 0

    def after(self, *, tokens: int, seconds: float, skipped: bool = False) -> "TrainState":
        """The state after one more step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            elapsed_s=self.elapsed_s + seconds,
            skipped=self.skipped + int(skipped),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
