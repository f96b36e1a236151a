"""What follows from measurements: intervals, differences with their p, gates."""

from dataclasses import replace

import numpy as np
import pytest

from llmkit.errors import UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.evaluate.verdict import Difference, check_gates, check_names, differences, few_items, intervals_of
from llmkit.metrics.bootstrap import compare, interval
from llmkit.recipe.evaluation import Gate
from llmkit.registry import direction_of


def answered(name, right, *, data="d", task="cls"):
    """A measurement of accuracy, and of how many errors in a hundred."""
    right_N = np.asarray(right, dtype=float)

    def figures(items):
        return {"accuracy": float(right_N[items].mean()), "loss": float(1 - right_N[items].mean())}

    items = Items([str(number) for number in range(len(right))], figures, [bool(x) for x in right])
    figures_now = {**figures(np.arange(len(right))), "num_targets": float(len(right))}
    return Measurement(name, name, task, data, figures_now, ["accuracy"], "accuracy", items)


RIGHT = np.random.default_rng(0).random(300) < 0.8
WORSE = RIGHT & (np.random.default_rng(1).random(300) < 0.9)


def test_intervals_are_those_of_the_plain_bootstrap():
    measured = answered("a", RIGHT)
    low, high = intervals_of(measured, seed=4, resamples=500)["accuracy"]
    plain = interval(lambda rows: float(RIGHT[rows].mean()), 300, seed=4, resamples=500)
    assert (low, high) == (plain.low, plain.high)
    assert intervals_of(measured, seed=4, resamples=0) == {}


def test_a_difference_is_the_models_less_the_baselines_and_is_named_by_its_direction():
    found, why = differences(answered("b", WORSE), answered("a", RIGHT), seed=4, resamples=500)
    assert why == ""
    by = {pair.metric: pair for pair in found}
    plain = compare(
        lambda rows: float(RIGHT[rows].mean()),
        lambda rows: float(WORSE[rows].mean()),
        300,
        seed=4,
        resamples=500,
    )
    pair = by["accuracy"]
    assert (pair.difference, pair.p) == (pytest.approx(plain.difference.value), plain.p)
    assert (pair.low, pair.high) == pytest.approx((plain.difference.low, plain.difference.high))
    assert pair.verdict == by["loss"].verdict == "worse"
    # Only rows that one gets right and the other wrong count, and all of them are on one side: 2 / 2^n.
    assert pair.mcnemar == pytest.approx(2 / 2 ** int((RIGHT & ~WORSE).sum()))
    turned, _ = differences(answered("a", RIGHT), answered("b", WORSE), seed=4, resamples=500)
    assert {pair.verdict for pair in turned} == {"better"}
    assert "num_targets" not in by


def test_what_was_not_measured_on_the_same_is_not_paired():
    for other in (
        answered("b", WORSE, data="e"),
        answered("b", WORSE, task="tag"),
        answered("b", WORSE[:200]),
    ):
        found, why = differences(other, answered("a", RIGHT), seed=0, resamples=100)
        assert why
        assert {pair.p for pair in found} == {None}
        assert {pair.verdict for pair in found} == {"not tested"}


def test_gates_hold_on_their_side_and_at_the_limit():
    baseline, model = answered("a", [1, 1, 1, 1, 0]), answered("b", [1, 1, 1, 0, 0])
    gate = Gate(fail_under={"accuracy": 0.6, "loss": 0.3})
    assert [(g.metric, g.held) for g in check_gates(gate, model, None)] == [
        ("accuracy", True),
        ("loss", False),
    ]
    for share, held in (("30%", True), ("20%", False)):
        [found] = check_gates(Gate(max_drop=share, against="a"), model, baseline)
        assert found.held == held
        assert found.limit == pytest.approx(0.8 * (1 - float(share[:-1]) / 100))
    # Of a loss, worse is more: 0.2 may become 0.4 with 100% and not with 90%.
    for share, held in (("100%", True), ("90%", False)):
        [found] = check_gates(Gate(max_drop=share, against="a", metric="loss"), model, baseline)
        assert found.held == held


def test_a_share_of_rows_that_are_all_right_is_not_certain():
    """Wilson's interval of n of n is n / (n + z^2) to 1."""
    all_right, all_wrong = answered("a", [1] * 30), answered("b", [0] * 30)
    z = 1.959964
    assert intervals_of(all_right, seed=1, resamples=50)["accuracy"] == pytest.approx((30 / (30 + z * z), 1))
    assert intervals_of(all_wrong, seed=1, resamples=50)["accuracy"] == pytest.approx(
        (0, z * z / (30 + z * z))
    )
    assert intervals_of(all_right, seed=1, resamples=50)["loss"] == (0, 0)
    hundred = replace(
        answered("c", [1] * 30, task="generation"),
        figures={"exact_match": 100.0},
        items=Items([str(n) for n in range(30)], lambda items: {"exact_match": 100.0}, [True] * 30),
    )
    assert intervals_of(hundred, seed=1, resamples=50)["exact_match"] == pytest.approx(
        (3000 / (30 + z * z), 100)
    )


def test_why_there_is_no_interval_is_said():
    assert few_items(answered("a", [1, 0] * 3 + [1]), 100) == [
        "7 items: too few for an interval (10 at least)"
    ]
    assert few_items(answered("a", [1, 0] * 5), 100) == few_items(answered("a", [1]), 0) == []


def test_windows_of_two_vocabularies_are_told_from_other_data():
    def text(name, data, tokenizer):
        items = Items([f"window {n}" for n in range(12)], lambda items: {"loss": 1.0})
        settings = {"text": "t", "tokenizer": tokenizer}
        return Measurement(name, name, "text", data, {"loss": 1.0}, ["loss"], "loss", items, {}, settings)

    _, why = differences(text("a", "1", "x"), text("b", "2", "y"), seed=1, resamples=10)
    assert "20 documents at least" in why
    assert "vocabularies" in why
    _, why = differences(text("a", "1", "x"), text("b", "2", "x"), seed=1, resamples=10)
    assert "not measured on the same data" in why


def test_the_p_that_is_shown_is_the_one_that_the_verdict_is_by():
    from llmkit.run.judged import _p

    pair = Difference(
        "b", "a", "accuracy", 0.7, 0.9, -0.2, -0.3, -0.1, p=0.3, mcnemar=1e-9, direction="higher"
    )
    assert _p(pair) == "worse (p < 0.001, -0.3 to -0.1)"
    assert _p(replace(pair, mcnemar=None, p=0.02)) == "worse (p 0.02, -0.3 to -0.1)"


def test_figures_that_were_not_measured_are_named():
    with pytest.raises(UsageError, match="`f1` does not fit cls") as error:
        check_gates(Gate(fail_under={"f1": 0.5}), answered("a", RIGHT), None)
    assert "accuracy" in error.value.hint
    with pytest.raises(UsageError, match="`acuracy`") as error:
        check_names(["acuracy"], answered("a", RIGHT))
    assert "did you mean `accuracy`?" in error.value.hint


def test_too_few_items_tell_nothing():
    """Of nine rows, on which one model is right and the other wrong."""
    found, why = differences(answered("b", [0] * 9), answered("a", [1] * 9), seed=0, resamples=200)
    assert "9 items are too few" in why
    assert {pair.verdict for pair in found} == {"not tested"}
    assert intervals_of(answered("a", [1, 0] * 4), seed=0, resamples=200) == {}
    [*_, pair], why = differences(answered("b", [0] * 10), answered("a", [1] * 10), seed=0, resamples=200)
    assert (why, pair.verdict) == ("", "worse")


def test_a_verdict_of_a_share_is_by_the_exact_test():
    """Of ten rows one differs: the draws are sure of it, the exact test says that a coin decides as much."""
    found, _ = differences(answered("b", [1] * 9 + [0]), answered("a", [1] * 10), seed=0, resamples=200)
    [pair] = [pair for pair in found if pair.metric == "accuracy"]
    assert pair.mcnemar == 1.0
    assert pair.verdict == "no difference seen"


def test_a_figure_without_a_direction_has_no_verdict_and_no_gate():
    one, other = (replace(m, task="harness") for m in (answered("b", WORSE), answered("a", RIGHT)))
    for measured in (one, other):
        measured.figures["mine/word_perplexity"] = measured.figures["loss"]
    with pytest.raises(UsageError, match="rises or falls"):
        check_gates(Gate(fail_under={"mine/word_perplexity": 0.1}), one, None)
    told = replace(one, directions={"mine/word_perplexity": "lower"})
    [gate] = check_gates(Gate(fail_under={"mine/word_perplexity": 0.1}), told, None)
    assert not gate.held
    [gate] = check_gates(Gate(max_drop="1%", against="a", metric="loss"), told, other)
    assert not gate.held
    assert {
        name: direction_of(name) for name in ("chosen_loss", "macro_f1", "chosen", "best_f1_threshold")
    } == {
        "chosen_loss": "lower",
        "macro_f1": "higher",
        "chosen": None,
        "best_f1_threshold": None,
    }


def test_what_was_not_measured_on_the_same_data_has_no_drop():
    one, other = answered("b", WORSE), answered("a", RIGHT, data="e")
    with pytest.raises(UsageError, match="same data"):
        check_gates(Gate(max_drop="50%", against="a"), one, other)


@pytest.mark.parametrize("seeds", [1, 2])
def test_figures_on_damaged_text_are_shown_however_many_copies_there_are(seeds):
    from llmkit.run.judged import _noise_rows

    rows = [{"typos": 0.0, "seed": None, "metrics": {"accuracy": 0.9}}]
    rows += [{"typos": 0.1, "seed": seed, "metrics": {"accuracy": 0.5 + 0.2 * seed}} for seed in range(seeds)]
    measured = replace(answered("a", [1, 0]), tables={"noise": rows})
    [row] = _noise_rows(measured, ["accuracy"])
    assert row[0] == "accuracy, 10% typos"
    assert float(row[1]) == pytest.approx(0.5 if seeds == 1 else 0.6)
    assert row[2].startswith("one copy" if seeds == 1 else "copies differ by 0.14")
