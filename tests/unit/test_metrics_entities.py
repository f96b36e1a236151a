"""Entities equal seqeval's, lenient and strict, on drawn tags; and some by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import accuracy_score
from seqeval.metrics import classification_report as report
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_figures
from seqeval.scheme import IOB2, IOBES, Tokens

from llmkit.errors import DataError
from llmkit.metrics.entities import Span, entity_metrics, entity_table, spans_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STRICT = {"bio": IOB2, "bioes": IOBES}
PREFIXES = {"bio": "BI", "bioes": "BIES", "lenient": "BIES"}


def tags_of(scheme):
    named = [f"{prefix}-{type_}" for prefix in PREFIXES[scheme] for type_ in ("PER", "LOC", "a-b")]
    return st.sampled_from(["O", "O", *named, *PREFIXES[scheme]])


@st.composite
def tagged(draw, scheme):
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    one = tags_of(scheme)
    wanted = [draw(st.lists(one, min_size=n, max_size=n)) for n in lengths]
    said = [draw(st.lists(one, min_size=n, max_size=n)) for n in lengths]
    # Chance alone seldom finds an entity: most tags are right.
    keep = [draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in lengths]
    mixed = [
        [w if k else s for w, s, k in zip(*row, strict=True)] for row in zip(wanted, said, keep, strict=True)
    ]
    return wanted, mixed


@settings(deadline=None, max_examples=200)
@given(st.lists(tags_of("lenient") | st.sampled_from(["L-PER", "U-LOC", ".-PER"]), min_size=1, max_size=12))
def test_lenient_spans_equal_seqeval(tags):
    expected = {(type_, start, end + 1) for type_, start, end in get_entities(tags)}
    assert set(spans_of(tags)) == expected


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
def test_strict_spans_equal_seqeval(scheme):
    @settings(deadline=None, max_examples=150)
    @given(st.lists(tags_of(scheme), min_size=1, max_size=12))
    def check(tags):
        entities = Tokens(tags, STRICT[scheme]).entities
        assert spans_of(tags, scheme) == [(e.tag, e.start, e.end) for e in entities]

    check()


@pytest.mark.parametrize("scheme", ["lenient", "bio", "bioes"])
def test_figures_equal_seqeval(scheme):
    @settings(deadline=None, max_examples=60)
    @given(tagged(scheme))
    def check(case):
        wanted, said = case
        found = entity_metrics(wanted, said, scheme)
        assert found["accuracy"] == pytest.approx(accuracy_score(wanted, said))
        if not any(spans_of(tags, scheme) for tags in (*wanted, *said)):
            return
        for average, prefix in (("micro", ""), ("macro", "macro_"), ("weighted", "weighted_")):
            if scheme == "lenient":
                expected = precision_recall_fscore_support(wanted, said, average=average, zero_division=0)
            else:
                expected = strict_figures(
                    wanted, said, average=average, zero_division=0, scheme=STRICT[scheme]
                )
            got = [found[f"{prefix}{name}"] for name in ("precision", "recall", "f1")]
            assert got == pytest.approx(expected[:3], abs=1e-12)

    check()


@settings(deadline=None, max_examples=30)
@given(tagged("lenient"))
def test_table_equals_the_report_of_seqeval(case):
    wanted, said = case
    table = entity_table(wanted, said)
    if not table:
        return
    expected = report(wanted, said, output_dict=True, zero_division=0)
    for row in table:
        theirs = expected[row["label"]]
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(
            [theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"]], abs=1e-12
        )


def test_by_hand():
    """Of PER (0-2), LOC (3-4) and LOC (0-1) the first is found too short, the others are found; one is invented."""
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-ORG"]]
    found = entity_metrics(wanted, said)
    assert (found["precision"], found["recall"]) == (2 / 4, 2 / 3)
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["macro_f1"] == pytest.approx(1 / 3)
    assert found["weighted_f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 4 / 6
    assert [(row["label"], row["support"], row["predicted"]) for row in entity_table(wanted, said)] == [
        ("LOC", 2, 2), ("ORG", 0, 1), ("PER", 1, 1),
    ]  # fmt: skip


def test_schemes_differ_where_tags_are_half_said():
    tags = ["I-PER", "I-PER", "O", "B-LOC", "I-ORG"]
    assert spans_of(tags) == [Span("PER", 0, 2), Span("LOC", 3, 4), Span("ORG", 4, 5)]
    assert spans_of(tags, "bio") == [Span("LOC", 3, 4)]
    assert spans_of(["B-PER", "I-PER"], "bioes") == []
    assert spans_of(["B-PER", "E-PER", "S-LOC"], "bioes") == [Span("PER", 0, 2), Span("LOC", 2, 3)]


def test_iob1_marks_only_the_second_of_two_neighbours():
    assert spans_of(["I-PER", "I-PER", "B-PER", "I-LOC"]) == [
        Span("PER", 0, 2), Span("PER", 2, 3), Span("LOC", 3, 4),
    ]  # fmt: skip


def test_no_entity_anywhere():
    found = entity_metrics([["O", "O"]], [["O", "O"]])
    assert found["accuracy"] == 1
    assert {value for name, value in found.items() if name != "accuracy"} == {0.0}


def test_entities_that_are_not_there_or_not_found():
    assert entity_metrics([["O"]], [["B-A"]])["f1"] == 0
    assert entity_metrics([["B-A"]], [["O"]])["recall"] == 0


def test_bad_input():
    with pytest.raises(DataError, match=r"'E-PER' is not one of BIO, .* B, I, O"):
        entity_metrics([["B-PER", "E-PER"]], [["O", "O"]], "bio")
    with pytest.raises(DataError, match="''"):
        entity_metrics([[""]], [["O"]], "bioes")
    with pytest.raises(ValueError, match="sentence 2 has 1 tags, but 2"):
        entity_metrics([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(DataError, match="no rows"):
        entity_metrics([], [])
