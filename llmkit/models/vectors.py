"""Embeddings of a new model that begin as word vectors.

Shape suffixes: V vocabulary, M tokens that have a vector, D width of the embedding.
"""

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def begin_with_vectors(model: PreTrainedModel, ids_M: torch.Tensor, values_MD: torch.Tensor) -> None:
    """Put vectors in the place of the embeddings of some tokens.

    All are multiplied by one number, so that together they are as large as the embeddings in whose place they come:
    the model was made for numbers of that size, and what vectors say lies in their directions.

    Args:
        model: A new model, on CPU; a tied output layer changes with its embedding.
        ids_M: The tokens.
        values_MD: Their vectors.

    Raises:
        ValueError: They are not as wide as the embedding.
    """
    table_VD = model.get_input_embeddings().weight
    if len(ids_M) == 0:
        return
    if values_MD.shape[1] != table_VD.shape[1]:
        raise ValueError(f"vectors of {values_MD.shape[1]} numbers for an embedding of {table_VD.shape[1]}")
    size = table_VD.square().mean().sqrt()
    table_VD[ids_M] = values_MD * (size / values_MD.square().mean().sqrt().clamp(min=1e-12))
