"""The shape of a model: what parameters, FLOPs and memory follow from, without building anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that parameters, FLOPs and memory follow from.

    Attributes:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream; of a recurrent model, of its cells.
        num_layers: Blocks; of an encoder-decoder, the decoder's.
        num_heads: Query heads; 0 where there is no attention.
        num_kv_heads: Key and value heads; fewer than `num_heads` in grouped-query attention.
        head_dim: Width of one head; `num_heads * head_dim` need not be `hidden_size`.
        intermediate_size: Width inside the MLP.
        max_length: The longest row the model can read; None: any.
        tied: Whether the output layer is the embedding table.
        gated_mlp: Whether the MLP has a gate (SwiGLU: three matrices instead of two).
        num_parameters: All weights, each shared one once.
        num_non_embedding_parameters: Those without the tables of tokens and positions and without the output layer.
        num_matmul_parameters: Weights that each token is multiplied with: the linear layers' and the output
            layer's (also where it is tied), no embedding look-up, bias or norm.
        num_encoder_layers: Blocks of an encoder that has a decoder beside it.
        num_encoder_parameters: Of `num_matmul_parameters`, those that the encoder's positions meet: its layers, and
            the keys and values that the decoder makes of them.
        kept_values: Of a model that is not made of transformer blocks, numbers that the backward pass needs of each
            token, over all layers; None: they follow from the other numbers.
        compiles: Whether torch.compile makes it faster.
        embedding_size: Width of the embedding table, where it is not `hidden_size`.
        num_experts: Of a mixture of experts, those of a layer.
        num_expert_parameters: Weights of all experts of all layers.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int | None
    tied: bool
    gated_mlp: bool
    num_parameters: int
    num_non_embedding_parameters: int
    num_matmul_parameters: int
    num_encoder_layers: int = 0
    num_encoder_parameters: int = 0
    kept_values: int | None = None
    compiles: bool = True
    embedding_size: int | None = None
    num_experts: int = 0
    num_expert_parameters: int = 0

    @property
    def recomputes(self) -> bool:
        """Whether the network is a chain of blocks, whose activations can be computed again."""
        return self.compiles


@dataclass(frozen=True)
class Weights:
    """Weights of a part of a model: `a + b` and `3 * a` are those of both, and of three.

    Attributes:
        matrices: Those that each token is multiplied with.
        others: Biases, norms and the like.
    """

    matrices: int = 0
    others: int = 0

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.matrices + other.matrices, self.others + other.others)

    def __rmul__(self, times: int) -> "Weights":
        return Weights(times * self.matrices, times * self.others)

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.others


def linear(inputs: int, outputs: int, *, bias: bool = True) -> Weights:
    """A linear layer."""
    return Weights(inputs * outputs, outputs if bias else 0)


def norm(width: int, *, bias: bool = True) -> Weights:
    """A layer norm, or without bias an RMS norm."""
    return Weights(0, 2 * width if bias else width)


def shape_of(
    fields: Mapping[str, Any], body: Weights, *, tables: int, head: Weights, **numbers: Any
) -> ModelShape:
    """A shape from its parts.

    Args:
        fields: `vocab_size`, and `tie_word_embeddings`: whether the head's matrix is the embedding table.
        body: Everything but the tables and the output layer.
        tables: Entries of the embedding tables, of tokens and positions.
        head: The output layer.
        numbers: Further fields of `ModelShape`.
    """
    tied = bool(fields["tie_word_embeddings"])
    extra = head.others if tied else head.total
    return ModelShape(
        vocab_size=fields["vocab_size"],
        tied=tied,
        num_parameters=tables + body.total + extra,
        num_non_embedding_parameters=body.total,
        num_matmul_parameters=body.matrices + head.matrices,
        **numbers,
    )
