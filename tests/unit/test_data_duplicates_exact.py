"""Exact copies and frequent lines against slow references."""

import hashlib
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data.duplicates.exact import document_keys, keep_first
from llmkit.data.duplicates.lines import frequent_lines, line_keys, strip_lines

DOCUMENTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d e", "中", ""]), max_size=6), max_size=5)


def test_keys_are_blake2b_of_the_text() -> None:
    digest = hashlib.blake2b("中文".encode(), digest_size=16).digest()
    expected = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    keys = document_keys(["x", "中文", "\ud800"])
    assert keys.dtype == np.uint64
    assert keys.shape == (3, 2)
    assert keys[1].tolist() == expected
    assert document_keys([]).shape == (0, 2)


@given(DOCUMENTS)
def test_the_first_of_each_text_is_kept(parts: list[list[str]]) -> None:
    seen: set[str] = set()
    expected = []
    for part in parts:
        expected.append([not (text in seen or seen.add(text)) for text in part])  # type: ignore[func-returns-value]
    kept = keep_first([document_keys(part) for part in parts])
    assert [mask.tolist() for mask in kept] == expected


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_keys_with_equal_halves_are_told_apart(pairs: list[tuple[int, int]]) -> None:
    keys = np.array(pairs, np.uint64).reshape(-1, 2)
    kept = keep_first([keys[: len(keys) // 2], keys[len(keys) // 2 :]])
    assert np.concatenate(kept).tolist() == [pair not in pairs[:i] for i, pair in enumerate(pairs)]


LINES = st.lists(
    st.lists(st.sampled_from(["menu", " menu ", "home", "text", "", "  ", "中"]), max_size=8), max_size=12
)


@given(LINES, st.integers(0, 5))
def test_frequent_lines_are_those_of_a_counter(documents: list[list[str]], more_than: int) -> None:
    counter: Counter[str] = Counter()
    for lines in documents:
        counter.update({line.strip() for line in lines if line.strip()})
    frequent = {line for line, count in counter.items() if count > more_than}
    keys = [line_keys("\n".join(lines)) for lines in documents]
    parts = [np.concatenate([np.empty(0, np.uint64), *keys[i::2]]) for i in range(2)]
    found = frequent_lines(parts, more_than, passes=1)
    assert found.tolist() == line_keys("\n".join(frequent)).tolist()
    assert np.array_equal(found, frequent_lines(parts, more_than, passes=8))
    assert np.array_equal(found, frequent_lines(parts, more_than))
    for lines in documents:
        kept = [line for line in lines if line.strip() not in frequent]
        assert strip_lines("\n".join(lines), found) == ("\n".join(kept), len(lines) - len(kept)) or not lines


def test_passes_see_the_ends_of_their_ranges() -> None:
    keys = np.array([0, 0, 2**61 - 1, 2**61, 2**61, 2**64 - 1, 2**64 - 1], np.uint64)
    for passes in (1, 3, 8):
        assert frequent_lines([keys], 1, passes=passes).tolist() == [0, 2**61, 2**64 - 1]


def test_a_line_counts_once_a_document() -> None:
    assert len(line_keys("x\nx\n x \n\n")) == 1
    assert strip_lines("x\n\ny", line_keys("x")) == ("\ny", 1)
    assert strip_lines("x\n\ny", np.empty(0, np.uint64)) == ("x\n\ny", 0)
