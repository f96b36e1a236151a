"""The configurations of llmkit's own models; no torch, so that knowing them costs nothing.

They follow transformers' names where there are such: `hidden_size`, `num_hidden_layers`, `tie_word_embeddings`. None
has a longest input: these models read text of any length.
"""

from typing import Literal

from transformers.configuration_utils import PretrainedConfig

Cell = Literal["rnn", "lstm", "gru"]


class RecurrentConfig(PretrainedConfig):
    """A recurrent language model: embedding, `num_hidden_layers` of cells, output layer.

    Attributes:
        cell: `rnn` (tanh), `lstm` or `gru`, as torch.nn has them.
        embedding_size: Width of the embedding; None: `hidden_size`. Where it differs and the output layer is the
            embedding, a linear layer leads from the cells to it.
        dropout: Probability on the embedding, between layers and before the output layer.
        initializer_range: Standard deviation of the embedding and output weights. Large beside a transformer's: there
            is no norm in between, and cells that begin with tiny inputs take long to learn anything.
    """

    model_type = "llmkit-recurrent"

    vocab_size: int = 32000
    cell: str = "lstm"
    hidden_size: int = 512
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    dropout: float = 0.0
    initializer_range: float = 0.3
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class ConvolutionConfig(PretrainedConfig):
    """A gated convolutional language model.

    Attributes:
        hidden_size: Channels of every layer, and width of the embedding.
        kernel_size: Positions that a layer reads: its own and those just before. The whole model reads
            `num_hidden_layers * (kernel_size - 1) + 1`.
        dropout: Probability on the embedding, after each layer and before the output layer.
        norm_eps: The layer norms' term against division by zero.
        initializer_range: Standard deviation of the embedding and output weights.
    """

    model_type = "llmkit-cnn"

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    kernel_size: int = 4
    dropout: float = 0.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.05
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class NGramConfig(PretrainedConfig):
    """An n-gram model: counts of the text it was made from, smoothed.

    Attributes:
        order: Tokens of the longest n-grams: each token is predicted from at most `order - 1` before it.
        sizes: How many n-grams of two, three, ... tokens it holds; none before it is counted.
        discounts: For each order what was taken from counts of one, two, and three or more.
    """

    model_type = "llmkit-ngram"

    vocab_size: int = 32000
    order: int = 5
    sizes: list[int] | None = None
    discounts: list[list[float]] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
