"""An adapter put into the weights of its model, which is a plain one again; compared with what it was before.

Shape suffixes: N predictions, C classes or tokens that each chooses from, D numbers of a value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmkit.errors import GateError
from llmkit.models.quantized import bits_of, whole_linear


def merge_adapters(
    model: PreTrainedModel, predict: Callable[[], torch.Tensor], *, max_kl: float, classes: bool = True
) -> float:
    """Put the active adapter into the model's own weights, and see that it predicts as before.

    Afterwards the model is a plain one again: its layers, names and class are those of the base.

    Args:
        model: Holds an adapter; in evaluation mode, on any device. What was quantised is made whole first.
        predict: The model's logits [N, C] on real rows, as it is when called; or values [N] or [N, D].
        max_kl: How far predictions may lie apart, as `divergence` measures it.
        classes: Whether the numbers are logits to choose from.

    Returns:
        How far they lie apart.

    Raises:
        GateError: Farther than `max_kl`; the model is merged all the same, and is not to be exported.
    """
    with torch.no_grad():
        before = predict().float().cpu()
        unload(model)
        after = predict().float().cpu()
    apart = divergence(before, after, classes=classes)
    if not apart <= max_kl:
        raise GateError(
            f"merging the adapter changes the model: its predictions on real rows lie {apart:.2g} nats apart, more "
            f"than `adapter.max_kl: {max_kl:g}`",
            hint="export the adapter alone (`adapter.merge: false`), or raise the bound",
        )
    return apart


def unload(model: PreTrainedModel, *, merge: bool = True) -> None:
    """Take PEFT's layers out of the model, the active adapters merged into its weights; or without these."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(
                merge=merge, safe_merge=merge, adapter_names=None
            )
        elif isinstance(module, BaseTunerLayer):
            plain = _merged(module) if merge else module.get_base_layer()
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    del model.peft_config
    model.tie_weights()


def _merged(layer: Any) -> nn.Module:
    base: nn.Module = layer.get_base_layer()
    if not bits_of(base):
        layer.merge(safe_merge=True)
        return base
    # Merging into few bits would round the adapter away: the base is made whole first.
    plain = whole_linear(base)
    with torch.no_grad():
        for name in layer.active_adapters:
            plain.weight += layer.get_delta_weight(name).to(plain.weight.dtype)
    return plain


def divergence(before_NC: torch.Tensor, after_NC: torch.Tensor, *, classes: bool) -> float:
    """How far predictions lie apart, as the mean over N of KL(before || after) in nats.

    Of values that are no logits it is that of normal distributions around them, with the variance of `before`: half
    the squared distance, in such variances.

    Args:
        before_NC: Logits, where `-inf` rules an answer out; or values [N] or [N, D].
        after_NC: Those to compare, of the same shape.
        classes: Whether they are logits.
    """
    p, q = before_NC.double(), after_NC.double()
    if not classes:
        return float(((p - q).square().mean() / p.var().clamp(min=1e-12)) / 2)
    log_p, log_q = functional.log_softmax(p, -1), functional.log_softmax(q, -1)
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
    apart = float(terms.sum(-1).mean())
    return 0.0 if -1e-9 < apart < 0 else apart  # rounding; a nan stays one
