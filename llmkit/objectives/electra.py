"""ELECTRA: a small generator fills the gaps of a text, the model finds the tokens that are not the text's own.

The generator is a part: trained beside the model, by the same steps, and exported to a folder of its own. Both share
their embeddings. Its tokens are drawn, so no gradient reaches it through them.

Shape suffixes: B rows, T positions, N = B*T positions in a line, M hidden tokens, V vocabulary.

**Source**: Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", 2020,
sections 2, 3.2 (shared embeddings, small generators) and appendix A (the weight of 50).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from llmkit.data.tokenizers.vocabulary import Vocabulary
from llmkit.models.cross_entropy import places_of
from llmkit.models.heads import Scores, choose_heads, masked_scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Loss,
    cross_entropy,
    padded,
    token_metrics,
)
from llmkit.objectives.masking import Masking
from llmkit.objectives.mlm import MaskedLM
from llmkit.recipe.objectives import ReplacedTokens
from llmkit.recipe.schema import Pretrain

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

TOKENS = "num_tokens"
_DRAWS = 1 << 30
_AT_ONCE = 128
"""Hidden tokens whose probabilities exist at one time."""


def build(section: Pretrain, vocabulary: Vocabulary) -> "Electra":
    """The objective as the recipe wants it; every hidden token becomes the mask.

    Raises:
        UsageError: The tokenizer lacks a special token that it needs.
        MissingError: Chinese words are wanted, and rjieba is not installed.
    """
    settings = section.electra
    masking = Masking.of(vocabulary, ratio=settings.ratio, whole_words=settings.whole_words)
    return Electra(MaskedLM(vocabulary, masking), settings)


class Electra:
    """Two means: the generator's over hidden tokens, and `weight` times the model's over all tokens.

    The model's term is -log p(replaced or not) of each token. A drawn token that happens to be the text's own counts as
    such.

    Args:
        masked: Makes the rows with gaps.
        settings: The recipe's.
    """

    sums = (TOKENS, "detector_total", "detector_correct", "replaced", "found")

    def __init__(self, masked: MaskedLM, settings: ReplacedTokens) -> None:
        self._masked = masked
        self._settings = settings
        self._generator: PreTrainedModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}  # loader processes do not need it

    def parts(self, model: "PreTrainedModel") -> dict[str, nn.Module]:
        """The generator: the model's shape with fewer heads, as wide each, and its very embeddings."""
        from transformers import ElectraForMaskedLM

        config = copy.deepcopy(model.config)
        heads = max(1, round(self._settings.generator_ratio * config.num_attention_heads))
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            setattr(config, name, getattr(config, name) * heads // model.config.num_attention_heads)
        self._generator = ElectraForMaskedLM(config).train(model.training)
        self._generator.electra.embeddings = model.electra.embeddings
        self._generator.tie_weights()
        choose_heads(self._generator, "masked")
        return {"generator": self._generator}

    def encode(self, row: Example) -> Example:
        """Hide tokens of a row, and draw the chance by which the generator's tokens will be chosen.

        Args:
            row: `ids` [T-2] and `seed`.
        """
        example = self._masked.encode(row)
        draw = np.random.default_rng([int(row["seed"]), 1])  # other chance than that of the gaps
        return {**example, "draws": draw.integers(_DRAWS, size=len(example["targets"]))}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """As `MaskedLM`; and `draws` [B, T], and `num_tokens`, which leaves filling out."""
        batch = self._masked.collate(examples)
        mask_BT = batch.get("attention_mask")
        batch[TOKENS] = torch.tensor(batch["targets"].numel() if mask_BT is None else int(mask_BT.sum()))
        return {**batch, **padded(examples, {"draws": 0})}

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """The generator's sum over hidden tokens, and `weight` times the model's over all."""
        assert self._generator is not None
        read_BT, targets_BT, mask_BT = batch["input_ids"], batch["targets"], batch.get("attention_mask")
        scores, _ = masked_scores(
            self._generator, num_targets=batch[TARGETS], input_ids=read_BT, attention_mask=mask_BT
        )
        generator_total = criterion(scores, targets_BT.flatten())
        drawn_BT = _drawn(scores, targets_BT.flatten(), batch["draws"].flatten()).view_as(targets_BT)
        is_hidden_BT = targets_BT != NOT_LEARNED
        replaced_BT = is_hidden_BT & (drawn_BT != targets_BT)
        logits_BT = model(
            input_ids=torch.where(is_hidden_BT, drawn_BT, read_BT), attention_mask=mask_BT
        ).logits.float()
        there_BT = torch.ones_like(logits_BT) if mask_BT is None else mask_BT.float()
        total = functional.binary_cross_entropy_with_logits(
            logits_BT, replaced_BT.float(), weight=there_BT, reduction="sum"
        )
        totals = {TARGETS: generator_total, TOKENS: self._settings.weight * total}
        if model.training:
            return Loss(totals)
        found_BT = logits_BT > 0
        sums = {
            "detector_total": total,
            "detector_correct": ((found_BT == replaced_BT) * there_BT).sum(),
            "replaced": replaced_BT.sum(),
            "found": (found_BT & replaced_BT).sum(),
        }
        return Loss(totals, sums)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The generator's loss and perplexity; the model's loss, accuracy over all tokens, and recall.

        Recall is the share of replaced tokens that the model finds; most tokens are not replaced.
        """
        metrics = token_metrics(sums)
        metrics["detector_loss"] = sums["detector_total"] / sums[TOKENS]
        metrics["accuracy"] = sums["detector_correct"] / sums[TOKENS]
        metrics["recall"] = sums["found"] / max(1.0, sums["replaced"])
        return metrics


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _drawn(scores: Scores, targets_N: torch.Tensor, draws_N: torch.Tensor) -> torch.Tensor:
    """[N] for each hidden token one drawn from its distribution, by the number that came with its row; 0 elsewhere.

    So the same tokens are drawn on any number of devices, but for rounding where a number falls between two tokens.
    """
    drawn_N = torch.zeros_like(targets_N)
    for index in places_of(targets_N, scores.num_targets).split(_AT_ONCE):
        below_MV = torch.softmax(scores.logits(index).double(), dim=1).cumsum(dim=1)
        wanted_M1 = (draws_N[index].double().unsqueeze(1) + 0.5) / _DRAWS * below_MV[:, -1:]
        drawn_N[index] = torch.searchsorted(below_MV, wanted_M1).squeeze(1).clamp(max=below_MV.shape[1] - 1)
    return drawn_N
