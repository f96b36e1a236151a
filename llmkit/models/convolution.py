"""A gated convolutional language model: each layer reads a position and a few just before, never what comes after.

Each layer normalises, mixes `kernel_size` neighbouring positions by a matrix, lets one half of the result through as
far as the other half opens its gate, and adds that to its input. Layer norms stand where the paper has weight
normalisation, so that the same optimizers suit it as suit a transformer.

Shape suffixes: B rows, T positions, H channels, L layers, K kernel size, C = K - 1 positions before.

**Source**: Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2017, section 3.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin
from transformers import initialization as init

from llmkit.models.configs import ConvolutionConfig
from llmkit.models.stateful import CausalHead, HiddenOutput, State, StatefulModel, seen_tokens


class GatedConvolution(nn.Module):
    """x + dropout(a * sigmoid(b)), where a and b are causal convolutions of the normalised x."""

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        # A convolution as one matrix over K positions in a line: much faster on CPU than Conv1d.
        self.mix = nn.Linear(config.kernel_size * hidden, 2 * hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_BTH: torch.Tensor,
        before_BCH: torch.Tensor,
        visible_BTK: torch.Tensor | None,
        seen_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, and the last C normalised positions, which a text that goes on needs.

        Args:
            hidden_BTH: The layer's input.
            before_BCH: Normalised positions just before; zeros at the beginning of a text.
            visible_BTK: Which of the K positions that each position reads it may see; None: all.
            seen_BT: Where there is a token at all; None: everywhere. Elsewhere a position counts as zeros.
        """
        length, reach = hidden_BTH.shape[1], before_BCH.shape[1]
        normed_BTH = self.norm(hidden_BTH).to(before_BCH.dtype)
        if seen_BT is not None:
            normed_BTH = normed_BTH * seen_BT[..., None]
        line_BSH = torch.cat([before_BCH, normed_BTH], 1)
        near = [line_BSH[:, shift : shift + length] for shift in range(reach + 1)]
        if visible_BTK is not None:
            near = [part * visible_BTK[..., shift, None] for shift, part in enumerate(near)]
        mixed_BTH = functional.glu(self.mix(torch.cat(near, -1)))
        return hidden_BTH + self.dropout(mixed_BTH), line_BSH[:, length:]


class ConvolutionPreTrainedModel(StatefulModel):
    """How the weights begin: embedding and head by `initializer_range`, the layers by their fan-in."""

    config_class = ConvolutionConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedConvolution):
            # Variance 4 / fan-in keeps a gated layer's output as large as its input (Source: Gehring et al. 2017, 3.5).
            init.normal_(module.mix.weight, std=2 * module.mix.in_features**-0.5)


class ConvolutionModel(ConvolutionPreTrainedModel):
    """Embedding, gated layers, a last norm."""

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([GatedConvolution(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
    ) -> HiddenOutput:
        """Hidden states of each position; see `CausalHead.forward` for the arguments."""
        hidden_BTH = self.dropout(self.embed_tokens(input_ids))
        seen_BT = seen_tokens(attention_mask, input_ids.shape[1])
        before_LBCH = self._fresh(hidden_BTH) if state is None else state.parts[0]
        visible_BTK = None
        if position_ids is not None:
            visible_BTK = _visible(position_ids.expand_as(input_ids), self.config.kernel_size)
        after = []
        for layer, before_BCH in zip(self.layers, before_LBCH, strict=True):
            hidden_BTH, last_BCH = layer(hidden_BTH, before_BCH, visible_BTK, seen_BT)
            after.append(last_BCH)
        hidden = self.dropout(self.norm(hidden_BTH))
        return HiddenOutput(
            last_hidden_state=hidden, state=State((torch.stack(after),)) if use_cache else None
        )

    def _fresh(self, like_BTH: torch.Tensor) -> torch.Tensor:
        config = self.config
        return like_BTH.new_zeros(
            config.num_hidden_layers, len(like_BTH), config.kernel_size - 1, config.hidden_size
        )


def _visible(position_ids_BT: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Which of the positions from K - 1 before to itself belong to the same document, [B, T, K]."""
    back_K = torch.arange(kernel_size - 1, -1, -1, device=position_ids_BT.device)
    return position_ids_BT[..., None] >= back_K


class ConvolutionForCausalLM(CausalHead, ConvolutionPreTrainedModel, GenerationMixin):
    """A convolutional language model; see `CausalHead.forward`."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        self.model = ConvolutionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
