"""Figures of classes and numbers by hand, and equal to scikit-learn's and SciPy's on drawn cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from llmkit.errors import DataError, RunError
from llmkit.metrics import classification, regression
from llmkit.metrics.classification import classification_metrics, confusion_matrix, multilabel_metrics
from llmkit.metrics.regression import regression_metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
AVERAGES = ("macro", "micro", "weighted")


@st.composite
def classified(draw):
    """Targets, predictions and the number of classes; not every class need occur."""
    classes = draw(st.integers(1, 6))
    rows = draw(st.integers(1, 40))
    numbers = st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)
    return draw(numbers), draw(numbers), classes


def certain(predicted, classes):
    return np.eye(classes)[predicted]


@settings(deadline=None, max_examples=60)
@given(classified())
def test_classes_equal_scikit_learn(case):
    targets, predicted, classes = case
    found = classification_metrics(targets, certain(predicted, classes), [str(n) for n in range(classes)])
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(targets, predicted))
    assert found["mcc"] == pytest.approx(reference.matthews_corrcoef(targets, predicted), abs=1e-12)
    for average in AVERAGES:
        expected = reference.precision_recall_fscore_support(
            targets, predicted, average=average, zero_division=0
        )
        got = [found[f"{average}_{name}"] for name in ("precision", "recall", "f1")]
        assert got == pytest.approx(expected[:3], abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(classified())
def test_matrix_and_table_equal_scikit_learn(case):
    targets, predicted, classes = case
    numbers = list(range(classes))
    matrix = confusion_matrix(targets, predicted, classes)
    assert (matrix == reference.confusion_matrix(targets, predicted, labels=numbers)).all()
    table = classification.class_table(classification.counts_of(matrix), [str(n) for n in numbers])
    expected = reference.precision_recall_fscore_support(targets, predicted, labels=numbers, zero_division=0)
    for column, name in zip(expected, ("precision", "recall", "f1", "support"), strict=True):
        assert [row[name] for row in table] == pytest.approx(list(column), abs=1e-12)
    assert [row["predicted"] for row in table] == [predicted.count(number) for number in numbers]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32))
def test_several_labels_equal_scikit_learn(rows, labels, seed):
    chance = np.random.default_rng(seed)
    targets, predicted = chance.random((2, rows, labels)) < chance.random()
    found = multilabel_metrics(targets, predicted, [str(n) for n in range(labels)])
    if labels == 1:  # scikit-learn takes a single column for two classes, which is another question
        counted = reference.f1_score(targets[:, 0], predicted[:, 0], zero_division=0)
        assert found["micro_f1"] == found["macro_f1"] == pytest.approx(counted)
        return
    for average in (*AVERAGES, "samples"):
        expected = reference.precision_recall_fscore_support(
            targets, predicted, average=average, zero_division=0
        )
        got = [found[f"{average}_{name}"] for name in ("precision", "recall", "f1")]
        assert got == pytest.approx(expected[:3], abs=1e-12)
    assert found["exact_match"] == pytest.approx(reference.accuracy_score(targets, predicted))


def test_three_classes_by_hand():
    """Truth a a a b b c, found a a b b b b: hits 2, 2, 0; found 2, 4, 0; true 3, 2, 1."""
    found = classification_metrics([0, 0, 0, 1, 1, 2], certain([0, 0, 1, 1, 1, 1], 3), ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["macro_precision"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)
    assert found["weighted_f1"] == pytest.approx((3 * 4 / 5 + 2 * 2 / 3) / 6)
    assert found["micro_f1"] == found["accuracy"]
    # (4*6 - (2*3 + 4*2)) / sqrt((36 - 20) (36 - 14))
    assert found["mcc"] == pytest.approx(10 / np.sqrt(16 * 22))


def test_calibration_by_hand():
    """Bins of 1/15: 0.62 and 0.65 share one (half right, 0.635 sure), 0.9 and 1.0 stand alone."""
    sure = np.array([0.62, 0.65, 0.9, 1.0])
    probabilities = np.stack([sure, 1 - sure], axis=1)
    error = classification.calibration_error([0, 1, 0, 1], probabilities)
    assert error == pytest.approx((abs(1 - (0.62 + 0.65)) + abs(1 - 0.9) + abs(0 - 1.0)) / 4)


def test_a_bin_of_calibration_holds_its_upper_end():
    """0.6 is the end of the ninth of 15 bins, 0.62 lies in the tenth."""
    sure = np.array([0.6, 0.62])
    error = classification.calibration_error([1, 0], np.stack([sure, 1 - sure], axis=1))
    assert error == pytest.approx((0.6 + (1 - 0.62)) / 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(2, 5), st.integers(0, 2**32))
def test_calibration_equals_a_loop_over_bins(rows, classes, seed):
    chance = np.random.default_rng(seed)
    probabilities = chance.dirichlet(np.ones(classes), size=rows)
    targets = chance.integers(classes, size=rows)
    expected = 0.0
    for low in range(15):
        inside = [
            (p.max(), p.argmax() == t)
            for p, t in zip(probabilities, targets, strict=True)
            if low / 15 < p.max() <= (low + 1) / 15
        ]
        if inside:
            sure, right = np.mean(inside, axis=0)
            expected += len(inside) / rows * abs(right - sure)
    assert classification.calibration_error(targets, probabilities) == pytest.approx(expected, abs=1e-12)


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    probabilities = np.array([[0.75, 0.25]] * 4)
    assert classification.calibration_error([0, 0, 0, 1], probabilities) == 0


def test_one_class_only():
    found = classification_metrics([0, 0], certain([0, 0], 2), ["a", "b"])
    assert (found["accuracy"], found["macro_f1"], found["mcc"], found["ece"]) == (1, 1, 0, 0)


def test_a_class_that_never_occurs_does_not_lower_the_macro_average():
    found = classification_metrics([0, 1], certain([0, 1], 77), [str(n) for n in range(77)])
    assert found["macro_f1"] == 1


def test_commonest_confusions():
    matrix = confusion_matrix([0, 0, 0, 1, 2, 2], [1, 1, 0, 1, 0, 1], 3)
    assert classification.confusions(matrix, ["a", "b", "c"], top=2) == [
        {"label": "a", "predicted": "b", "rows": 2},
        {"label": "c", "predicted": "a", "rows": 1},
    ]
    assert classification.confusions(np.diag([3, 4]), ["a", "b"]) == []


def test_rows_without_labels():
    """None wanted and none said: an exact match that says nothing for F1."""
    found = multilabel_metrics([[False, False], [True, False]], [[False, False], [True, False]], ["a", "b"])
    assert (found["exact_match"], found["samples_f1"], found["micro_f1"]) == (1, 0.5, 1)


def test_no_rows_are_an_error():
    with pytest.raises(DataError, match="no rows"):
        classification_metrics([], np.zeros((0, 2)), ["a", "b"])
    with pytest.raises(DataError, match="no rows"):
        regression_metrics([], [])


def test_numbers_that_are_not_finite_are_an_error():
    with pytest.raises(RunError, match=r"probabilities of 1 of 2 rows .* row 2"):
        classification_metrics([0, 1], [[0.5, 0.5], [np.nan, 0.5]], ["a", "b"])
    with pytest.raises(RunError, match="predictions of 1 of 2 rows"):
        regression_metrics([0, 1], [0, np.inf])


def test_a_number_without_class_is_an_error():
    with pytest.raises(ValueError, match="target -100"):
        confusion_matrix([-100], [0], 2)
    with pytest.raises(ValueError, match="prediction 2"):
        confusion_matrix([0], [2], 2)


numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))
pairs = st.lists(st.tuples(numbers, numbers | st.integers(0, 3)), min_size=2, max_size=40)


@settings(deadline=None, max_examples=80)
@given(pairs)
def test_numbers_equal_scipy_and_scikit_learn(case):
    targets, predicted = np.array(case, dtype=float).T
    found = regression_metrics(targets, predicted)
    assert found["mse"] == pytest.approx(reference.mean_squared_error(targets, predicted), rel=1e-9)
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(targets, predicted), rel=1e-9)
    if np.ptp(targets):  # of equal targets scikit-learn takes the mean's rounding for their variance
        assert found["r2"] == pytest.approx(reference.r2_score(targets, predicted), rel=1e-6, abs=1e-9)
    if np.ptp(targets) and np.ptp(predicted):
        assert found["pearson"] == pytest.approx(stats.pearsonr(targets, predicted)[0], rel=1e-6, abs=1e-6)
        assert found["spearman"] == pytest.approx(stats.spearmanr(targets, predicted)[0], abs=1e-9)
    else:
        assert found["pearson"] == found["spearman"] == 0
    assert (regression.ranked(predicted) == stats.rankdata(predicted)).all()


def test_numbers_by_hand():
    """Errors 1, 0, -1, 2: squares 6 / 4. Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15)."""
    found = regression_metrics([1.0, 2.0, 5.0, 9.0], [2.0, 2.0 - 1e-9, 4.0, 11.0])
    assert found["mse"] == pytest.approx(6 / 4)
    assert found["mae"] == pytest.approx(1)
    assert found["spearman"] == pytest.approx(0.8)


def test_equal_predictions_say_nothing():
    found = regression_metrics([1, 2, 3], [0.1, 0.1, 0.1])
    assert (found["pearson"], found["spearman"]) == (0, 0)
    assert regression_metrics([0.1] * 3, [0.1] * 3)["r2"] == 1
    assert regression_metrics([0.1] * 3, [0.1, 0.1, 0.2])["r2"] == 0


def test_very_large_and_very_small_numbers_stay_in_range():
    targets = np.array([1.0, 2.0, 4.0])
    for scale in (1e200, 1e-200):
        assert regression.pearson(targets, targets * scale) == pytest.approx(1)
