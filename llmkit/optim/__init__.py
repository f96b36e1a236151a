"""Optimizers, which parameters they treat how, and the learning rate as a pure function of the step."""

from llmkit.optim.average import averaged
from llmkit.optim.groups import describe_groups, hold_back, parameter_groups, parameter_names, set_lr
from llmkit.optim.kept import mark_zeros
from llmkit.optim.make import like, make_optimizer
from llmkit.optim.noise import add_noise
from llmkit.optim.schedules import lr_at

__all__ = [
    "add_noise",
    "averaged",
    "describe_groups",
    "hold_back",
    "like",
    "lr_at",
    "make_optimizer",
    "mark_zeros",
    "parameter_groups",
    "parameter_names",
    "set_lr",
]
