"""Integrated gradients: what a model says of a text, shared out among the text's tokens.

Shape suffixes: B rows, T positions, E embedding.

**Source**: Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017, sections 3 and 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from llmkit.errors import MissingError, UsageError

Said = Callable[[torch.Tensor], torch.Tensor]
"""Ids, [B, T] -> the number that is shared out, [B]."""
MOST_STEPS = 1000
"""Points between baseline and text at most, whatever is missing then."""
_FEWEST = 8
_TOKENS_AT_ONCE = 2048
_SHARE, _LEAST = 0.02, 0.01


@dataclass(frozen=True)
class Shared:
    """A change, shared out.

    Attributes:
        scores: Each token's share, [T], in float64.
        value: What the model says of the text.
        baseline_value: What it says of the baseline.
        steps: Points at which gradients were taken.
    """

    scores: torch.Tensor
    value: float
    baseline_value: float
    steps: int


@dataclass(frozen=True)
class _Stretch:
    """A part of the way from the baseline, 0, to the text, 1.

    Attributes:
        low: Where it begins.
        high: Where it ends.
        scores: The tokens' shares of the change on it, [T].
        miss: By how much these sum to more than the change.
    """

    low: float
    high: float
    scores: torch.Tensor
    miss: float


def integrated_gradients(
    model: PreTrainedModel, said: Said, ids_BT: torch.Tensor, base_BT: torch.Tensor, steps: int
) -> Shared:
    """What each token adds to what a model says.

    Gradients are taken at points of the straight way between the two texts' embeddings. Where the shares do not sum to
    the change, the stretch that misses most is halved, again and again: what a model says may change all at once.

    Args:
        model: The model; what its input embeddings give is what is moved.
        said: Ids [B, T] -> the number that is explained, [B].
        ids_BT: The text, one row.
        base_BT: The baseline, as long.
        steps: Points to begin with.

    Raises:
        UsageError: The model has no embeddings, or two readers that share them.
        MissingError: captum is not installed.
    """
    layer = _embeddings(model)
    with torch.no_grad():
        text_BTE, base_BTE = layer(ids_BT), layer(base_BT)

    def said_of(given_BTE: torch.Tensor) -> torch.Tensor:
        hook = layer.register_forward_hook(lambda module, words, made: given_BTE)
        try:
            return said(ids_BT.expand(len(given_BTE), -1))
        finally:
            hook.remove()

    method = import_captum().IntegratedGradients(said_of, multiply_by_inputs=True)

    @cache
    def value_at(place: float) -> float:
        with torch.no_grad():
            return float(said_of(base_BTE + place * (text_BTE - base_BTE)))

    def shared_out(low: float, high: float, points: int) -> _Stretch:
        begin, end = (base_BTE + place * (text_BTE - base_BTE) for place in (low, high))
        at_once = max(1, _TOKENS_AT_ONCE // ids_BT.shape[1])
        found = method.attribute(end, baselines=begin, n_steps=points, internal_batch_size=at_once)
        scores = found[0].double().sum(-1).detach().cpu()
        return _Stretch(low, high, scores, float(scores.sum()) - (value_at(high) - value_at(low)))

    change = value_at(1.0) - value_at(0.0)
    stretches, part = [shared_out(0.0, 1.0, steps)], max(_FEWEST, steps // 5)
    while not is_complete(sum(abs(one.miss) for one in stretches), change):
        if steps + 2 * part > MOST_STEPS:
            break
        worst = max(stretches, key=lambda one: abs(one.miss))
        stretches.remove(worst)
        middle = (worst.low + worst.high) / 2
        stretches += [shared_out(worst.low, middle, part), shared_out(middle, worst.high, part)]
        steps += 2 * part
    total = torch.stack([one.scores for one in stretches]).sum(0)
    return Shared(total, value_at(1.0), value_at(0.0), steps)


def import_captum() -> Any:
    """What captum has for attribution; only explaining needs it.

    Raises:
        MissingError: It is not installed.
    """
    try:
        from captum import attr
    except ImportError as error:
        raise MissingError(
            "explaining needs the package captum", hint='pip install "llmkit[explain]"'
        ) from error
    return attr


def is_complete(delta: float, change: float) -> bool:
    """Whether shares that sum to this much more than the change are good enough."""
    return abs(delta) <= max(_LEAST, _SHARE * abs(change))


def _embeddings(model: PreTrainedModel) -> torch.nn.Module:
    if model.config.is_encoder_decoder:
        raise UsageError(
            f"a {model.config.model_type} reads a text twice, by encoder and decoder: it cannot be explained yet",
            hint="explain an encoder or a decoder",
        )
    found = model.get_input_embeddings()
    if found is None:
        raise UsageError(
            f"a {model.config.model_type} looks its probabilities up: it has no gradients to explain it by",
            hint="explain a model with embeddings",
        )
    return found
