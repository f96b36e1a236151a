"""What is lowered in place of the plain cross-entropy: weighted classes, hard rows first, two passes that agree.

Each is a sum in nats like any other criterion. Weights of classes are scaled so that a training row weighs 1 on
average, so a sum is divided by a count as ever, and learning rates keep their meaning.

Shape suffixes: N targets in a line, C classes, L labels that each apply or not, B rows.
"""

import hashlib
import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from llmkit import registry
from llmkit.durable import hash_file
from llmkit.errors import MissingError, RunError, UsageError
from llmkit.models.heads import Scores
from llmkit.objectives.base import NOT_LEARNED, Batch, Criterion, Material, smoothed_cross_entropy
from llmkit.recipe.schema import Finetune
from llmkit.recipe.tasks import Loss


def make_criterion(section: Finetune, material: Material) -> Criterion:
    """The criterion that a `finetune` section asks for.

    Args:
        section: Its `loss`, and the label smoothing and z-loss of its `train`.
        material: Its labels, and how many of the rows to learn from have each (`train_classes` of the facts; of
            `tag`, how many tokens).

    Raises:
        UsageError: A weight is of no label, or the loss of the user's own is not to be trusted or no function.
        MissingError: There is no such loss.
    """
    wanted, train = section.loss, section.train
    if wanted.custom is not None:
        return _Custom(wanted.custom, _custom(wanted.custom, trusted=wanted.trust_custom_code))
    if wanted.weights == "none" and not wanted.focal:
        return smoothed_cross_entropy(train.label_smoothing, train.z_loss)
    weights = None
    if wanted.weights != "none":
        weights = torch.tensor(
            class_weights(wanted.weights, material.labels, material.facts["train_classes"])
        )
    return Weighted(weights, wanted.focal, train.label_smoothing, train.z_loss)


def class_weights(
    wanted: str | Mapping[str, float], labels: tuple[str, ...], counts: Mapping[str, int]
) -> list[float]:
    """The weight of each class, 1 on average over rows.

    Args:
        wanted: `balanced`, so that the rows of each class weigh the same together; or weights by label, 1 for those
            that are not named.
        labels: The classes.
        counts: Training rows of each.

    Raises:
        UsageError: A weight is of no label.
    """
    if isinstance(wanted, str):
        raw = [1 / max(1, counts.get(label, 0)) for label in labels]
    else:
        unknown = sorted(set(wanted) - set(labels))
        if unknown:
            guess = registry.nearest(unknown[0], labels)
            raise UsageError(
                f"loss.weights: there is no label {unknown[0]!r}",
                hint=f"did you mean {guess!r}?" if guess else f"there are {', '.join(labels[:10])}",
            )
        raw = [float(wanted.get(label, 1.0)) for label in labels]
    rows = [counts.get(label, 0) for label in labels]
    scale = sum(rows) / sum(weight * count for weight, count in zip(raw, rows, strict=True))
    return [weight * scale for weight in raw]


@dataclass(frozen=True)
class Weighted:
    """Cross-entropy whose rows weigh differently: by their class, and by how far they are from being right.

    Attributes:
        weights_C: The weight of each class; None: 1.
        gamma: A target's loss is multiplied by `(1 - p)**gamma`, p being what the model gives it.
        label_smoothing: The share of each target's probability that is spread evenly over the classes.
        z_loss: Adds so many times the square of each target's log-normaliser.

    **Source**: Lin et al., "Focal Loss for Dense Object Detection", 2017, section 3.2.
    """

    weights_C: torch.Tensor | None
    gamma: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
        """The sum over the targets."""
        index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
        logits_NC, targets_N = scores.logits(index).float(), targets_N[index]
        log_NC = logits_NC.log_softmax(1)
        log_N = log_NC.gather(1, targets_N.unsqueeze(1)).squeeze(1)
        each_N = -log_N
        if self.label_smoothing:
            each_N = (1 - self.label_smoothing) * each_N - self.label_smoothing * log_NC.mean(1)
        if self.gamma:
            # 1 - p by expm1, and never quite 0: its power has an infinite slope there for a gamma below 1.
            each_N = each_N * (-torch.expm1(log_N)).clamp(min=1e-7).pow(self.gamma)
        if self.weights_C is not None:
            each_N = each_N * self.weights_C.to(each_N.device)[targets_N]
        if self.z_loss:
            each_N = each_N + self.z_loss * logits_NC.logsumexp(1).square()
        return each_N.sum()


@dataclass(frozen=True)
class _Custom:
    """A loss of the user's own: given logits [N, C] and targets [N], none of them unlearned, it gives their sum."""

    name: str
    function: Any

    def __call__(self, scores: Scores, targets_N: torch.Tensor) -> torch.Tensor:
        index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
        total = self.function(scores.logits(index).float(), targets_N[index])
        if not isinstance(total, torch.Tensor) or total.dim():
            raise RunError(
                f"{self.name}: the loss of {len(index):,} targets must be one number, their sum as a tensor, not "
                f"{tuple(total.shape) if isinstance(total, torch.Tensor) else type(total).__name__}",
                hint="return each.sum()",
            )
        return total


def _custom(name: str, *, trusted: bool) -> Any:
    if not trusted:
        raise UsageError(
            f"loss.custom: {name} is code of your own that would run here",
            hint="if you trust it: finetune.loss.trust_custom_code=true",
        )
    try:
        found = registry.load(name)
    except (ImportError, AttributeError) as error:
        raise MissingError(
            f"loss.custom: {name} cannot be imported ({error})",
            hint="install its package here, or name it as `package.module:Name`",
        ) from error
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise UsageError(f"loss.custom: {name} is no function", hint="it takes logits and targets")
    return found


def hash_code(wanted: Loss) -> str:
    """A hash of the files that have the code of `loss.custom`: its module, and where it is defined; not what they use.

    Raises:
        UsageError: It is not to be trusted.
        MissingError: There is no such loss.
    """
    name = wanted.custom
    assert name is not None
    code = _custom(name, trusted=wanted.trust_custom_code)
    paths: set[Path] = set()
    for made in (sys.modules[name.split(":")[0]], code, type(code)):
        with suppress(TypeError):  # it has no file
            path = inspect.getsourcefile(made)
            if path is not None and Path(path).is_file():
                paths.add(Path(path))
    return hashlib.sha256("".join(sorted(hash_file(path) for path in paths)).encode()).hexdigest()


def twofold(logits_BL: torch.Tensor) -> torch.Tensor:
    """[B*L, 2]: labels that each apply or not, as two classes: the cross-entropy of both is that of one logit."""
    logits_N = logits_BL.flatten()
    return torch.stack([torch.zeros_like(logits_N), logits_N], 1)


def doubled(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch with every row twice, in the same order again: dropout treats the two otherwise."""
    return {name: torch.cat([value, value]) if value.dim() else value for name, value in batch.items()}


def agreeing(
    logits_NC: torch.Tensor, targets_N: torch.Tensor, criterion: Criterion, alpha: float
) -> torch.Tensor:
    """The mean of two passes' losses, and half of `alpha` times how far their distributions lie apart.

    This is half of what the paper lowers, so that 0 is the plain loss; its values of alpha hold.

    Args:
        logits_NC: Of a `doubled` batch.
        targets_N: Of both passes.
        criterion: The loss of each pass.
        alpha: 1 to 5 are common.

    **Source**: Liang et al., "R-Drop: Regularized Dropout for Neural Networks", 2021, section 2.2.
    """
    both = criterion(Scores(logits_NC), targets_N) / 2
    kept = targets_N[: len(targets_N) // 2] != NOT_LEARNED
    one_NC, two_NC = (half[kept].float().log_softmax(1) for half in logits_NC.chunk(2))
    apart = functional.kl_div(one_NC, two_NC, reduction="sum", log_target=True)
    apart = apart + functional.kl_div(two_NC, one_NC, reduction="sum", log_target=True)
    return both + alpha / 2 * (apart / 2)
