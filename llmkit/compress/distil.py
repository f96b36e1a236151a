"""A student made of its teacher: fewer of its layers, or fewer channels in them; training teaches it afterwards.

**Source**: Sanh et al., "DistilBERT", 2019, section 3 (a student begins with layers of its teacher's); Muralidharan et
al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), NeurIPS 2024, section 3.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmkit.compress.families import family_of
from llmkit.compress.given import Given, Made
from llmkit.compress.importance import influences
from llmkit.compress.prune import fewer_channels
from llmkit.compress.structure import block_names, check_plain, with_layers
from llmkit.errors import UsageError
from llmkit.recipe.compression import Step


def apply(given: Given, step: Step) -> Made:
    """Make the student.

    Args:
        given: The teacher, and what it learned from.
        step: The student's layers and channels.

    Raises:
        UsageError: It would be the teacher, or have more layers, or nothing is known of the architecture.
    """
    check_plain(given.model)
    family = family_of(given.model.config)
    depths = [len(names) for names in block_names(given.model)]
    wanted, share = step.layers or min(depths), 1 - (step.channels or 1.0)
    if wanted > min(depths):
        raise UsageError(
            f"distil: layers: {wanted}, and the teacher has {min(depths)}", hint="a student has fewer"
        )
    if all(depth == wanted for depth in depths) and not share:
        raise UsageError(
            f"distil: the student has all {wanted} layers and all channels of its teacher",
            hint=f"give it fewer: layers: {max(1, wanted // 2)}, or channels: 50%",
        )
    before = given.model.num_parameters()
    facts: dict[str, Any] = {
        "choose": step.choose or "uniform",
        "teacher": {"layers": depths, "num_parameters": before},
    }
    if any(depth != wanted for depth in depths):
        kept = _choose(given, step.choose or "uniform", wanted, depths, first=family.pinned)
        given.told(f"the student begins with layers {'; '.join(', '.join(map(str, k)) for k in kept)}")
        facts["kept"] = kept
        given = _with(given, with_layers(given.model, kept))
    model = given.model
    if share:
        model, done = fewer_channels(given, share, by="activation", damping=0.01)
        facts |= done
    warnings = facts.pop("warnings", [])
    return Made(model, {**facts, "num_parameters": model.num_parameters()}, warnings=warnings)


def _choose(given: Given, how: str, wanted: int, depths: Sequence[int], *, first: bool) -> list[list[int]]:
    """The teacher's layers that the student begins with, for each list of blocks."""
    if how == "first":
        return [list(range(wanted)) for _ in depths]
    if how == "uniform":
        return [evenly(depth, wanted) for depth in depths]
    kept = []
    for scores in influences(given.core, given.batches):
        ranked = sorted(range(len(scores)), key=lambda n: (first and n == 0, scores[n], -n), reverse=True)
        kept.append(sorted(ranked[:wanted]))
    return kept


def evenly(depth: int, wanted: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them; of one alone the first."""
    if wanted == 1:
        return [0]
    return [round(number * (depth - 1) / (wanted - 1)) for number in range(wanted)]


def _with(given: Given, model: Any) -> Given:
    given.core.model = model
    return replace(given)
