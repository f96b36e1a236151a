"""A frozen model to learn from: found, loaded and checked against the run's tokenizer, labels and lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from llmkit.data.tokenizers import fingerprint, load_tokenizer
from llmkit.errors import MissingError, UsageError
from llmkit.models.build import load_weights, max_length
from llmkit.models.heads import choose_heads
from llmkit.models.tasks import build_task_model, labels_of_model
from llmkit.objectives.texts import pad_id
from llmkit.registry import ModelKind
from llmkit.train.places import model_folder


def load_teacher(name: str, kind: ModelKind, tokenizer: Any, *, context: int) -> PreTrainedModel:
    """The teacher of an objective on text, in float32 on CPU, in evaluation mode, without gradients.

    Args:
        name: A run, its folder, a model folder or a name on the Hub.
        kind: What it must be.
        tokenizer: The run's.
        context: The tokens of a row.

    Raises:
        MissingError: There is no such model.
        UsageError: Its tokenizer is another one, so its probabilities are of other tokens; or it reads less.
    """
    folder = model_folder(name)
    try:
        model = load_weights(folder, kind, trusted=False)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"pretrain.distil.teacher: {name!r} cannot be loaded ({str(error).splitlines()[0]})",
            hint="give a run, a model folder, or a Hub id while online; it must be a model for the same objective",
        ) from error
    _check(model, name, tokenizer, "pretrain", context)
    choose_heads(model, kind)
    return model.requires_grad_(False).eval()


def load_task_teacher(
    name: str,
    kind: ModelKind,
    tokenizer: Any,
    *,
    labels: Sequence[str],
    number: bool,
    context: int,
) -> PreTrainedModel:
    """The teacher of a task, with its head; likewise. What it says of labels is in the run's order.

    Args:
        name: A run, its folder, a model folder or a name on the Hub.
        kind: What it must be.
        tokenizer: The run's.
        labels: Names of classes or tags, in the order of their numbers; empty where there are none.
        number: It says one number.
        context: The tokens that a row has at most.

    Raises:
        MissingError: There is no such model.
        UsageError: It was trained for other labels or another task, its tokenizer is another one, or it reads less.
    """
    folder = model_folder(name)
    known = labels_of_model(folder) if labels else []
    if sorted(known) != sorted(labels):
        missing = sorted(set(labels) - set(known))
        raise UsageError(
            f"finetune.distil.teacher: {name!r} knows {len(known)} labels, this run has {len(labels)}"
            + (f"; it does not know {', '.join(map(repr, missing[:3]))}" if missing else ""),
            hint="give a model that was fine-tuned on the same labels",
        )
    model, new = build_task_model(folder, kind, labels=known, number=number, pad_token_id=pad_id(tokenizer))
    if new:
        raise UsageError(
            f"finetune.distil.teacher: {name!r} was not trained for this task: it lacks {', '.join(new[:3])}",
            hint="fine-tune it first, and give that run",
        )
    _check(model, name, tokenizer, "finetune", context)
    choose_heads(model, kind)
    if known != list(labels):
        _reorder(model, [known.index(label) for label in labels])
    return model.requires_grad_(False).eval()


def _check(model: PreTrainedModel, name: str, tokenizer: Any, section: str, context: int) -> None:
    folder = model_folder(name)
    if fingerprint(load_tokenizer(folder)) != fingerprint(tokenizer):
        raise UsageError(
            f"{section}.distil.teacher: {name!r} has another tokenizer than this run, so its probabilities are of "
            "other tokens",
            hint=f"{section}.tokenizer={folder}",
        )
    longest = max_length(model.config)
    if longest is not None and longest < context:
        raise UsageError(
            f"{section}.distil.teacher: {name!r} reads at most {longest} tokens, fewer than `context: {context}`",
            hint=f"{section}.model.context={longest}",
        )


def _reorder(model: PreTrainedModel, places: list[int]) -> None:
    """Have a model say its logits, the last dimension of them, in another order."""

    def turn(_: torch.nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits[..., places]
        return output

    model.register_forward_hook(turn)
