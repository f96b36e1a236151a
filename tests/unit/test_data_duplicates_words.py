"""Words and their hashes: one definition, the same in every process and wherever blocks are cut."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data import words
from llmkit.data.words import hash_blocks, run_blocks, runs, word_hashes, word_tokens

ALPHABET = st.sampled_from("ab éß.,'\n中国ひ가ส1ั\u0301\u200d😀\U00020000\U000e0101İＡ")
TEXTS = st.one_of(st.text(ALPHABET, max_size=40), st.text(max_size=40))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, 2,000 times_over!", ["don", "t", "stop", "2", "000", "times", "over"]),
        ("Café cafe\u0301 ＣＡＦÉ", ["cafe", "cafe", "cafe"]),
        ("soft\u00adhyphen zero\u200bwidth", ["softhyphen", "zerowidth"]),
        ("GPT在2024年，很好。", ["gpt", "在", "2024", "年", "很", "好"]),
        ("𠀀𠀁〇々", ["𠀀", "𠀁", "〇", "々"]),
        ("東京タワーは", ["東", "京", "タ", "ワ", "ー", "は"]),
        ("한국어 말입니다", ["한국어", "말입니다"]),
        ("สวัสดี", ["ส", "ว", "ส", "ด"]),
        ("Привет, МИР", ["привет", "мир"]),
        ("!!! 😀 --- \u0301", []),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert word_tokens(text) == expected


@given(st.lists(TEXTS, max_size=6))
def test_hashes_are_equal_exactly_where_words_are(texts: list[str]) -> None:
    hashes, counts = word_hashes(texts)
    expected = [word_tokens(text) for text in texts]
    assert counts.tolist() == [len(found) for found in expected]
    flat = [word for found in expected for word in found]
    seen: dict[str, int] = {}
    for word, value in zip(flat, hashes.tolist(), strict=True):
        assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen)


@given(st.text(ALPHABET, max_size=60), st.integers(8, 20))
def test_where_blocks_are_cut_changes_nothing(text: str, block: int) -> None:
    whole = np.concatenate([np.empty(0, np.uint64), *hash_blocks(text)]).tolist()
    if max((len(word) for word in text.split()), default=0) >= block // 2:
        return  # a word longer than a block is cut, as documented
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_BLOCK", block)
        words._powers.cache_clear()
        cut = np.concatenate([np.empty(0, np.uint64), *hash_blocks(text)]).tolist()
        tokens = word_tokens(text)
    words._powers.cache_clear()
    assert (cut, tokens) == (whole, word_tokens(text))


def test_runs_are_those_of_a_slow_reference() -> None:
    text = "the cat saw the cat and the dog saw the cat and the bird"
    hashes, _ = word_hashes([text])
    tokens = text.split()
    for size, found in runs(hashes, [1, 3, 5, 99]):
        expected = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        assert len(found) == len(expected)
        assert len(set(found.tolist())) == len(set(expected))
        for i, run in enumerate(expected):
            assert found[i] == found[expected.index(run)]
    assert [size for size, _ in runs(hashes, [1, 3, 5, 99])] == [1, 3, 5]


def test_runs_by_block_are_the_runs_of_the_whole() -> None:
    text = "word " * 20 + "中国" * 50_000 + " ".join(f"w{i}" for i in range(30_000))
    hashes, _ = word_hashes([text])
    (_, whole), *_ = runs(hashes, [13])
    assert np.array_equal(np.concatenate(list(run_blocks(text, [13]))), whole)


def test_hashes_do_not_depend_on_the_process() -> None:
    code = "from llmkit.data.words import word_hashes; print(word_hashes(['Ein Café, 中国'])[0].tolist())"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
    # Written down once: a change here makes every signature and every cache another one.
    assert word_hashes(["Ein Café, 中国"])[0].tolist() == GOLDEN


GOLDEN = [606848067289018239, 16311334729550873581, 17090931636619524800, 771918294692967045]


@pytest.mark.timeout(60)  # squared, it would take hours
@pytest.mark.parametrize("piece", ["a", "中", "\u0301\u0327", " ", "ﷺ", "😀", "a\u0301", "ส\u0e31"])
def test_long_strange_texts_take_linear_time(piece: str) -> None:
    text = piece * (500_000 // len(piece))
    assert sum(len(found) for found in hash_blocks(text)) <= len(text)


def test_surrogates_do_no_harm() -> None:
    assert word_tokens("a\ud800b") == ["a", "b"]
