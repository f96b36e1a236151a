"""What each optimizer and each schedule has to set, and its defaults: facts known without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_OPTIMIZER = "adamw"
DEFAULT_SCHEDULE = "cosine"

_ADAM = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Traits:
    """An optimizer as far as it is known without its code.

    Attributes:
        defaults: The settings that it has, with what they are where the recipe says nothing.
        state_bytes: What it remembers, in bytes for each number of a matrix, at most.
    """

    defaults: Mapping[str, Any]
    state_bytes: float


OPTIMIZERS: Mapping[str, Traits] = {
    "adamw": Traits(_ADAM, 8),
    "adam": Traits({**_ADAM, "betas": (0.9, 0.999), "weight_decay": 0.0}, 8),
    "sgd": Traits({"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}, 4),
    "adafactor": Traits({"lr": 1e-2, "weight_decay": 0.0}, 0.1),
    "lion": Traits({"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.5}, 4),
    "muon": Traits(
        {**_ADAM, "momentum": 0.95, "nesterov": True, "muon_scale": "rms", "muon_lr": None},
        8,  # of what is AdamW's; the hidden matrices have 4
    ),
    "adamw8bit": Traits(_ADAM, 2.04),
    "schedule_free": Traits({**_ADAM, "lr": 2.5e-3, "betas": (0.9, 0.999), "schedule": "constant"}, 8),
}

SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "exponential": {},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {},
    "wsd": {"decay": 0.2},
}
"""The settings that only some schedules have, with their defaults."""

MUON_LR = 0.02
"""The peak learning rate of matrices under `muon_scale: original`, as its author published it."""


def owners(setting: str) -> list[str]:
    """The optimizers, or the schedules, that have a setting; empty where all have it."""
    for table in ({name: traits.defaults for name, traits in OPTIMIZERS.items()}, SCHEDULES):
        having = [name for name, settings in table.items() if setting in settings]
        if 0 < len(having) < len(table) and setting != "schedule":
            return having
    return []


PARTIAL_SETTINGS: Mapping[str, list[str]] = {
    name: owners(name)
    for name in ("betas", "eps", "momentum", "nesterov", "muon_lr", "muon_scale", "decay", "power")
}
"""The settings that not every optimizer, or schedule, has: by which they are had."""


def settings_of(name: str) -> list[str]:
    """The settings that not all have and this optimizer, or schedule, has."""
    return [setting for setting, having in PARTIAL_SETTINGS.items() if name in having]


def with_defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """An `optim` block with the defaults of the optimizer and the schedule that it names."""
    name = written.get("name", DEFAULT_OPTIMIZER)
    traits = OPTIMIZERS.get(name) if isinstance(name, str) else None
    filled = _filled(written, traits.defaults if traits else {})
    if filled.get("muon_scale") == "original":
        filled = _filled(filled, {"muon_lr": MUON_LR})
    schedule = filled.get("schedule", DEFAULT_SCHEDULE)
    return _filled(filled, SCHEDULES.get(schedule, {}) if isinstance(schedule, str) else {})


def _filled(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Null stands for the default, but where a setting must have a value."""
    unset = {
        key: value
        for key, value in defaults.items()
        if key not in written or (written[key] is None and key in PARTIAL_SETTINGS)
    }
    return {**written, **unset}


def state_bytes_per_parameter(name: str, momentum: float | None = None, *, ema: bool = False) -> float:
    """Bytes of optimizer state for each parameter at most, for the estimate of memory and checkpoints."""
    own = 0.0 if name == "sgd" and momentum == 0 else OPTIMIZERS[name].state_bytes
    return own + (4 if ema else 0)
