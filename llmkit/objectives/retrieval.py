"""Figures of held-out vectors: how well anchors find their documents, how well cosines follow scores.

Shape suffixes: A different anchors, M different documents, D dimensions, N pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.metrics.regression import ranked, spearman
from llmkit.metrics.retrieval import (
    CELLS,
    cosines,
    ranks_by_cosine,
    retrieval_rows,
    similarity_metrics,
    unit,
)
from llmkit.objectives.detail import Detail, worst_first

Floats = npt.NDArray[np.float64]
_ALIKE = 1e-6


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
    found_of = pair_rows(rows, found, temperature)
    figures = {name: float(values_A.mean()) for name, values_A in found_of.values.items()}
    return {"loss": sum(found_of.losses) / sum(found_of.counts), **figures}


@dataclass(frozen=True)
class PairRows:
    """What each anchor contributes to the figures of pairs.

    Attributes:
        anchors: Their texts.
        rows: The numbers of the rows of each.
        documents: The texts of all documents.
        vectors: Those of the anchors and of the documents, at length 1.
        relevant: The numbers of the documents that belong to each anchor.
        ranks: At which places these are found, the best first.
        values: `recall_at_k`, `ndcg_at_k` and `mrr` of each anchor.
        losses: The sum of each anchor's losses.
        counts: Its documents.
    """

    anchors: Sequence[str]
    rows: Sequence[Sequence[int]]
    documents: Sequence[str]
    vectors: tuple[Floats, Floats]
    relevant: Sequence[Sequence[int]]
    ranks: Sequence[npt.NDArray[np.int64]]
    values: Mapping[str, Floats]
    losses: Sequence[float]
    counts: Sequence[int]


def pair_rows(rows: Sequence[Mapping[str, Any]], found: Sequence[Any], temperature: float) -> PairRows:
    """As `pair_figures`, by anchor."""
    anchors: dict[str, int] = {}
    documents: dict[str, int] = {}
    vectors: tuple[list[Any], list[Any]] = ([], [])
    relevant: list[set[int]] = []
    members: list[list[int]] = []
    for place, (row, made) in enumerate(zip(rows, found, strict=True)):
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
            members.append([])
        relevant[anchors[row["anchor"]]].add(numbers[0])
        members[anchors[row["anchor"]]].append(place)
    lists = [sorted(some) for some in relevant]
    first_AD, second_MD = unit(vectors[0]), unit(vectors[1])
    own = [documents.get(text, -1) for text in anchors]
    losses, counts = _contrast(first_AD, second_MD, lists, own, temperature)
    ranks = ranks_by_cosine(first_AD, second_MD, lists)
    values = retrieval_rows(ranks, (1, 5, 10))
    unit_vectors = (first_AD, second_MD)
    return PairRows(
        list(anchors), members, list(documents), unit_vectors, lists, ranks, values, losses, counts
    )


def pair_detail(rows: Sequence[Mapping[str, Any]], found: Sequence[Any], temperature: float) -> Detail:
    """What `pair_figures` are made of: the anchors.

    Args:
        rows: As there.
        found: As there.
        temperature: As there.
    """
    made = pair_rows(rows, found, temperature)
    losses_A, counts_A = np.array(made.losses), np.array(made.counts)

    def figures(items: npt.NDArray[np.int64]) -> dict[str, float]:
        means = {name: float(values_A[items].mean()) for name, values_A in made.values.items()}
        return {"loss": float(losses_A[items].sum() / counts_A[items].sum()), **means}

    owner = [-1] * len(rows)
    lines = []
    for number, anchor in enumerate(made.anchors):
        for place in made.rows[number]:
            owner[place] = number
        nearest = int(np.argmax(made.vectors[1] @ made.vectors[0][number]))
        right = [made.documents[one] for one in made.relevant[number]]
        line = {"input": anchor, "target": right, "prediction": made.documents[nearest]}
        lines.append({**line, "score": int(made.ranks[number][0])})
    ranks = [int(own[0]) for own in made.ranks]
    return Detail(
        keys=[
            f"{rows[some[0]]['place']} {anchor}" for some, anchor in zip(made.rows, made.anchors, strict=True)
        ],
        owner=owner,
        figures=figures,
        lines=lines,
        errors=worst_first(ranks, [rank > 1 for rank in ranks]),
        warnings=_all_alike(made.vectors[1]),
    )


def scored_detail(rows: Sequence[Mapping[str, Any]], found: Sequence[Any], kind: str) -> Detail:
    """What `score_figures` are made of: the pairs.

    Args:
        rows: As there.
        found: As there.
        kind: As there. CoSENT's loss compares all pairs with each other, and has no share of a single one.
    """
    first_ND, second_ND = (np.stack([made[side] for made in found]) for side in (0, 1))
    scores_N = np.array([float(row["score"]) for row in rows])
    cosines_N = cosines(first_ND, second_ND)
    out_N = ranked(cosines_N) - ranked(scores_N)

    def figures(items: npt.NDArray[np.int64]) -> dict[str, float]:
        of_items = {"spearman": spearman(cosines_N[items], scores_N[items])}
        if kind == "cosine":
            of_items["loss"] = float(np.square(cosines_N[items] - scores_N[items]).mean())
        return of_items

    lines = [
        {"input": [row["anchor"], row["positive"]], "target": score, "prediction": cosine, "score": places}
        for row, score, cosine, places in zip(
            rows, scores_N.tolist(), cosines_N.tolist(), out_N.tolist(), strict=True
        )
    ]
    return Detail(
        keys=[row["place"] for row in rows],
        owner=range(len(rows)),
        figures=figures,
        lines=lines,
        errors=worst_first(np.abs(out_N).tolist()),
        warnings=_all_alike(np.concatenate([first_ND, second_ND])),
    )


def _all_alike(vectors_ND: Floats) -> list[str]:
    """A warning where every text has the same vector."""
    if len(vectors_ND) < 2 or np.abs(vectors_ND - vectors_ND[0]).max() > _ALIKE:
        return []
    return ["every text was given the same vector: the model tells nothing apart"]


def _contrast(
    anchors_AD: Floats,
    documents_MD: Floats,
    relevant: Sequence[Sequence[int]],
    own: Sequence[int],
    temperature: float,
) -> tuple[list[float], list[int]]:
    """Of each anchor the sum of -log p(document | anchor) over its documents, the others left out, and their number."""
    chunk = max(1, CELLS // len(documents_MD))
    losses, counts = list[float](), list[int]()
    for start in range(0, len(anchors_AD), chunk):
        scores_AM = anchors_AD[start : start + chunk] @ documents_MD.T / temperature
        for number, scores_M in enumerate(scores_AM, start):
            right = list(relevant[number])
            wrong_M = np.delete(scores_M, [*right, *([own[number]] if own[number] >= 0 else [])])
            each = [np.logaddexp.reduce(np.append(wrong_M, score)) - score for score in scores_M[right]]
            losses.append(float(sum(each)))
            counts.append(len(right))
    return losses, counts


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
