"""A frozen model to learn from: found, loaded and checked against the run's tokenizer."""

from typing import Any

from transformers import PreTrainedModel

from llmkit.data.tokenizers import fingerprint, load_tokenizer
from llmkit.errors import MissingError, UsageError
from llmkit.models.build import load_weights, max_length
from llmkit.models.heads import choose_heads
from llmkit.registry import ModelKind
from llmkit.train.places import model_folder


def load_teacher(name: str, kind: ModelKind, tokenizer: Any, *, context: int) -> PreTrainedModel:
    """The teacher, in float32 on CPU, in evaluation mode, without gradients.

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
    if fingerprint(load_tokenizer(folder)) != fingerprint(tokenizer):
        raise UsageError(
            f"pretrain.distil.teacher: {name!r} has another tokenizer than this run, so its probabilities are of other "
            "tokens",
            hint=f"pretrain.tokenizer={folder}",
        )
    longest = max_length(model.config)
    if longest is not None and longest < context:
        raise UsageError(
            f"pretrain.distil.teacher: {name!r} reads at most {longest} tokens, fewer than `context: {context}`",
            hint=f"pretrain.model.context={longest}",
        )
    choose_heads(model, kind)
    return model.requires_grad_(False).eval()
