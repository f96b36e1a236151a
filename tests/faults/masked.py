"""Objectives for tests alone: one with random masks, to prove that chance survives a crash; one that text can break."""

from dataclasses import replace
from typing import Literal

import numpy as np

from llmkit import registry
from llmkit.objectives.base import NOT_LEARNED, Loss, cross_entropy
from llmkit.objectives.clm import CausalLM
from llmkit.recipe import schema

NAME = "test-masks"
BREAKABLE = "test-breakable"


class RandomMasks(CausalLM):
    """A third of the targets is left out and a third of the inputs is replaced, both at random."""

    def encode(self, row):
        """Mask by numpy's generator, seeded by the row."""
        example = dict(super().encode(row))
        chance = np.random.default_rng(int(row["seed"]))
        length = len(example["targets"])
        replaced = chance.random(length) < 1 / 3
        example["input_ids"] = np.where(replaced, chance.integers(0, 256, length), example["input_ids"])
        left_out = chance.random(length) < 1 / 3
        left_out[0] = False
        example["targets"] = np.where(left_out, NOT_LEARNED, example["targets"])
        return example


class Breakable(CausalLM):
    """The loss of a training row that is one token over and over is not a number."""

    def loss(self, model, batch, criterion=cross_entropy):
        """As `CausalLM`, but for such rows."""
        loss = super().loss(model, batch, criterion)
        ids_BT = batch["input_ids"]
        is_bad = model.training and bool((ids_BT.amax(dim=1) == ids_BT.amin(dim=1)).any())
        return Loss({"num_targets": loss.total * float("nan")}) if is_bad else loss


def random_masks(section, vocabulary):
    """Build the objective that is named `NAME`."""
    return RandomMasks()


def breakable(section, vocabulary):
    """Build the objective that is named `BREAKABLE`."""
    return Breakable()


def register(*names: str) -> None:
    """Let recipes of this process name them."""
    builders = {NAME: random_masks, BREAKABLE: breakable}
    for name in names:
        code = f"{__name__}:{builders[name].__name__}"
        registry.OBJECTIVES[name] = replace(registry.OBJECTIVES["clm"], code=code)
    known = schema.Pretrain.model_fields["objective"]
    known.annotation = Literal[tuple(registry.OBJECTIVES)]
    schema.Pretrain.model_rebuild(force=True)
    schema.Recipe.model_rebuild(force=True)
