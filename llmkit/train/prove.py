"""Proofs on the user's own model before hours are spent: seconds of forward passes on a few tokens.

Both would otherwise go wrong in silence: an architecture that changes its logits after the head would train on
another function than the one it exports, and one that ignores `position_ids` would mix isolated documents.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from llmkit.errors import UsageError

_TOKENS = 24
_TOLERANCE = 1e-3


def prove_head(model: PreTrainedModel) -> None:
    """The model's logits are what its head makes of its last hidden states, as the loss assumes.

    Raises:
        UsageError: They are scaled or capped afterwards.
    """
    ids = _some_ids(model)
    with torch.no_grad(), _evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = model.get_output_embeddings()(hidden)
    if ours.shape != logits.shape or _distance(ours, logits) > _TOLERANCE:
        raise UsageError(
            f"{model.config.model_type} changes its logits after the output layer (scaling or capping), which this "
            "version does not train",
            hint="choose another architecture, such as llama, qwen3, mistral or gpt2",
        )


def prove_isolation(model: PreTrainedModel) -> None:
    """With positions that restart, the second document's hidden states do not depend on the first's tokens.

    Raises:
        UsageError: They do: the architecture does not isolate documents by their positions.
    """
    ids = _some_ids(model)
    half = _TOKENS // 2
    positions = (torch.arange(_TOKENS, device=ids.device) % half).unsqueeze(0)
    other = ids.clone()
    other[:, :half] = ids[:, :half].flip(1)
    with torch.no_grad(), _evaluating(model):
        one, two = (
            model.base_model(input_ids=i, position_ids=positions, use_cache=False).last_hidden_state
            for i in (ids, other)
        )
    if _distance(one[:, half:], two[:, half:]) > _TOLERANCE:
        raise UsageError(
            f"{model.config.model_type} does not keep documents in a row apart",
            hint="pretrain.isolate_documents=false, or another architecture, such as llama, qwen3 or mistral",
        )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _some_ids(model: PreTrainedModel) -> torch.Tensor:
    size = model.get_input_embeddings().weight.shape[0]
    return ((torch.arange(_TOKENS) * 7 + 3) % size).unsqueeze(0).to(model.device)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the larger of 1 and the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
