"""Figures of any rows, drawn again and again, equal those of references; and bugs that are planted do not pass."""

import numpy as np
import pytest
from sacrebleu import corpus_bleu, corpus_chrf
from seqeval import metrics as seqeval
from sklearn import metrics as sk

from llmkit.metrics import answers, bleu, classification, entities, retrieval
from llmkit.metrics.bootstrap import intervals
from llmkit.metrics.rouge import rouge, rouge_rows

CHANCE = np.random.default_rng(5)
DRAWN = [np.arange(40), *(CHANCE.integers(40, size=40) for _ in range(4)), np.array([3, 3, 17])]
"""All rows once; rows some of which come several times, and others not at all; three."""
CLASSES = 6
TARGETS = CHANCE.integers(CLASSES - 1, size=40)  # the last class is never true
CHANCES = CHANCE.dirichlet(np.full(CLASSES, 0.6), size=40) + np.eye(CLASSES)[1] / 9
CHANCES[:, 0] = 0  # true, and never said
CHANCES /= CHANCES.sum(axis=1, keepdims=True)
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WANTED = [[TAGS[n] for n in CHANCE.integers(5, size=size)] for size in CHANCE.integers(1, 12, size=40)]
SAID = [[tag if CHANCE.random() < 0.7 else TAGS[CHANCE.integers(5)] for tag in tags] for tags in WANTED]
ENGLISH = [
    f"the {a} cat sat on the {b} mat in {c}"
    for a in ("old", "red", "fat", "big")
    for b in "xyzuv"
    for c in "pq"
]
CHINESE = [f"{a}猫坐在{b}的垫子上，看着{c}。" for a in "老红胖大" for b in "新旧软硬小" for c in "鸟鱼"]


def classes_equal_scikit_learn():
    rows = classification.ClassRows.of(TARGETS, CHANCES, CLASSES)
    predicted = CHANCES.argmax(axis=1)
    for items in DRAWN:
        found = rows.figures(items)
        true, said = TARGETS[items], predicted[items]
        for name, wanted in {
            "accuracy": sk.accuracy_score(true, said),
            "macro_f1": sk.f1_score(true, said, average="macro"),
            "macro_recall": sk.recall_score(
                true, said, labels=sorted({*true, *said}), average="macro", zero_division=0
            ),
            "weighted_f1": sk.f1_score(true, said, average="weighted"),
            "mcc": sk.matthews_corrcoef(true, said),
            "ece": calibration(true, CHANCES[items]),
        }.items():
            assert found[name] == pytest.approx(wanted, abs=1e-12), name


def calibration(targets, chances, bins=15):
    """Guo et al. 2017, equation 3, bin by bin."""
    total = 0.0
    for number in range(bins):
        inside = [n for n in range(len(targets)) if number / bins < chances[n].max() <= (number + 1) / bins]
        if inside:
            right = np.mean([chances[n].argmax() == targets[n] for n in inside])
            total += len(inside) / len(targets) * abs(right - np.mean([chances[n].max() for n in inside]))
    return total


def entities_equal_seqeval():
    rows = entities.EntityRows.of(WANTED, SAID)
    for items in DRAWN:
        true, said = ([some[n] for n in items] for some in (WANTED, SAID))
        found = rows.figures(items)
        for name, wanted in {
            "f1": seqeval.f1_score(true, said),
            "precision": seqeval.precision_score(true, said),
            "macro_f1": seqeval.f1_score(true, said, average="macro"),
            "weighted_recall": seqeval.recall_score(true, said, average="weighted"),
            "accuracy": seqeval.accuracy_score(true, said),
        }.items():
            assert found[name] == pytest.approx(wanted, abs=1e-12), name


def answers_equal_those_by_hand():
    """By the published script of SQuAD 2.0: what counts for each is worked out by hand."""
    given = ["The red car", "a Blue  house!", "", "green", "two dogs"]
    right = [["red car"], ["blue house", "house"], [], [], ["two old dogs"]]
    exact, f1 = np.array([1.0, 1, 1, 0, 0]), np.array([1.0, 1, 1, 0, 0.8])
    rows = answers.AnswerRows.of(given, right, rules="squad2")
    for items in (np.arange(5), np.array([4, 4, 0]), np.array([3, 2, 2, 1])):
        found = rows.figures(items)
        assert found["exact_match"] == pytest.approx(100 * exact[items].mean())
        assert found["f1"] == pytest.approx(100 * f1[items].mean())
        kinds = np.array([bool(some) for some in right])[items]
        if kinds.any() and not kinds.all():
            assert found["has_answer_f1"] == pytest.approx(100 * f1[items][kinds].mean())


def bleu_equals_sacrebleu():
    for texts, cut, language in ((ENGLISH, "13a", "en"), (CHINESE, "zh", "zh")):
        written = [text if n % 3 else texts[n - 1] for n, text in enumerate(texts)]
        rows = bleu.bleu_rows(written, [[text] for text in texts], language=language)
        marks = bleu.chrf_rows(written, [[text] for text in texts])
        for items in DRAWN:
            some, wanted = [written[n] for n in items], [[texts[n] for n in items]]
            assert rows.value(items) == pytest.approx(corpus_bleu(some, wanted, tokenize=cut).score, abs=1e-9)
            assert marks.value(items) == pytest.approx(corpus_chrf(some, wanted).score, abs=1e-9)


def vectors_equal_scikit_learn():
    """nDCG of one document a query is 1 / log2(1 + rank); the rank by sorting."""
    queries, documents = CHANCE.normal(size=(12, 5)), CHANCE.normal(size=(20, 5))
    ranks = retrieval.ranks_by_cosine(queries, documents, [[n] for n in range(12)])
    found = retrieval.retrieval_rows(ranks)
    for n, query in enumerate(queries):
        likeness = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
        true = np.eye(20)[n : n + 1]
        assert found["ndcg_at_10"][n] == pytest.approx(sk.ndcg_score(true, likeness[None], k=10), abs=1e-12)
        assert found["mrr"][n] == pytest.approx(
            sk.label_ranking_average_precision_score(true, likeness[None])
        )


CHECKS = (
    classes_equal_scikit_learn,
    entities_equal_seqeval,
    answers_equal_those_by_hand,
    bleu_equals_sacrebleu,
    vectors_equal_scikit_learn,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_figures_of_any_rows_equal_the_reference(check):
    check()


def _over_predicted_only(counts):
    return AVERAGES(counts.of(counts.found > 0))


def _mean_of_bins(right_N, confidence_N, bins):
    bin_N = classification._bins(confidence_N, bins)
    gaps = [abs(right_N[bin_N == n].mean() - confidence_N[bin_N == n].mean()) for n in np.unique(bin_N)]
    return float(np.mean(gaps))


def _first_token_only(tags, scheme="lenient"):
    return [span._replace(end=span.start + 1) for span in SPANS(tags, scheme)]


def _ranks_from_zero(scores_M, own, slack, number):
    return np.maximum(RANKS(scores_M, own, slack, number) - 1, 1)


AVERAGES, SPANS, RANKS = classification.averages, entities.spans_of, retrieval._ranks
PLANTED = {
    "macro-F1 over predicted classes only": (classification, {"averages": _over_predicted_only}, 0),
    "calibration as the mean of bins, whatever they hold": (
        classification,
        {"_calibration_error": _mean_of_bins},
        0,
    ),
    "an entity that is found in part counts": (entities, {"spans_of": _first_token_only}, 1),
    "macro-F1 of entities over predicted types only": (entities, {"averages": _over_predicted_only}, 1),
    "exact match of raw text": (answers, {"normalised": lambda text: text}, 2),
    "Chinese cut at spaces": (bleu, {"_CUT_BY_LANGUAGE": {}, "_refuse_uncut": lambda *_: None}, 3),
    "ranks from 0": (retrieval, {"_ranks": _ranks_from_zero}, 4),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_metric_that_is_wrong_on_purpose_is_caught(bug, monkeypatch):
    module, changes, number = PLANTED[bug]
    for name, wrong in changes.items():
        monkeypatch.setattr(module, name, wrong)
    if bug.startswith("macro-F1 of entities"):  # only where a type is never predicted do the two differ
        monkeypatch.setattr(
            f"{__name__}.SAID", [["O" if "LOC" in tag else tag for tag in tags] for tags in SAID]
        )
    with pytest.raises(AssertionError):
        CHECKS[number]()


def test_without_planted_bugs_the_same_tags_pass(monkeypatch):
    monkeypatch.setattr(f"{__name__}.SAID", [["O" if "LOC" in tag else tag for tag in tags] for tags in SAID])
    entities_equal_seqeval()


def test_rows_of_rouge_are_what_its_mean_is_made_of():
    written = [text if n % 3 else ENGLISH[n - 1] for n, text in enumerate(ENGLISH)]
    rows = rouge_rows(written, [[text] for text in ENGLISH])
    for items in DRAWN:
        wanted = rouge([written[n] for n in items], [[ENGLISH[n]] for n in items])
        assert {name: float(values[items].mean()) for name, values in rows.items()} == pytest.approx(wanted)


def test_bins_of_calibration_add_up_to_its_error():
    rows = classification.ClassRows.of(TARGETS, CHANCES, CLASSES)
    table = classification.calibration_table(rows.right(), rows.confidence_N)
    assert sum(line["num"] for line in table) == 40
    gaps = [line["num"] * abs(line["accuracy"] - line["confidence"]) for line in table]
    assert sum(gaps) / 40 == pytest.approx(calibration(TARGETS, CHANCES), abs=1e-12)
    assert all(line["low"] < line["confidence"] <= line["high"] for line in table)


def test_intervals_hold_the_figure():
    rows = entities.EntityRows.of(WANTED, SAID)
    found = intervals(rows.figures, 40, seed=1, resamples=200)
    assert all(one.low <= one.value <= one.high for one in found.values())
    assert 0.02 < found["f1"].high - found["f1"].low < 0.5
