"""Room for new tokens in a model's vocabulary.

Shape suffixes: V entries of the vocabulary, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import UsageError

_SPREAD = 0.01
"""How far apart new entries begin, in standard deviations of the old ones: enough to tell two new tokens apart."""


def grow_vocabulary(model: PreTrainedModel, num_tokens: int, num_new: int, *, seed: int = 0) -> int:
    """Give the last `num_new` of `num_tokens` tokens entries in embedding and output layer that begin as the mean.

    Entries that are there already but belong to no token, as many models have, are used before new ones are made.

    Args:
        model: On any device; on the meta device only the shapes change.
        num_tokens: All tokens.
        num_new: Those of them that are new.
        seed: Decides by how little new entries differ from the mean of the old ones.

    Returns:
        How many entries were made.

    **Source**: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if num_tokens > before:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    draw = torch.Generator().manual_seed(seed)
    for weight_VH in _vocabulary_weights(model):
        if weight_VH.device.type != "meta":
            _begin_as_mean(weight_VH, num_tokens - num_new, num_tokens, draw)
    return max(0, num_tokens - before)


def check_new_tokens(model: PreTrainedModel, added: Sequence[str]) -> None:
    """See that what new tokens mean can be learned.

    Raises:
        UsageError: The embedding does not learn.
    """
    size = model.get_input_embeddings().weight.shape[0]
    learning = (p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p.shape[0] == size)
    if added and not any(True for _ in learning):
        raise UsageError(
            f"the chat template adds {', '.join(added)} to the vocabulary, and the embeddings do not learn, so nobody "
            "would ever know these tokens",
            hint="let them learn: with an adapter `adapter.whole: embed_tokens|lm_head`; or name a template that needs "
            "no new tokens",
        )


def _vocabulary_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """Those of the embedding and the output layer; one, where they are tied. And the output layer's bias."""
    layers = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    found = [layer.weight for layer in layers]
    found += [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    return list({id(weight): weight for weight in found}.values())


@torch.no_grad()
def _begin_as_mean(weight: torch.Tensor, start: int, stop: int, draw: torch.Generator) -> None:
    old = weight[:start].float()
    noise = torch.randn(stop - start, *weight.shape[1:], generator=draw).to(weight.device)
    weight[start:stop] = (old.mean(0) + _SPREAD * old.std(0) * noise).to(weight.dtype)
