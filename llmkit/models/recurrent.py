"""Recurrent language models of torch.nn's own cells: `rnn`, `lstm`, `gru`.

The state is carried through a row, or begins anew with each document where `position_ids` show where documents begin.

Shape suffixes: B rows, T positions, E width of the embedding, H width of the cells, L layers, N tokens that are read,
D documents (pieces of a row that begin with a state of their own).

**Source**: Elman, "Finding Structure in Time", 1990; Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et
al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014; tied embeddings: Press and Wolf, 2017.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from transformers import GenerationMixin
from transformers import initialization as init

from llmkit.models.configs import RecurrentConfig
from llmkit.models.stateful import CausalHead, HiddenOutput, State, StatefulModel, seen_tokens

_CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
_FORGET_GATE = 1  # the second of an LSTM's four


class RecurrentPreTrainedModel(StatefulModel):
    """How the weights begin."""

    config_class = RecurrentConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        """Recurrent matrices orthogonal, input matrices as torch does, biases 0, an LSTM's forget gate open.

        **Source**: Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
        2014; forget gate: Jozefowicz et al., "An Empirical Exploration of Recurrent Network Architectures", 2015.
        """
        if not isinstance(module, nn.RNNBase):
            super()._init_weights(module)
            return
        for name, weight in module.named_parameters():
            if getattr(weight, "_is_hf_initialized", False):
                continue  # it was loaded
            if name.startswith("weight_ih"):
                init.uniform_(weight, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
            elif name.startswith("weight_hh"):
                for gate_HH in weight.data.split(module.hidden_size):
                    init.orthogonal_(gate_HH)
            else:
                init.zeros_(weight)
                if name.startswith("bias_ih") and isinstance(module, nn.LSTM):
                    init.ones_(weight.data.split(module.hidden_size)[_FORGET_GATE])


class RecurrentModel(RecurrentPreTrainedModel):
    """Embedding, cells and, where the tied output layer has another width, a linear layer to it."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        if config.cell not in _CELLS:
            raise ValueError(f"cell {config.cell!r}: there are {', '.join(_CELLS)}")
        width, hidden = config.embedding_size or config.hidden_size, config.hidden_size
        layers = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.dropout = nn.Dropout(config.dropout)
        self.cells = _CELLS[config.cell](
            width, hidden, layers, batch_first=True, dropout=config.dropout if layers > 1 else 0.0
        )
        projects = config.tie_word_embeddings and width != hidden
        self.project = nn.Linear(hidden, width) if projects else nn.Identity()
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
        embedded_BTE = self.dropout(self.embed_tokens(input_ids))
        seen_BT = seen_tokens(attention_mask, input_ids.shape[1])
        starts_BT = _starts(position_ids, input_ids, has_state=state is not None)
        # Under autocast the kind of cell and the device would decide the type; here it is always that of the weights.
        with torch.autocast(embedded_BTE.device.type, enabled=False):
            embedded_BTE = embedded_BTE.to(self.cells.weight_ih_l0.dtype)
            if seen_BT is None and starts_BT is None:
                hidden_BTH, after = self._read_rows(embedded_BTE, state)
            else:
                hidden_BTH, after = self._read_pieces(embedded_BTE, state, seen_BT, starts_BT)
        hidden = self.dropout(self.project(hidden_BTH))
        return HiddenOutput(last_hidden_state=hidden, state=after if use_cache else None)

    def _read_rows(self, embedded_BTE: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """Each row as one text."""
        before = None if state is None else self._as_cells_take(state.parts)
        hidden_BTH, after = self.cells(embedded_BTE, before)
        return hidden_BTH, State(after if isinstance(after, tuple) else (after,))

    def _read_pieces(
        self,
        embedded_BTE: torch.Tensor,
        state: State | None,
        seen_BT: torch.Tensor | None,
        starts_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, State]:
        """Each document of a row by itself, and no position without a token: exactly their work, side by side."""
        pieces = _Pieces.of(embedded_BTE.shape[:2], seen_BT, starts_BT, embedded_BTE.device)
        before = state or self._fresh(embedded_BTE)
        begin = tuple(
            torch.where(pieces.goes_on_D[:, None], part.index_select(1, pieces.row_D), 0.0)
            for part in before.parts
        )
        packed = pieces.packed(embedded_BTE.flatten(0, 1))
        output, end = self.cells(packed, self._as_cells_take(begin))
        hidden_NH = output.data.new_zeros(embedded_BTE[..., 0].numel(), output.data.shape[1])
        hidden_NH = hidden_NH.index_copy(0, pieces.place_N, output.data)
        ends = end if isinstance(end, tuple) else (end,)
        after = tuple(
            old.index_copy(1, pieces.row_D[pieces.is_last_D], part[:, pieces.is_last_D])
            for old, part in zip(before.parts, ends, strict=True)
        )
        return hidden_NH.unflatten(0, embedded_BTE.shape[:2]), State(after)

    def _as_cells_take(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return parts if self.config.cell == "lstm" else parts[0]

    def _fresh(self, like: torch.Tensor) -> State:
        shape = (self.config.num_hidden_layers, like.shape[0], self.config.hidden_size)
        return State(tuple(like.new_zeros(shape) for _ in range(2 if self.config.cell == "lstm" else 1)))


def _starts(
    position_ids: torch.Tensor | None, input_ids: torch.Tensor, *, has_state: bool
) -> torch.Tensor | None:
    """Where documents begin, [B, T]; None where that changes nothing: each row begins with its first token only."""
    if position_ids is None:
        return None
    starts_BT = (position_ids == 0).expand_as(input_ids)
    return starts_BT if bool(starts_BT[:, 0 if has_state else 1 :].any()) else None


@dataclass(frozen=True)
class _Pieces:
    """Rows cut where documents begin; tokens ordered as torch's cells read many sequences: all firsts, all seconds...

    Attributes:
        place_N: Of each token in that order, its place in the flattened rows.
        sizes: How many pieces have a first, a second, ... token; on the host.
        longest_first_D: The pieces by length.
        row_D: The row of each piece.
        goes_on_D: The piece goes on from the row's state: it is the row's first, and begins no document.
        is_last_D: It is its row's last.
    """

    place_N: torch.Tensor
    sizes: torch.Tensor
    longest_first_D: torch.Tensor
    row_D: torch.Tensor
    goes_on_D: torch.Tensor
    is_last_D: torch.Tensor

    @classmethod
    def of(
        cls,
        shape: torch.Size,
        seen_BT: torch.Tensor | None,
        starts_BT: torch.Tensor | None,
        device: torch.device,
    ) -> "_Pieces":
        """Cut rows of `shape` [B, T]."""
        everywhere = torch.ones(shape, dtype=torch.bool, device=device)
        place_N = (everywhere if seen_BT is None else seen_BT).flatten().nonzero().flatten()
        row_N = place_N // shape[1]
        is_first_N = row_N.diff(prepend=row_N.new_full((1,), -1)) != 0
        starts_N = torch.zeros_like(is_first_N) if starts_BT is None else starts_BT.flatten()[place_N]
        piece_N = (is_first_N | starts_N).cumsum(0) - 1
        length_D = piece_N.bincount()
        first_D = length_D.cumsum(0) - length_D
        rank_N = torch.arange(len(place_N), device=device) - first_D[piece_N]
        longest_first_D = length_D.argsort(descending=True, stable=True)
        order_N = (rank_N * len(length_D) + longest_first_D.argsort()[piece_N]).argsort()
        row_D = row_N[first_D]
        return cls(
            place_N=place_N[order_N],
            sizes=rank_N.bincount().cpu(),
            longest_first_D=longest_first_D,
            row_D=row_D,
            goes_on_D=is_first_N[first_D] & ~starts_N[first_D],
            is_last_D=row_D.diff(append=row_D.new_full((1,), -1)) != 0,
        )

    def packed(self, states_NE: torch.Tensor) -> PackedSequence:
        """Rows in a line, as the cells read them."""
        order = self.longest_first_D
        return PackedSequence(states_NE[self.place_N], self.sizes, order, order.argsort())


class RecurrentForCausalLM(CausalHead, RecurrentPreTrainedModel, GenerationMixin):
    """A recurrent language model; see `CausalHead.forward`."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.model = RecurrentModel(config)
        width = config.embedding_size or config.hidden_size
        reads = width if config.tie_word_embeddings else config.hidden_size
        self.lm_head = nn.Linear(reads, config.vocab_size, bias=False)
        self.post_init()
