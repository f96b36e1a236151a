"""What a sweep tries next, and what it gives up: functions of the trials so far, so that a resume goes on as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from llmkit.data.seeds import mix_seed
from llmkit.errors import MissingError
from llmkit.recipe.space import Axis, Value

State = Literal["running", "done", "pruned", "failed"]
FEWEST_TO_PRUNE = 4
"""So many trials must have been finished before one is given up for being worse than half of them."""

_SEARCH = 1 << 44  # keeps these seeds apart from a run's others


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        number: From 1.
        params: The searched settings.
        state: How it stands; `running` also of one that an interruption left.
        value: The metric at the end; of one that was given up, the last measured.
        curve: The metric by step, while training.
        error: Why it failed.
    """

    number: int
    params: dict[str, Value]
    state: State = "running"
    value: float | None = None
    curve: dict[int, float] = field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        """What its run is called, below the sweep's."""
        return f"trial-{self.number:03d}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "curve": [[step, value] for step, value in self.curve.items()]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Trial":
        """What `to_dict` made."""
        return cls(**{**plain, "curve": {int(step): value for step, value in plain["curve"]}})


def import_optuna() -> Any:
    """The package optuna, which only sweeps need.

    Raises:
        MissingError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingError("a sweep needs the package optuna", hint='pip install "llmkit[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def suggest(axes: Sequence[Axis], trials: Sequence[Trial], *, seed: int, lower: bool) -> dict[str, Value]:
    """The settings of the next trial.

    Args:
        axes: What is searched.
        trials: Those before it, some perhaps still running.
        seed: The recipe's; with the number of trials it decides chance.
        lower: Whether a lower metric is better.

    **Source**: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011, section 4 (TPE), by optuna;
    its first ten trials are random.
    """
    optuna = import_optuna()
    # Multivariate search would be better where settings depend on each other, but optuna calls it experimental.
    sampler = optuna.samplers.TPESampler(
        seed=mix_seed(seed, _SEARCH, len(trials)) % 2**32, constant_liar=True
    )
    study = optuna.create_study(direction="minimize" if lower else "maximize", sampler=sampler)
    space = {axis.key: _distribution(optuna, axis) for axis in axes}
    for trial in sorted(trials, key=lambda one: one.number):
        study.add_trial(_as_optuna_has_it(optuna, trial, space))
    found = study.ask(space).params
    return {axis.key: found[axis.key] if axis.values else axis.rounded(found[axis.key]) for axis in axes}


def _distribution(optuna: Any, axis: Axis) -> Any:
    kinds = optuna.distributions
    if axis.values:
        return kinds.CategoricalDistribution(axis.values)
    if axis.whole:
        step = 1 if axis.step is None else int(axis.step)
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=step)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _as_optuna_has_it(optuna: Any, trial: Trial, space: Mapping[str, Any]) -> Any:
    states = optuna.trial.TrialState
    state = {
        "running": states.RUNNING,
        "done": states.COMPLETE,
        "pruned": states.PRUNED,
        "failed": states.FAIL,
    }[trial.state]
    return optuna.trial.create_trial(
        state=state,
        value=trial.value if trial.state == "done" else None,
        params=trial.params,
        distributions=dict(space),
        intermediate_values=trial.curve,
    )


def is_hopeless(curve: Mapping[int, float], others: Sequence[Trial], *, lower: bool) -> bool:
    """Whether a trial's best up to now is worse than what half of the finished trials had reached by that step.

    Args:
        curve: Its metric by step.
        others: All trials; those that are done count.
        lower: Whether a lower metric is better.

    **Source**: Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017, section 3.2.2 (there
    with running averages).
    """
    if not curve:
        return False
    choose, step = min if lower else max, max(curve)
    reached = [
        choose(early)
        for other in others
        if other.state == "done" and (early := [value for at, value in other.curve.items() if at <= step])
    ]
    if len(reached) < FEWEST_TO_PRUNE:
        return False
    mine, middle = choose(curve.values()), median(reached)
    return mine > middle if lower else mine < middle


def ranked(trials: Sequence[Trial], *, lower: bool) -> list[Trial]:
    """The best first: those that are done, then those given up, then the others."""
    order = {"done": 0, "pruned": 1, "running": 2, "failed": 3}

    def key(trial: Trial) -> tuple[int, float, int]:
        value = 0.0 if trial.value is None else trial.value
        return order[trial.state], value if lower else -value, trial.number

    return sorted(trials, key=key)
