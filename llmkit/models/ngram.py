"""An n-gram language model as a `PreTrainedModel`: counted, not trained; it saves, loads, measures and generates.

Its "logits" are log-probabilities. They follow from the last `order - 1` tokens alone, so there is nothing to cache.

Shape suffixes: B rows, T positions, N = B*T positions in a line, V vocabulary, G n-grams of an order, P n-grams one
token shorter, E places filled in at a time.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llmkit.models.configs import NGramConfig
from llmkit.models.kneser_ney import NO_NODE, Estimate

_POSITIONS_AT_ONCE = 512


def _weights(values: torch.Tensor) -> nn.Parameter:
    """Numbers that are estimated, so they count as parameters, but not by gradients."""
    return nn.Parameter(values, requires_grad=False)


class NGrams(nn.Module):
    """The n-grams of one order above the first; see `Estimate`.

    Float32 is enough: what is stored is within 6e-8 of itself, and a row of probabilities sums to 1 as closely.
    """

    keys_G: torch.Tensor

    def __init__(self, num_ngrams: int, num_contexts: int) -> None:
        super().__init__()
        self.register_buffer("keys_G", torch.zeros(num_ngrams, dtype=torch.int64))
        self.alpha_G = _weights(torch.zeros(num_ngrams))
        self.gamma_P = _weights(torch.ones(num_contexts))

    def find(self, keys: torch.Tensor) -> torch.Tensor:
        """The place of each key, `NO_NODE` where it is not there."""
        if not len(self.keys_G):
            return torch.full_like(keys, NO_NODE)
        places = torch.searchsorted(self.keys_G, keys).clamp(max=len(self.keys_G) - 1)
        return torch.where(self.keys_G[places] == keys, places, NO_NODE)

    def left(self, contexts_N: torch.Tensor) -> torch.Tensor:
        """What each context leaves to the order below: all, where it is not known."""
        if not len(self.keys_G):
            return torch.ones(len(contexts_N), device=contexts_N.device)  # the text was too short for any
        return torch.where(contexts_N >= 0, self.gamma_P[contexts_N.clamp(min=0)], 1.0)

    def add(self, p_NV: torch.Tensor, contexts_N: torch.Tensor, share_N: torch.Tensor) -> None:
        """Add this order's own part of the probabilities, of which it has a share, in place."""
        if not len(self.keys_G):
            return
        vocab_size, known_N, contexts_N = p_NV.shape[1], contexts_N >= 0, contexts_N.clamp(min=0)
        first_N = torch.searchsorted(self.keys_G, contexts_N * vocab_size)
        after_N = torch.searchsorted(self.keys_G, (contexts_N + 1) * vocab_size)
        sizes_N = torch.where(known_N, after_N - first_N, 0)
        rows_E = torch.repeat_interleave(sizes_N)
        before_N = sizes_N.cumsum(0) - sizes_N
        places_E = torch.arange(len(rows_E), device=rows_E.device) + (first_N - before_N)[rows_E]
        flat_E = (rows_E - contexts_N[rows_E]) * vocab_size + self.keys_G[places_E]
        p_NV.view(-1).index_add_(0, flat_E, self.alpha_G[places_E] * share_N[rows_E])


class NGramForCausalLM(PreTrainedModel, GenerationMixin):
    """Interpolated, modified Kneser-Ney over token ids.

    **Source**: Chen and Goodman 1998, section 3; see `kneser_ney.py`.
    """

    config_class = NGramConfig
    _supports_sdpa = True  # there is no attention to choose a kernel for: every choice will do

    def __init__(self, config: NGramConfig) -> None:
        super().__init__(config)
        sizes = [config.vocab_size, *(config.sizes or [0] * (config.order - 1))]
        self.unigram_V = _weights(torch.full((config.vocab_size,), 1 / max(1, config.vocab_size)))
        self.orders = nn.ModuleList(NGrams(above, below) for below, above in pairwise(sizes))
        self.post_init()

    @classmethod
    def of(cls, estimates: Sequence[Estimate], config: NGramConfig) -> "NGramForCausalLM":
        """The model with these probabilities.

        Args:
            estimates: For each order from 1 on, from `kneser_ney.estimate`.
            config: Its `sizes` and `discounts` are set here.
        """
        config.order = len(estimates)
        config.sizes = [len(one.keys_G) for one in estimates[1:]]
        config.discounts = [list(one.discounts) for one in estimates]
        model = cls(config)
        unigram = estimates[0]
        p_V = unigram.alpha_G + unigram.gamma_P[0] / config.vocab_size
        model.unigram_V.copy_(torch.from_numpy(p_V))
        for order, one in zip(model.above_first, estimates[1:], strict=True):
            order.keys_G.copy_(torch.from_numpy(one.keys_G))
            order.alpha_G.copy_(torch.from_numpy(one.alpha_G.astype(np.float32)))
            order.gamma_P.copy_(torch.from_numpy(one.gamma_P.astype(np.float32)))
        return model

    @property
    def above_first(self) -> "list[NGrams]":
        """The n-grams of two tokens, of three, ..."""
        return cast("list[NGrams]", list(self.orders))

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is random: what is not counted yet takes all tokens to be as likely."""

    def get_input_embeddings(self) -> None:
        """There are none."""

    def get_output_embeddings(self) -> None:
        """There is no output layer: the probabilities are looked up."""

    @torch.no_grad()  # nothing here follows a gradient, also where a loaded parameter believes it has one
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Log-probabilities [B, T, V] of the token after each position.

        Args:
            input_ids: [B, T].
            attention_mask: 0 [B, T] at positions that are no text: nothing after them sees what is before them.
            position_ids: 0 [B, T] where a document begins: it does not see those before it.
            labels: [B, T], the tokens themselves; -100 is left out of the loss.
            logits_to_keep: Only the last so many positions; 0: all.
            kwargs: What `generate` says to every model.
        """
        del kwargs
        alone_BT = None if position_ids is None else position_ids == 0
        contexts = [
            context_BT[:, -logits_to_keep:]
            for context_BT in self._contexts(input_ids, attention_mask, alone_BT)
        ]
        logits_BTV = self._log_p(contexts)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BTV)

    def _contexts(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, alone_BT: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """For each order from 2 on: the node of the tokens that end at each position, one fewer than the order."""
        nodes_BT = ids_BT if mask_BT is None else torch.where(mask_BT.bool(), ids_BT, NO_NODE)
        found = [nodes_BT]
        for order in self.above_first[:-1]:
            before_BT = functional.pad(nodes_BT[:, :-1], (1, 0), value=NO_NODE)
            if alone_BT is not None:
                before_BT = before_BT.masked_fill(alone_BT, NO_NODE)
            keys_BT = before_BT * self.config.vocab_size + ids_BT
            known_BT = (before_BT >= 0) & (found[0] >= 0)
            nodes_BT = torch.where(known_BT, order.find(keys_BT), NO_NODE)
            found.append(nodes_BT)
        return found

    def _log_p(self, contexts: Sequence[torch.Tensor]) -> torch.Tensor:
        lines = [context_BT.reshape(-1) for context_BT in contexts]
        log_p_NV = self.unigram_V.new_empty(len(lines[0]), len(self.unigram_V))
        for start in range(0, len(log_p_NV), _POSITIONS_AT_ONCE):
            here = slice(start, start + _POSITIONS_AT_ONCE)
            self._fill_in(log_p_NV[here], [line[here] for line in lines])
        return log_p_NV.log_().view(*contexts[0].shape, -1)

    def _fill_in(self, p_NV: torch.Tensor, contexts: Sequence[torch.Tensor]) -> None:
        """The probabilities: the orders from the highest down, each with the share that those above leave to it."""
        share_N = p_NV.new_ones(len(p_NV))
        shares = []
        for order, contexts_N in reversed(list(zip(self.above_first, contexts, strict=False))):
            shares.append(share_N)
            share_N = share_N * order.left(contexts_N)
        torch.mul(share_N.unsqueeze(1), self.unigram_V, out=p_NV)
        for order, contexts_N, own_N in zip(self.above_first, contexts, reversed(shares), strict=False):
            order.add(p_NV, contexts_N, own_N)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The last tokens, as many as a prediction looks at, whatever `generate` believes of a cache."""
        del kwargs
        recent = max(1, self.config.order - 1)
        mask = None if attention_mask is None else attention_mask[:, -recent:]
        return {"input_ids": input_ids[:, -recent:], "attention_mask": mask, "logits_to_keep": 1}
