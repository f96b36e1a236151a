"""Near copies: the estimate, the groups, the choice, whatever the order; recall and precision on planted copies."""

import builtins
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.duplicates import docstring_words, edit, jaccard, plant, scores, shingles, table, true_pairs
from llmkit.data.duplicates import near
from llmkit.data.duplicates.exact import document_keys
from llmkit.data.duplicates.groups import Groups
from llmkit.data.duplicates.near import Signer, bands, near_copies, near_groups, near_identity
from llmkit.errors import MissingError
from llmkit.recipe.preparation import NearDuplicates

pytest.importorskip("rensa")
SPEC = NearDuplicates()
WORDS = docstring_words()


def decide(texts: Sequence[str], spec: NearDuplicates = SPEC, parts: int = 1) -> list[str]:
    """The texts kept, in their order."""
    places = np.array_split(np.arange(len(texts)), parts)
    groups = [[texts[i] for i in part] for part in places]
    signer = Signer(spec)
    kept = near_copies(
        [signer.sign(group) for group in groups],
        [np.array([len(text) for text in group], np.int64) for group in groups],
        [document_keys(group) for group in groups],
        [np.ones(len(group), bool) for group in groups],
        spec,
    )
    assert [len(mask) for mask in kept] == [len(group) for group in groups]
    return [text for text, keep in zip(texts, np.concatenate(kept), strict=True) if keep]


def made_up(seed: int, size: int = 200) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(WORDS) for _ in range(size)]


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from llmkit.data.duplicates.near import Signer; from llmkit.recipe.preparation import NearDuplicates\n"
        "import zlib; texts = ['a b c d e f g', '床前明月光疑是地上霜', 'no', ''] * 200\n"
        "print(zlib.crc32(Signer(NearDuplicates()).sign(texts).tobytes()))"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert answers == [f"{GOLDEN}\n"] * 2


GOLDEN = 2452427322


def test_the_estimate_is_as_good_as_independent_permutations() -> None:
    rng = random.Random(0)
    errors = []
    for number in range(150):
        text = made_up(number, 150)
        pair = [" ".join(text), " ".join(edit(text, rng.random() * 0.1, WORDS, rng))]
        left, right = Signer(SPEC).sign(pair)
        true = jaccard(*(shingles(one, 5) for one in pair))
        errors.append(((left == right).mean() - true) / max(1e-9, (true * (1 - true) / 128) ** 0.5 or 1))
    assert abs(np.mean(errors)) < 0.25  # of a standard deviation; the mean of 150 has one of 0.08
    assert np.std(errors) < 1.1


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_recall_and_precision_against_datasketch(language: str) -> None:
    pytest.importorskip("datasketch")
    rng = random.Random(3)
    words = WORDS if language == "English" else [chr(0x4E00 + rng.randrange(3000)) for _ in range(30_000)]
    rows = list(table([plant(language, words, edited, documents=60) for edited in (0.01, 0.2)], SPEC))
    slight, strong = rows
    assert slight["true"] >= 50
    assert slight["llmkit"]["recall"] >= max(0.93, slight["datasketch"]["recall"] - 0.02)  # type: ignore[index]
    assert slight["llmkit"]["precision"] >= 0.95  # type: ignore[index]
    assert strong["true"] == strong["llmkit"]["found"] == 0  # type: ignore[index]


def test_true_pairs_and_scores() -> None:
    planted = plant("English", WORDS, 0.01, documents=20)
    pairs = true_pairs(planted, SPEC)
    sets = [shingles(text, 5) for text in planted.texts]
    brute = {
        (a, b) for b in range(len(sets)) for a in range(b) if jaccard(sets[a], sets[b]) >= SPEC.threshold
    }
    assert pairs == brute
    assert scores({(0, 1), (2, 3)}, {(0, 1), (4, 5), (6, 7)}) == (1 / 3, 1 / 2)


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_the_set_kept_does_not_depend_on_the_order(rng: random.Random, parts: int) -> None:
    texts = ["", "?", "!", "one two", "One, two!", "x" * 50]
    for number in range(12):
        words = made_up(number, 100)
        texts += [" ".join(edit(words, 0.015, WORDS, random.Random(i))) for i in range(4)]
    expected = sorted(decide(texts))
    rng.shuffle(texts)
    assert sorted(decide(texts, parts=parts)) == expected
    assert 17 < len(expected) < 45  # some of the copies are near enough, some are not


def test_the_longest_of_a_group_stays() -> None:
    words = made_up(1, 400)
    texts = [" ".join(words[:395]), " ".join(words), " ".join(words[:398]), " ".join(made_up(2, 400))]
    assert decide(texts) == [texts[1], texts[3]]


def test_of_equally_long_ones_the_smallest_key_stays() -> None:
    words = made_up(1, 400)
    texts = [" ".join([*words[:-1], last]) for last in ("aaaa", "bbbb", "cccc")]
    keys = [tuple(key) for key in document_keys(texts).tolist()]
    assert decide(texts) == [texts[keys.index(min(keys))]]


def test_short_texts_are_near_copies_of_equal_words_only() -> None:
    assert decide(["one two", "One, two!", "one three", "!", "?", "", "五", "五。", "六"]) == [
        "One, two!",
        "one three",
        "!",
        "?",
        "",
        "五。",
        "六",
    ]


def test_documents_not_taking_part_stay_out() -> None:
    text = " ".join(made_up(1))
    texts = [text + " longer", text, "something else"]
    signatures = [Signer(SPEC).sign(texts)]
    kept = near_copies(
        signatures,
        [np.array([3, 2, 1])],
        [document_keys(texts)],
        [np.array([False, True, True])],
        SPEC,
    )
    assert kept[0].tolist() == [False, True, True]


def test_groups_name_the_document_that_stays() -> None:
    text, other = made_up(1), " ".join(made_up(2))
    texts = [
        " ".join(text),
        other,
        " ".join(text).upper(),
        " ".join(text + made_up(3, 8)),
        "out",
        f"{other}!",
    ]
    edges = (0, 2, 2, 6)
    parts = [texts[a:b] for a, b in pairwise(edges)]
    found = near_groups(
        [Signer(SPEC).sign(part) for part in parts],
        [np.array([len(one) for one in part], np.int64) for part in parts],
        [document_keys(part) for part in parts],
        [np.array([one != "out" for one in part], bool) for part in parts],
        SPEC,
    )
    assert found.tolist() == [3, 5, 3, 3, -1, 5]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("permutations", [16, 100])
def test_groups_are_those_of_all_pairs(threshold: float, permutations: int) -> None:
    """Where bands cannot miss (one column each) the result is that of comparing every pair."""
    spec = NearDuplicates(threshold=threshold, permutations=permutations)
    rng = np.random.default_rng(5)
    base = rng.integers(0, 2**32, (8, permutations), np.uint32)
    signatures = base[rng.integers(0, 8, 60)]
    changed = rng.random(signatures.shape) < 0.3
    signatures[changed] = rng.integers(0, 2**32, int(changed.sum()), np.uint32)
    lengths = rng.integers(1, 6, 60)
    keys = rng.integers(0, 2**64, (60, 2), np.uint64)
    parents = list(range(60))

    def root(i: int) -> int:
        return i if parents[i] == i else root(parents[i])

    for a in range(60):
        for b in range(a):
            if (signatures[a] == signatures[b]).sum() >= threshold * permutations - 1e-9:
                parents[root(a)] = root(b)
    groups: dict[int, list[int]] = {}
    for i in range(60):
        groups.setdefault(root(i), []).append(i)
    best = {min(group, key=lambda i: (-lengths[i], *keys[i].tolist())) for group in groups.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "bands", lambda *_: (permutations, 1))
        kept = near_copies([signatures], [lengths], [keys], [np.ones(60, bool)], spec)
    assert set(np.flatnonzero(kept[0]).tolist()) == best


def test_a_huge_bucket_is_not_compared_pair_by_pair() -> None:
    """30,000 documents that share every band's hash with very many others: boilerplate with a little of its own."""
    rng = np.random.default_rng(0)
    size = 30_000
    signatures = np.repeat(rng.integers(0, 2**32, (1, 128), np.uint32), size, axis=0)
    own = rng.integers(0, 128, size)
    signatures[np.arange(size), own] = rng.integers(0, 2**32, size, np.uint32)
    unlike = signatures.copy()  # half of the places shared: in the same buckets, but no copies
    unlike[:, 64:] = rng.integers(0, 2**32, (size, 64), np.uint32)
    lengths, keys = rng.integers(1, 100, size), rng.integers(0, 2**64, (size, 2), np.uint64)
    everything = [np.ones(size, bool)]
    compared = []
    original = near._Corpus.agreeing

    def counting(self: Any, lefts: Any, rights: Any, least: int) -> Any:
        compared.append(len(lefts))
        return original(self, lefts, rights, least)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near._Corpus, "agreeing", counting)
        patch.setattr(near, "_LEADERS", 4)
        kept = near_copies([signatures], [lengths], [keys], everything, SPEC)[0]
        assert kept.sum() == 1
        assert lengths[kept.argmax()] == lengths.max()
        assert sum(compared) < 2 * size
        compared.clear()
        kept = near_copies([unlike], [lengths], [keys], everything, SPEC)[0]
        assert kept.sum() > size * 0.99
        assert sum(compared) < 16 * 4 * size + size


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_groups_join_as_a_slow_reference(pairs: list[tuple[int, int]]) -> None:
    groups = Groups(20)
    half = np.array(pairs[: len(pairs) // 2], np.int64).reshape(-1, 2)
    rest = np.array(pairs[len(pairs) // 2 :], np.int64).reshape(-1, 2)
    groups.join(half[:, 0], half[:, 1])
    groups.join(rest[:, 0], rest[:, 1])
    labels = list(range(20))
    for a, b in pairs:
        low, high = sorted((labels[a], labels[b]))
        labels = [low if label == high else label for label in labels]
    assert groups.find(np.arange(20)).tolist() == labels
    assert groups.are_first().tolist() == [label == i for i, label in enumerate(labels)]


def test_bands_find_what_the_threshold_asks_for() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        for permutations in (2, 64, 128, 256):
            number, rows = bands(threshold, permutations)
            assert number * rows <= permutations
            if permutations >= 64:
                assert 1 - (1 - (threshold + 0.05) ** rows) ** number > 0.94 or threshold > 0.94
    assert bands(0.8, 128) == (16, 8)
    assert bands(1.0, 128) == (1, 128)


def test_an_empty_corpus() -> None:
    none = (
        np.empty((0, 128), np.uint32),
        np.empty(0, np.int64),
        np.empty((0, 2), np.uint64),
        np.empty(0, bool),
    )
    assert near_copies([], [], [], [], SPEC) == []
    (kept,) = near_copies(*([one] for one in none), SPEC)  # type: ignore[call-arg,arg-type]
    assert kept.tolist() == []
    assert Signer(SPEC).sign([]).shape == (0, 128)


def test_a_long_text_is_signed_as_the_same_text_in_a_batch() -> None:
    text = " ".join(f"w{i % 5000}" for i in range(200_000))
    alone = Signer(SPEC).sign([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "_MOST_CHARACTERS", 10 * len(text))
        assert np.array_equal(Signer(SPEC).sign(["x", text])[1], alone[0])


def test_without_rensa_the_message_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rensa":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    near._rensa.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: Signer(SPEC), near_identity):
        with pytest.raises(MissingError) as raised:
            call()
        assert raised.value.hint == "pip install 'llmkit[clean]'"
