"""Rows changed while they are learned from: what changes, that it is a function of the seed, and what stays."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import losses, same_bits, weights
from tuning import finetune, tokenizer_of

from llmkit.data.augment import Augmented, fingerprint
from llmkit.data.augment.characters import ALIKE, NEIGHBOURS, similar, typos
from llmkit.data.augment.rows import TEXTS
from llmkit.data.augment.thesaurus import Thesaurus, load_thesaurus
from llmkit.data.augment.words import CHANGES, changed, units_of
from llmkit.errors import DataError, MissingError, UsageError
from llmkit.recipe.tasks import AUGMENTED, Augment

ENGLISH = "The film was very Good, and I'd buy a big ticket again!"
CHINESE = "这家酒店的服务非常好，价格也便宜，我很喜欢。"


def made(text, method, seed=1, ratio=0.2, language="en", thesaurus=None):
    words = thesaurus or load_thesaurus(None, language)
    return changed(text, CHANGES[method], ratio, np.random.default_rng(seed), words)


def words(text):
    return Counter(re.findall(r"[\w'-]+", text))


@pytest.mark.parametrize("seed", range(20))
def test_what_each_change_does_to_the_words_of_a_text(seed):
    before = words(ENGLISH)
    assert words(made(ENGLISH, "swap", seed)) == before
    gone = before - words(made(ENGLISH, "delete", seed))
    assert sum(gone.values()) == 2
    assert not words(made(ENGLISH, "delete", seed)) - before
    added = words(made(ENGLISH, "insert", seed)) - before
    assert 1 <= sum(added.values()) <= 2
    after = made(ENGLISH, "synonyms", seed)
    new = words(after) - before
    thesaurus = load_thesaurus(None, "en")
    old = before - words(after)
    assert sum(new.values()) == sum(old.values()) == 2
    assert all(any(other.lower() in thesaurus.others(word) for word in old) for other in new)


def test_case_is_kept_and_nothing_but_words_changes():
    pair = Thesaurus([["good", "fine"]])
    assert made("GOOD, good? Good!", "synonyms", ratio=1, thesaurus=pair) == "FINE, fine? Fine!"
    assert made("... 123 !!", "synonyms", thesaurus=pair) == "... 123 !!"
    assert made("！？", "delete") == "！？"
    assert made("alone", "delete", ratio=1) == "alone"


def test_chinese_words_are_found_in_running_text():
    thesaurus = load_thesaurus(None, "zh")
    assert [unit for unit in units_of(CHINESE, thesaurus) if len(unit) > 1] == [
        "服务",
        "非常",
        "价格",
        "便宜",
        "喜欢",
    ]
    after = made(CHINESE, "synonyms", ratio=1.0, language="zh")
    assert after != CHINESE
    assert "便宜" not in after
    assert after.startswith("这家酒店的")


@given(st.text(max_size=60), st.sampled_from(list(CHANGES)), st.integers(0, 99), st.floats(0.01, 1))
def test_any_text_stays_a_text_with_words(text, method, seed, ratio):
    thesaurus = Thesaurus([["a", "bb"], ["好", "不错"]])
    assert "".join(units_of(text, thesaurus)) == text
    after = made(text, method, seed, ratio, thesaurus=thesaurus)
    assert bool(re.search(r"\w", after)) == bool(re.search(r"\w", text))
    assert after == made(text, method, seed, ratio, thesaurus=thesaurus)


def test_slips_are_those_of_fingers():
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")
    assert all(key in NEIGHBOURS[other] for key, others in NEIGHBOURS.items() for other in others)
    chance = np.random.default_rng(2)
    for _ in range(50):
        after = typos("Keyboard", 0.1, chance)
        assert abs(len(after) - 8) <= 1
        assert after != "Keyboard"
    assert typos("123", 1.0, chance) == "123"


def test_characters_become_those_that_are_alike():
    after = similar(CHINESE, 1.0, np.random.default_rng(0))
    assert len(after) == len(CHINESE)
    differing = [(a, b) for a, b in zip(CHINESE, after, strict=True) if a != b]
    assert differing
    assert all(b in ALIKE[a] for a, b in differing)
    assert all(a in ALIKE[b] for a, others in ALIKE.items() for b in others)


def augmented(steps, task="cls", family="bert"):
    return Augmented(
        lambda row: {"row": row, "input_ids": np.array([2, 50, 60, 70, 80, 3])},
        [Augment.model_validate(step) for step in steps],
        task=task,
        tokenizer=tokenizer_of(family),
        language="en",
    )


def test_a_row_is_changed_by_its_seed_alone_and_only_its_texts():
    encode = augmented([{"method": "swap", "rows": 0.5}, {"method": "typos", "rows": 0.5}])
    row = {"text": ENGLISH, "other": ENGLISH, "label": "good", "place": "a:1"}
    found = [encode({**row, "seed": seed})["row"] for seed in range(200)]
    assert found == [encode({**row, "seed": seed})["row"] for seed in range(200)]
    assert row["text"] == ENGLISH
    assert all(one["label"] == "good" and one["place"] == "a:1" for one in found)
    assert sum(one["text"] != ENGLISH for one in found) == pytest.approx(150, abs=25), (
        "3 of 4: either or both"
    )
    assert len({one["text"] for one in found}) > 100


def test_hidden_tokens_are_none_of_the_tokenizers_own():
    encode = augmented([{"method": "mask", "rows": 1.0, "ratio": 0.5}], task="tag")
    mask = tokenizer_of("bert").mask_token_id
    for seed in range(10):
        ids = encode({"tokens": [], "seed": seed})["input_ids"].tolist()
        assert ids[0] == 2
        assert ids[-1] == 3
        assert ids.count(mask) == 2
    with pytest.raises(UsageError, match="has none"):
        augmented([{"method": "mask"}], family="llama")


def test_a_thesaurus_of_ones_own(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# mine\ncat, feline\nred，scarlet , crimson\nalone\n", encoding="utf-8")
    found = load_thesaurus(str(path), "xx")
    assert found.others("RED") == ["scarlet", "crimson"]
    assert found.others("alone") == []
    before = fingerprint([Augment(method="synonyms", thesaurus=str(path))])
    path.write_text("one\n")
    assert fingerprint([Augment(method="synonyms", thesaurus=str(path))]) != before
    with pytest.raises(DataError, match="no line has two words"):
        load_thesaurus(str(path), "en")
    with pytest.raises(MissingError, match="language 'fr'"):
        load_thesaurus(None, "fr")
    with pytest.raises(MissingError, match="cannot be read"):
        load_thesaurus(str(tmp_path / "none.txt"), "en")


def test_the_tasks_that_can_be_changed_are_the_recipes():
    assert tuple(TEXTS) == AUGMENTED["text"]


def test_a_run_learns_from_changed_rows_the_same_each_time_and_measures_unchanged_ones(tmp_path):
    short = {"finetune__train__length": "2 steps", "finetune__model__dropout": 0.0}
    steps = [{"method": "swap", "rows": 1.0, "ratio": 0.5}, {"method": "mask", "rows": 1.0}]
    plain = finetune(tmp_path, "cls", "plain", **short)
    one = finetune(tmp_path, "cls", "one", **short, finetune__augment=steps)
    two = finetune(tmp_path, "cls", "two", **short, finetune__augment=steps, machine__loader_workers=1)
    assert losses(plain)[1] != losses(one)[1]
    assert losses(plain, "eval/loss")[0] == losses(one, "eval/loss")[0]
    assert same_bits(weights(one), weights(two))
