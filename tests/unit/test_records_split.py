"""The split of labelled rows: shares by class, no question on both sides, no order."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data.records import num_shared, split_rows
from llmkit.data.records.split import _shares, asked_of
from llmkit.data.split import UndividedError


def labelled(counts):
    return [
        {"text": f"{label} {i}", "label": label, "place": f"a:{i}"}
        for label, count in counts.items()
        for i in range(count)
    ]


def test_classes_have_their_shares():
    train, held = split_rows(labelled({"a": 50, "b": 30, "c": 10, "d": 1}), "cls", 0.1)
    assert Counter(row["label"] for row in held) == {"a": 5, "b": 3, "c": 1}
    assert Counter(row["label"] for row in train) == {"a": 45, "b": 27, "c": 9, "d": 1}


def test_largest_remainders():
    # 10.5, 2.6 and 0.9 of 14: 10 + 2 + 0 are given, and the two largest remainders have the rest.
    assert _shares({"a": 105, "b": 26, "c": 9}, 14, 0.1) == {"a": 10, "b": 3, "c": 1}
    assert _shares({"a": 5, "b": 5}, 1, 0.1) == {"a": 1, "b": 0}


def test_the_order_of_the_rows_does_not_matter():
    rows = labelled({"a": 40, "b": 25})
    mixed = random.Random(0).sample(rows, len(rows))
    held = [{row["text"] for row in split_rows(some, "cls", 0.2)[1]} for some in (rows, mixed)]
    assert held[0] == held[1]
    assert [row["text"] for row in split_rows(mixed, "cls", 0.2)[1]] == [
        row["text"] for row in mixed if row["text"] in held[0]
    ]


def test_new_rows_move_few():
    rows = labelled({"a": 400})
    before = {row["text"] for row in split_rows(rows, "cls", 0.1)[1]}
    after = {row["text"] for row in split_rows(rows + labelled({"b": 40}), "cls", 0.1)[1]}
    assert before <= after
    more = {row["text"] for row in split_rows(labelled({"a": 440}), "cls", 0.1)[1]}
    assert len(before & more) >= 34  # those below the old border that new rows did not push out


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcd")), min_size=2, max_size=80),
    st.floats(0.01, 0.6),
)
def test_whatever_the_rows_nothing_is_on_both_sides_and_no_class_is_lost(drawn, ratio):
    rows = [{"text": f"t{text}", "label": label} for text, label in drawn]
    try:
        train, held = split_rows(rows, "cls", ratio)
    except UndividedError:
        return
    assert len(train) + len(held) == len(rows)
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in held)
    assert num_shared(train, held, "cls") == 0
    assert {row["label"] for row in train} == {row["label"] for row in rows}
    assert 0 < len(held) <= max(1, ratio * len(rows) + 1)


@pytest.mark.parametrize(
    ("task", "key", "make"),
    [
        ("qa", "context", lambda n: {"question": f"q{n}", "context": f"c{n // 5}", "answers": []}),
        ("dpo", "prompt", lambda n: {"prompt": [{"role": "user", "content": f"p{n // 5}"}], "chosen": [n]}),
        ("seq2seq", "source", lambda n: {"source": f"s{n // 5}", "target": f"t{n}"}),
        ("embed", "anchor", lambda n: {"anchor": f"a{n // 5}", "positive": f"p{n}"}),
    ],
)
def test_what_is_asked_stays_together(task, key, make):
    train, held = split_rows([make(n) for n in range(100)], task, 0.2)
    assert (len(train), len(held)) == (80, 20)
    assert not [row for row in held if row[key] in [other[key] for other in train]]


def test_sft_stays_together_by_what_goes_before_the_first_answer():
    def row(n, answer):
        turns = (("user", f"p{n}"), ("assistant", answer), ("user", answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    assert asked_of(row(1, "a"), "sft") == asked_of(row(1, "b"), "sft") != asked_of(row(2, "a"), "sft")
    train, held = split_rows([row(n, a) for n in range(20) for a in "ab"], "sft", 0.1)
    assert (len(train), len(held), num_shared(train, held, "sft")) == (36, 4, 0)


def test_several_labels_count_for_the_rarest():
    for name in "abcdef":
        rows = [{"text": f"{name}{n}", "label": ["common", "rare"][: 2 if n < 20 else 1]} for n in range(200)]
        rows.append({"text": "none", "label": []})
        held = split_rows(rows, "cls", 0.1)[1]
        assert sum("rare" in row["label"] for row in held) == 2


def test_a_type_of_entity_is_never_wholly_held_out():
    for rare in range(20):
        rows = [{"tokens": [f"w{n}"], "tags": ["B-rare" if n == rare else "O"]} for n in range(20)]
        train, held = split_rows(rows, "tag", 0.5)
        assert rows[rare] in train
        assert len(held) in (9, 10)


def test_one_row_stays_whatever_the_share():
    train, held = split_rows([{"source": "a", "target": "x"}, {"source": "b", "target": "y"}], "seq2seq", 0.9)
    assert (len(train), len(held)) == (1, 1)


def test_what_cannot_be_divided():
    with pytest.raises(UndividedError, match="2 rows cannot be divided"):
        split_rows(labelled({"a": 1, "b": 1}), "cls", 0.5)
    with pytest.raises(UndividedError, match="1 of them differ in what they ask"):
        split_rows([{"source": "s", "target": str(n)} for n in range(5)], "seq2seq", 0.5)
    rows = labelled({"a": 1, "b": 1})
    assert split_rows(rows, "cls", 0) == (rows, [])


def test_shared_rows_are_counted():
    train, held = labelled({"a": 5}), [{"text": "a 1", "label": "b"}, {"text": "new", "label": "a"}]
    assert num_shared(train, held, "cls") == 1
