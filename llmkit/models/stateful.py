"""What llmkit's own networks share: a state that generation carries from token to token, and the language model's head.

Shape suffixes: B rows, T positions, E width that the head reads, V vocabulary, L layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput


@dataclass
class State:
    """What a network remembers of the text so far.

    Attributes:
        parts: Tensors [L, B, ...].
    """

    parts: tuple[torch.Tensor, ...]

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Keep these rows, as beam search does."""
        self.parts = tuple(part.index_select(1, rows) for part in self.parts)


@dataclass
class HiddenOutput(ModelOutput):
    """What a network says.

    Attributes:
        last_hidden_state: [B, T, E], what the head reads.
        state: Where the text goes on from; None unless asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    state: State | None = None


@dataclass
class LogitsOutput(ModelOutput):
    """What a language model says.

    Attributes:
        loss: The mean over targets in nats, where `labels` were given.
        logits: [B, T, V].
        state: Where the text goes on from; None unless asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: State | None = None


class StatefulModel(PreTrainedModel):
    """What transformers has to know about such a network."""

    _supports_sdpa = True  # there is no attention to choose a kernel for: every choice will do
    _is_stateful = True
    _no_split_modules = ()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class CausalHead:
    """The head over a network that reads from left to right; the class that takes this in makes `model` and `lm_head`.

    Generation uses the network's `state`, which `generate` knows by this name.
    """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # no keys and values to keep

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> LogitsOutput:
        """Logits of the next token at each position.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] or longer at its beginning; 0 where a row has no token: it is passed by.
            position_ids: [B, T], 0 where a document begins: it does not see what comes before.
            state: What an earlier call with `use_cache` gave; `input_ids` then go on from there.
            use_cache: Give the state after these tokens.
            labels: [B, T], the same ids; the position before each is to predict it, but -100.
            logits_to_keep: Only the last so many positions; 0 means all.
            return_dict: True, as there is no other form.

        Raises:
            ValueError: `return_dict` is False.
        """
        if not return_dict:
            raise ValueError("return_dict=False: this model answers with named values only")
        network: Any = self.model  # type: ignore[attr-defined]
        output = network(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            state=state,
            use_cache=use_cache,
        )
        logits_BTV = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])  # type: ignore[attr-defined]
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return LogitsOutput(loss=loss, logits=logits_BTV, state=output.state)


def seen_tokens(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Where the last `length` positions have a token, [B, T]; None where all do."""
    if attention_mask is None:
        return None
    seen_BT = attention_mask[:, -length:].bool()
    return None if bool(seen_BT.all()) else seen_BT
