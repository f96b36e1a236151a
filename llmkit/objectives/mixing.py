"""Two rows as one: their embeddings are mixed before the model reads them, and their losses in the same shares.

Where one text is longer, its end is mixed with what fills the other up. A row of share 0 is not seen at all, so a share
of 1 gives the plain loss.

Shape suffixes: B rows, T positions of the longer text, H hidden size, C classes, K targets of a row.

**Source**: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, section 2; mixing the embeddings of words:
Guo, Mao and Zhang, "Augmenting Data with Mixup for Sentence Classification", 2019, section 3.2 (wordMixup).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkit.data.augment.mixing import MIXED, SHARE
from llmkit.errors import UsageError
from llmkit.objectives.base import Batch, Example, padded
from llmkit.objectives.texts import pad_id

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

_TOLERANCE = 1e-3
_LOOKED_AT = 8


def is_mixed(batch: Mapping[str, Any]) -> bool:
    """Whether each row of a batch, or an example, has another one beside it."""
    return SHARE in batch


def stack_mixed(tokenizer: Any, examples: Sequence[Example], *targets: str) -> dict[str, torch.Tensor]:
    """Stack both texts of mixed examples to [B, T], filled up on the right, with masks; and `share` [B].

    Args:
        tokenizer: The model's.
        examples: From `data.augment.mixing`.
        targets: Names of what is learned of a row, of as many numbers in each.
    """
    fills = {"input_ids": pad_id(tokenizer), "token_type_ids": 0, "attention_mask": 0}
    marked = [
        {
            **example,
            **{f"attention_mask{end}": np.ones_like(example[f"input_ids{end}"]) for end in ("", MIXED)},
        }
        for example in examples
    ]
    batch = padded(marked, {name + end: fill for name, fill in fills.items() for end in ("", MIXED)})
    for name in (SHARE, *targets, *(f"{name}{MIXED}" for name in targets)):
        batch[name] = torch.from_numpy(np.concatenate([example[name] for example in examples]))
    return batch


def mixed_logits(model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
    """[B, C]: what a model of the kind `sequence` says of mixed rows."""
    embed = model.get_input_embeddings()
    share_B11 = batch[SHARE].view(-1, 1, 1)
    own_BTH, other_BTH = (embed(batch[f"input_ids{end}"]) for end in ("", MIXED))
    mixed_BTH = share_B11 * own_BTH + (1 - share_B11) * other_BTH
    inputs = {"inputs_embeds": mixed_BTH.to(own_BTH.dtype), "attention_mask": _seen(batch)}
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = _types(batch)
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    head = _last_head(model)
    if head is None:
        logits_BC: torch.Tensor = model(**inputs).logits
        return logits_BC
    # A decoder judges at the last token, and transformers finds that by the ids.
    mask_BT = inputs["attention_mask"]
    hidden_BTH = model.base_model(**inputs).last_hidden_state
    last_B = (torch.arange(mask_BT.shape[1], device=mask_BT.device) * mask_BT).argmax(1)
    return head(hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B])


def mixed_total(batch: Batch, loss_of: Callable[[slice, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The sum of both losses of each row, each in its share.

    Args:
        batch: Of mixed rows.
        loss_of: Some rows and their targets [., K] -> the sum of their losses, as a criterion gives it.
    """
    totals = []
    for name, share_B in (("targets", batch[SHARE]), (f"targets{MIXED}", 1 - batch[SHARE])):
        # A criterion gives a sum: for each row to count in its share, it is asked row by row.
        rows = [slice(row, row + 1) for row in range(len(share_B))]
        each_B = torch.stack([loss_of(row, batch[name][row]) for row in rows])
        totals.append((share_B * each_B).sum())
    return totals[0] + totals[1]


def _seen(batch: Batch) -> torch.Tensor:
    """[B, T]: where either text has a token, but for a text of which nothing is left."""
    own_BT, other_BT = (batch[f"attention_mask{end}"] for end in ("", MIXED))
    share_B1 = batch[SHARE].unsqueeze(1)
    seen_BT = (own_BT.bool() & (share_B1 > 0)) | (other_BT.bool() & (share_B1 < 1))
    return seen_BT.to(own_BT.dtype)


def _types(batch: Batch) -> torch.Tensor:
    """[B, T]: which text of a pair each place is of, as in the row with the larger share where that has a token."""
    own_BT, other_BT = (batch[f"token_type_ids{end}"] for end in ("", MIXED))
    has_own_BT, has_other_BT = (batch[f"attention_mask{end}"].bool() for end in ("", MIXED))
    is_larger_B1 = (batch[SHARE] >= 0.5).unsqueeze(1)
    takes_own_BT = torch.where(is_larger_B1, has_own_BT | ~has_other_BT, has_own_BT & ~has_other_BT)
    return torch.where(takes_own_BT, own_BT, other_BT)


def _last_head(model: "PreTrainedModel") -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The head of a decoder, which reads the last token; None for an encoder, which finds its place itself."""
    return getattr(model, "score", None)


def check_mixable(model: "PreTrainedModel", name: str) -> None:
    """See that a model takes embeddings in place of tokens; it may be without weights.

    Raises:
        UsageError: It does not.
    """
    takes = "inputs_embeds" in inspect.signature(model.forward).parameters
    if takes and not model.config.is_encoder_decoder and model.config.model_type not in ("t5", "mt5", "umt5"):
        return
    raise UsageError(
        f"finetune.loss.mixup mixes the embeddings of texts, and {name} ({model.config.model_type}) judges tokens only",
        hint="finetune.loss.mixup=0, or a model such as bert, roberta, modernbert, llama or qwen3",
    )


@torch.no_grad()
def check_unchanged(model: "PreTrainedModel") -> None:
    """See that a text of share 1 is judged as it is alone: what is learned of mixtures then holds for texts.

    Raises:
        UsageError: It is not.
    """
    size = model.get_input_embeddings().weight.shape[0]
    ids_1T = ((torch.arange(_LOOKED_AT) * 7 + 3) % size).unsqueeze(0).to(model.device)
    alone = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    beside = {f"{name}{MIXED}": tensor.flip(1) for name, tensor in alone.items()}
    training = model.training
    model.eval()
    try:
        plain_1C = model(**alone).logits
        mixed_1C = mixed_logits(model, {**alone, **beside, SHARE: torch.ones(1, device=model.device)})
    finally:
        model.train(training)
    if (plain_1C - mixed_1C).abs().max() > _TOLERANCE * plain_1C.abs().max().clamp(min=1.0):
        raise UsageError(
            f"finetune.loss.mixup: {model.config.model_type} judges embeddings otherwise than their tokens",
            hint="finetune.loss.mixup=0",
        )
