"""How well vectors find what belongs to them, and how well their cosines follow human scores.

Shape suffixes: Q queries, M documents, D dimensions, N pairs.

A document that scores the same as a relevant one stands before it: a model that gives every text one vector, and so has
learned nothing, finds nothing. Texts that are the same should therefore count as one document, or all as relevant.

**Source**: Järvelin and Kekäläinen, "Cumulated Gain-based Evaluation of IR Techniques", 2002 (nDCG); Voorhees, "The
TREC-8 Question Answering Track Report", 1999 (MRR).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.errors import DataError
from llmkit.metrics.inputs import Floats, Integers, check_rows, finite
from llmkit.metrics.regression import spearman

CELLS = 2**24
"""Cosines computed at once (128 MB): a chunk of queries against all documents, never all against all."""

SLACK = 1e-12
"""Cosines closer than this are equal: products of the same vectors differ in the last bits by their place."""


def unit(vectors_ND: Any) -> Floats:
    """The vectors at length 1; one of length 0 stays.

    Raises:
        RunError: A number is not finite.
    """
    vectors_ND = finite(vectors_ND, "the embeddings")
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, lengths_N1, out=np.zeros_like(vectors_ND), where=lengths_N1 > 0)


def cosines(first_ND: Any, second_ND: Any) -> Floats:
    """[N]: the cosine of each pair; 0 where one of the two has length 0.

    Raises:
        DataError: There are no pairs.
        RunError: A number is not finite.
    """
    check_rows(first_ND, second_ND)
    return np.einsum("nd,nd->n", unit(first_ND), unit(second_ND))


def similarity_metrics(first_ND: Any, second_ND: Any, scores_N: Any) -> dict[str, float]:
    """`spearman`: the correlation of the cosines' ranks with those of human scores.

    Args:
        first_ND: Vectors of the first texts.
        second_ND: Those of the second ones.
        scores_N: How alike the two are; more is more.

    Raises:
        DataError: There are no pairs.
        RunError: A number is not finite.
    """
    return {"spearman": spearman(cosines(first_ND, second_ND), scores_N)}


def ranks_by_cosine(
    queries_QD: Any, documents_MD: Any, relevant: Sequence[Sequence[int]], *, chunk: int | None = None
) -> list[Integers]:
    """For each query the ranks, from 1, of the documents that belong to it, the best first.

    Args:
        queries_QD: Vectors of the queries.
        documents_MD: Those of the documents.
        relevant: Numbers of each query's documents, one or several.
        chunk: Queries compared at once; None takes as many as fit 128 MB.

    Raises:
        DataError: There are no queries, or one has no document.
        RunError: A number is not finite.
    """
    check_rows(relevant, queries_QD)
    queries_QD, documents_MD = unit(queries_QD), unit(documents_MD)
    chunk = chunk or max(1, CELLS // max(1, len(documents_MD)))
    ranks: list[Integers] = []
    for start in range(0, len(queries_QD), chunk):
        part = slice(start, start + chunk)
        ranks += ranks_by_score(queries_QD[part] @ documents_MD.T, relevant[part], first=start, slack=SLACK)
    return ranks


def ranks_by_score(
    scores_QM: Any, relevant: Sequence[Sequence[int]], *, first: int = 0, slack: float = 0.0
) -> list[Integers]:
    """As `ranks_by_cosine`, from scores that are there already.

    Args:
        scores_QM: How well each document fits each query; more is better.
        relevant: Numbers of each query's documents.
        first: Number of the first query, for messages.
        slack: Scores that differ by no more are equal.

    Raises:
        DataError: There are no queries, or one has no document.
        RunError: A score is not finite.
    """
    check_rows(relevant, scores_QM)
    scores_QM = finite(scores_QM, "the scores")
    return [
        _ranks(scores_M, own, slack, first + number)
        for number, (scores_M, own) in enumerate(zip(scores_QM, relevant, strict=True), 1)
    ]


def _ranks(scores_M: Floats, own: Sequence[int], slack: float, number: int) -> Integers:
    own_K = np.unique(np.asarray(own, dtype=np.int64))
    if len(own_K) == 0:
        raise DataError(f"query {number} has no document that belongs to it", hint="leave such queries out")
    best_K = -np.sort(-scores_M[own_K])
    others = np.delete(scores_M, own_K)
    before_K = (others[None, :] >= best_K[:, None] - slack).sum(axis=1)
    return (before_K + np.arange(1, len(own_K) + 1)).astype(np.int64)


def retrieval_metrics(ranks: Sequence[Integers], cutoffs: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`recall_at_k` and `ndcg_at_k` for each k, and `mrr`, as means over queries.

    Args:
        ranks: For each query the ranks of what belongs to it, from 1, rising.
        cutoffs: Each k.

    Returns:
        `recall_at_k`: the share of a query's documents among the first k; `ndcg_at_k`: the same with each document
        weighted by 1/log2(1 + rank), as a share of the best possible; `mrr`: 1 / the rank of the first.

    Raises:
        DataError: There are no queries.
    """
    return {name: float(values_Q.mean()) for name, values_Q in retrieval_rows(ranks, cutoffs).items()}


def retrieval_rows(ranks: Sequence[Integers], cutoffs: Sequence[int] = (1, 5, 10)) -> dict[str, Floats]:
    """As `retrieval_metrics`, but the figures of each query, [Q] for each name.

    Raises:
        DataError: There are no queries.
    """
    check_rows(ranks, ranks)
    result = {}
    for k in cutoffs:
        result[f"recall_at_{k}"] = np.array([(own <= k).mean() for own in ranks])
        result[f"ndcg_at_{k}"] = np.array([_gain(own[own <= k]) / _ideal(len(own), k) for own in ranks])
    return {**result, "mrr": np.array([1 / own[0] for own in ranks])}


def _gain(ranks: Integers) -> float:
    return float((1 / np.log2(1.0 + ranks)).sum())


def _ideal(number: int, k: int) -> float:
    return _gain(np.arange(1, min(number, k) + 1))
