"""When a run ends because its model no longer becomes better, and which of its checkpoints is exported then.

What was measured is counted in the `TrainState`, which checkpoints hold: a resumed run stops at the same step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmkit.errors import UsageError
from llmkit.recipe.schema import Finetune, Section
from llmkit.registry import goal_of, lower_is_better
from llmkit.train.state import TrainState


@dataclass(frozen=True)
class Patience:
    """How long a run goes on without becoming better.

    Attributes:
        metric: What is looked at, such as `eval/accuracy`.
        evaluations: So many in a row without a better one end the run.
        min_delta: By how much a value must be better than the best to count.
    """

    metric: str
    evaluations: int
    min_delta: float = 0.0

    @classmethod
    def of(cls, section: Section) -> "Patience | None":
        """What the recipe asks for; None where a run goes to its end.

        Raises:
            UsageError: Nothing is measured while training.
        """
        spec = section.stop_early if isinstance(section, Finetune) else None
        if spec is None:
            return None
        if section.eval.every.unit == "never":
            raise UsageError(
                "finetune.stop_early needs evaluations, and `eval.every` is `never`",
                hint="finetune.eval.every=10%",
            )
        return cls(best_metric(section) or "", spec.patience, spec.min_delta)

    def after(self, state: TrainState, figures: Mapping[str, float]) -> TrainState:
        """The state after an evaluation; one that was counted already, before a resume, is not counted again.

        That of step 0, which nothing was learnt by, does not count.
        """
        if state.step <= state.judged:
            return state
        value = figures.get(self.metric, math.nan)
        if self._is_better(value, state.best):
            return replace(state, judged=state.step, best=value, waited=0)
        return replace(state, judged=state.step, waited=state.waited + 1)

    def is_out(self, state: TrainState) -> bool:
        """Whether the run ends here."""
        return state.waited >= self.evaluations

    def _is_better(self, value: float, best: float | None) -> bool:
        if best is None or not math.isfinite(value):
            return math.isfinite(value)
        gain = best - value if lower_is_better(self.metric) else value - best
        return gain > self.min_delta


def best_metric(section: Section) -> str | None:
    """The metric by which the best checkpoint is kept: that of `stop_early`, else of `checkpoint.keep_best`, or None.

    Raises:
        UsageError: The two are not the same.
    """
    kept = section.checkpoint.keep_best
    spec = section.stop_early if isinstance(section, Finetune) else None
    if spec is None:
        return kept
    metric = spec.metric or kept or f"eval/{goal_of(section.objective).best}"
    if kept is not None and kept != metric:
        raise UsageError(
            f"finetune.stop_early goes by {metric}, and checkpoint.keep_best by {kept}",
            hint="name one metric in both, or leave `checkpoint.keep_best` out",
        )
    return metric
