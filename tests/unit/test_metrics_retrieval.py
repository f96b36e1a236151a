"""Finding by vectors: by hand, and equal to scikit-learn and SciPy on drawn cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference
from sklearn.metrics.pairwise import cosine_similarity

from llmkit.errors import DataError, RunError
from llmkit.metrics.retrieval import (
    cosines,
    ranks_by_cosine,
    ranks_by_score,
    retrieval_metrics,
    similarity_metrics,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(2, 20), st.integers(0, 2**32))
def test_equal_to_scikit_learn(queries, documents, seed):
    chance = np.random.default_rng(seed)
    scores = chance.random((queries, documents))
    relevant = [
        np.sort(chance.choice(documents, size=chance.integers(1, documents), replace=False)) for _ in scores
    ]
    wanted = np.zeros((queries, documents))
    for row, own in zip(wanted, relevant, strict=True):
        row[own] = 1
    found = retrieval_metrics(ranks_by_score(scores, relevant), cutoffs=(1, 3, 10))
    for k in (1, 3, 10):
        assert found[f"ndcg_at_{k}"] == pytest.approx(reference.ndcg_score(wanted, scores, k=k))
        order = np.argsort(-scores, axis=1)[:, :k]
        shares = [np.isin(own, row).mean() for own, row in zip(relevant, order, strict=True)]
        assert found[f"recall_at_{k}"] == pytest.approx(np.mean(shares))
    if all(len(own) == 1 for own in relevant):  # then its average precision of labels is 1 / rank
        expected = reference.label_ranking_average_precision_score(wanted, scores)
        assert found["mrr"] == pytest.approx(expected)


def test_by_hand():
    """Two queries: the first finds its document second, the other one of its two first, one third."""
    ranks = ranks_by_score([[0.9, 0.8, 0.1], [0.7, 0.5, 0.6]], [[1], [0, 1]])
    assert [own.tolist() for own in ranks] == [[2], [1, 3]]
    found = retrieval_metrics(ranks, cutoffs=(1, 2))
    assert found["mrr"] == (1 / 2 + 1) / 2
    assert found["recall_at_1"] == (0 + 1 / 2) / 2
    assert found["recall_at_2"] == (1 + 1 / 2) / 2
    ideal = 1 + 1 / np.log2(3)
    assert found["ndcg_at_2"] == pytest.approx((1 / np.log2(3) + 1 / ideal) / 2)


def test_one_vector_for_all_finds_nothing():
    """All scores equal: what belongs to a query stands last, not first."""
    ranks = ranks_by_cosine(np.ones((3, 4)), np.ones((5, 4)), [[0], [1], [2, 3]])
    assert [own.tolist() for own in ranks] == [[5], [5], [4, 5]]
    assert retrieval_metrics(ranks)["recall_at_1"] == 0


def test_the_last_bits_of_a_cosine_are_no_order():
    """Vectors of one direction and many lengths: cosines of 1 and 1 - 2e-16."""
    vector = np.random.default_rng(4).normal(size=383)
    documents = np.outer(np.linspace(0.1, 7, 1001), vector)
    assert len(np.unique(cosines(np.tile(vector, (1001, 1)), documents))) > 1
    ranks = ranks_by_cosine(documents[:5], documents, [[n] for n in range(5)])
    assert [own.tolist() for own in ranks] == [[1001]] * 5


def test_equal_scores_count_against_the_model():
    assert ranks_by_score([[1.0, 1.0, 0.5]], [[0]])[0].tolist() == [2]
    assert ranks_by_score([[1.0, 1 - 1e-13, 0.5]], [[0]])[0].tolist() == [1]
    assert ranks_by_score([[1.0, 1 - 1e-13, 0.5]], [[0]], slack=1e-12)[0].tolist() == [2]


def test_chunks_change_nothing():
    chance = np.random.default_rng(1)
    queries, documents = chance.normal(size=(10, 6)), chance.normal(size=(30, 6)).astype(np.float32)
    relevant = [[number, number + 7] for number in range(10)]
    whole = ranks_by_score(cosine_similarity(queries, documents), relevant)
    for chunk in (1, 3, 100):
        found = ranks_by_cosine(queries, documents, relevant, chunk=chunk)
        assert [own.tolist() for own in found] == [own.tolist() for own in whole]


def test_cosines_equal_scikit_learn():
    chance = np.random.default_rng(2)
    first, second = chance.normal(size=(2, 9, 5))
    expected = np.diagonal(cosine_similarity(first, second))
    assert cosines(first, second) == pytest.approx(expected)
    assert cosines([[0.0, 0.0]], [[1.0, 0.0]]) == [0]
    scores = np.round(chance.random(9), 1)
    found = similarity_metrics(first, second, scores)["spearman"]
    assert found == pytest.approx(stats.spearmanr(expected, scores)[0])


def test_bad_input():
    with pytest.raises(DataError, match="query 2 has no document"):
        ranks_by_score([[1.0], [1.0]], [[0], []])
    with pytest.raises(DataError, match="query 3 has no document"):
        ranks_by_cosine(np.ones((3, 2)), np.ones((3, 2)), [[0], [1], []], chunk=2)
    with pytest.raises(RunError, match="embeddings of 1 of 2 rows"):
        ranks_by_cosine([[1.0], [np.nan]], [[1.0]], [[0], [0]])
    with pytest.raises(DataError, match="no rows"):
        retrieval_metrics([])
