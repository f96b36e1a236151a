"""The settings of each task: blocks of the `finetune` section, and what a task has where nothing is said."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.recipe.block import Block
from llmkit.registry import TASKS


class Classes(Block):
    """How texts are sorted into classes."""

    labels: list[str] = []
    """The classes in the order of their numbers; by default those that the training rows have: numbers as numbers,
    else as texts sort."""
    multiple: bool = False
    """Whether a text may have several labels, or none: each is then judged by itself."""


class Tags(Block):
    """How words are tagged."""

    labels: list[str] = []
    """The tags in the order of their numbers; by default those of the training rows, `O` first."""


class Answers(Block):
    """How answers are found in a text."""

    stride: Annotated[int, Field(ge=1)] = 128
    """Tokens that two windows of a text share, where it is longer than the model reads."""


class Written(Block):
    """How a text is written to another."""


class Conversations(Block):
    """What is learned of conversations."""


class Preferences(Block):
    """How a better answer is told from a worse one."""


class Embeddings(Block):
    """How texts become vectors."""


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cls": {"lr": 5e-5},
    "regression": {"lr": 5e-5},
    "tag": {"lr": 5e-5},
    "qa": {"lr": 5e-5, "length": "2 epochs"},
    "seq2seq": {"lr": 3e-4},
    "sft": {"lr": 2e-5},
    "dpo": {"lr": 1e-6, "length": "1 epochs"},
    "embed": {"lr": 2e-5, "length": "1 epochs", "batch": "64 samples"},
}
"""By task: the peak learning rate of AdamW for the whole model, and a length and batch other than the usual."""

LENGTH, BATCH = "3 epochs", "32 samples"
ADAPTER_LR_RATIO = 10
"""An adapter starts from nothing and is small: it learns at so many times the rate of the whole model."""

_OPTIM: Mapping[str, Any] = {
    "warmup": "6%",
    "schedule": "linear",
    "min_lr_ratio": 0.0,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
}
_ANY_OPTIMIZER = ("warmup", "schedule", "min_lr_ratio")


def with_task_defaults(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `finetune` section with the task's length, batch and optimizer settings where it says nothing of them."""
    defaults = DEFAULTS.get(str(section.get("task")))
    train = section.get("train") or {}
    if defaults is None or not isinstance(train, Mapping):
        return section
    optim = train.get("optim") or {}
    if not isinstance(optim, Mapping):
        return section
    is_adamw = optim.get("name", "adamw") == "adamw"
    rate = defaults["lr"] * (ADAPTER_LR_RATIO if section.get("adapter") else 1)
    usual = {
        key: value
        for key, value in {"lr": rate, **_OPTIM}.items()
        if is_adamw or (key in _ANY_OPTIMIZER and optim.get("name") != "schedule_free")
    }
    filled = {
        "length": defaults.get("length", LENGTH),
        "batch": defaults.get("batch", BATCH),
        **train,
        "optim": {**usual, **optim},
    }
    return {**section, "train": filled}


def other_task_sections(task: str) -> set[str]:
    """The blocks of the `finetune` section that are settings of other tasks only."""
    own = TASKS[task].sections if task in TASKS else ()
    return {name for goal in TASKS.values() for name in goal.sections} - set(own)


Task = Literal["cls", "regression", "tag", "qa", "seq2seq", "sft", "dpo", "embed"]
