"""Figures of held-out vectors: how well anchors find their documents, how well cosines follow scores.

Shape suffixes: A different anchors, M different documents, D dimensions, N pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.metrics.retrieval import (
    CELLS,
    cosines,
    ranks_by_cosine,
    retrieval_metrics,
    similarity_metrics,
    unit,
)

Floats = npt.NDArray[np.float64]


def pair_figures(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Any], temperature: float
) -> dict[str, float]:
    """The loss, `recall_at_k`, `ndcg_at_k` and `mrr` of rows with an anchor and its document.

    Equal anchors are one, with all their documents; equal documents are one. Every document of these rows, wrong ones
    too, is a candidate; in the loss not one that is the anchor's own text.

    Args:
        rows: With `anchor`, `positive` and, it may be, `negatives`.
        found: The vectors of each row's texts, in this order.
        temperature: What cosines are divided by in the loss.
    """
    anchors: dict[str, int] = {}
    documents: dict[str, int] = {}
    vectors: tuple[list[Any], list[Any]] = ([], [])
    relevant: list[set[int]] = []
    for row, made in zip(rows, found, strict=True):
        numbers = []
        for text, vector in zip([row["positive"], *row.get("negatives", ())], made[1:], strict=True):
            if text not in documents:
                documents[text] = len(documents)
                vectors[1].append(vector)
            numbers.append(documents[text])
        if row["anchor"] not in anchors:
            anchors[row["anchor"]] = len(anchors)
            vectors[0].append(made[0])
            relevant.append(set())
        relevant[anchors[row["anchor"]]].add(numbers[0])
    lists = [sorted(some) for some in relevant]
    first_AD, second_MD = unit(vectors[0]), unit(vectors[1])
    own = [documents.get(text, -1) for text in anchors]
    loss = _contrast(first_AD, second_MD, lists, own, temperature)
    return {"loss": loss, **retrieval_metrics(ranks_by_cosine(first_AD, second_MD, lists), (1, 5, 10))}


def _contrast(
    anchors_AD: Floats,
    documents_MD: Floats,
    relevant: Sequence[Sequence[int]],
    own: Sequence[int],
    temperature: float,
) -> float:
    """The mean of -log p(document | anchor) over all anchors and each of their documents, the others left out."""
    chunk = max(1, CELLS // len(documents_MD))
    total, count = 0.0, 0
    for start in range(0, len(anchors_AD), chunk):
        scores_AM = anchors_AD[start : start + chunk] @ documents_MD.T / temperature
        for number, scores_M in enumerate(scores_AM, start):
            right = list(relevant[number])
            wrong_M = np.delete(scores_M, [*right, *([own[number]] if own[number] >= 0 else [])])
            for score in scores_M[right]:
                total += float(np.logaddexp.reduce(np.append(wrong_M, score)) - score)
            count += len(right)
    return total / count


def score_figures(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Any], kind: str, sharpness: float
) -> dict[str, float]:
    """The loss and Spearman's correlation of scored pairs.

    Args:
        rows: With a `score`.
        found: The two vectors of each.
        kind: `cosent` or `cosine`.
        sharpness: CoSENT's.
    """
    first_ND, second_ND = (np.stack([made[side] for made in found]) for side in (0, 1))
    scores_N = np.array([float(row["score"]) for row in rows])
    cosines_N = cosines(first_ND, second_ND)
    loss = _cosent(cosines_N, scores_N, sharpness)
    if kind == "cosine":
        loss = float(np.square(cosines_N - scores_N).mean())
    return {"loss": loss, **similarity_metrics(first_ND, second_ND, scores_N)}


def _cosent(cosines_N: Floats, scores_N: Floats, sharpness: float) -> float:
    """As the task's loss, a chunk of pairs at a time."""
    total, chunk = 0.0, max(1, CELLS // len(scores_N))  # log 1
    for start in range(0, len(scores_N), chunk):
        part = slice(start, start + chunk)
        gaps = sharpness * (cosines_N[None, :] - cosines_N[part, None])
        wrong = gaps[scores_N[part, None] > scores_N[None, :]]
        total = float(np.logaddexp(total, np.logaddexp.reduce(wrong))) if len(wrong) else total
    return total
