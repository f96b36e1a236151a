"""A run whose embeddings begin as word vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmkit.data.shards import TokenShards
from llmkit.data.vectors import read_vectors
from llmkit.models.vectors import begin_with_vectors


def begin_as_recipe_says(
    model: PreTrainedModel, embeddings: str | None, tokenizer: Any, shards: Sequence[str]
) -> list[str]:
    """Put the recipe's word vectors into a new model; every process calls it, with the same result.

    Args:
        model: The new model, on CPU.
        embeddings: The file (`model.embeddings`); None: there is none, and nothing is done.
        tokenizer: The run's.
        shards: The folders of the run's token shards.

    Returns:
        How much of the vocabulary and of the training text begins with a vector, as sentences.

    Raises:
        DataError: The file is damaged, or no token is a word of it.
        MissingError: There is no such file.
    """
    if embeddings is None:
        return []
    vectors = read_vectors(Path(embeddings), tokenizer)
    begin_with_vectors(model, torch.from_numpy(vectors.ids_M), torch.from_numpy(vectors.values_MD))
    counts_V = np.zeros(len(tokenizer), dtype=np.int64)
    for folder in shards:
        found = TokenShards.open(Path(folder)).token_counts("train")
        counts_V[: len(found)] += found
    return [vectors.describe(counts_V)]
