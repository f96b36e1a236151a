"""Recall and precision of every preparation step on planted documents; `-s` prints the table."""

import json
from collections import defaultdict

import numpy as np
import pytest
from planted import Score, jaccard, table

from benchmarks.planted import (
    DECOYS,
    PERSONAL,
    chinese_id_digit,
    evaluation_texts,
    iban_of,
    luhn_digit,
    make_planted,
    prose,
)
from llmkit.recipe.preparation import Decontaminate, Filter, NearDuplicates, Normalise, PersonalData, Prepare

SCORES = []


@pytest.fixture(scope="module", autouse=True)
def printed():
    yield
    print("\n" + table(SCORES))  # noqa: T201


@pytest.fixture(scope="module")
def documents():
    return make_planted(prose(600), seed=3, per_kind=80)


def score(*args):
    made = Score.of(*args)
    SCORES.append(made)
    return made


def ids(documents, *kinds, **entries):
    wanted = entries.items()
    return {
        d.id
        for d in documents
        if d.kind in kinds and (not entries or all(d.label.get(k) == v for k, v in wanted))
    }


def cleaned(documents, **settings):
    """Each document's number with its fate."""
    from llmkit.data.clean.cleaner import Cleaner

    cleaner = Cleaner(Prepare(**settings), None)
    return {d.id: cleaner.clean(d.text) for d in documents}


# --- the generator itself -----------------------------------------------------------------------------------


def test_check_digits_are_those_of_the_standards():
    assert luhn_digit("453201511283036") == "6"  # Wikipedia's and every card form's example
    assert iban_of("GB", "WEST12345698765432") == "GB82WEST12345698765432"  # the standard's own example
    assert chinese_id_digit("11010519491231002") == "X"  # GB 11643's example


def test_the_same_seed_plants_the_same():
    assert make_planted(prose(100), seed=1) == make_planted(prose(100), seed=1)
    assert make_planted(prose(100), seed=1) != make_planted(prose(100), seed=2)
    kinds = defaultdict(int)
    for document in make_planted(prose(100), per_kind=7):
        kinds[document.kind] += 1
    assert kinds.pop("clean") == 100
    assert set(kinds.values()) == {7}
    assert len(kinds) == 8


# --- normalise, filter, personal data -----------------------------------------------------------------------


def test_normalise(documents):
    after = {i: c.text for i, c in cleaned(documents, normalise=Normalise()).items()}
    expected = {d.id: d.label["repaired"] if d.kind == "damaged" else d.text for d in documents}
    for sort in ("mojibake", "decomposed", "control", "blanks"):
        planted = ids(documents, "damaged", sort=sort)
        right = {i for i in planted if after[i] == expected[i]}
        others = {d.id for d in documents if d.kind in ("clean", "exact copy", "decoy")}
        changed = {i for i in others if after[i] != expected[i]}
        score("normalise", sort, right | changed, planted, planted | others).check(1.0, 1.0)


def test_language(documents):
    english = ids(documents, "clean", "exact copy", "personal", "decoy", "evaluation")
    fates = cleaned(documents, filter=Filter(languages=["en"]))
    dropped = {i for i, fate in fates.items() if fate.step is not None}
    for language in ("de", "fr", "ru", "ja", "zh"):
        planted = ids(documents, "foreign", language=language)
        score("language", language, dropped & (planted | english), planted, planted | english).check(1.0, 1.0)


def test_quality(documents):
    prose_ids = ids(documents, "clean", "exact copy")
    fates = cleaned(documents, filter=Filter(rules=["gopher", "gopher-repetition", "c4", "fineweb"]))
    dropped = {i for i, fate in fates.items() if fate.step is not None}
    for sort in ("menu", "cookies", "filler", "links", "repeated"):
        planted = ids(documents, "boilerplate", sort=sort)
        score("quality", sort, dropped & planted, planted, planted | prose_ids).check(1.0, 1.0)
    planted = ids(documents, "boilerplate")
    score("quality", "all", dropped & (planted | prose_ids), planted, planted | prose_ids).check(1.0, 0.9)


def test_personal_data(documents):
    fates = cleaned(documents, personal_data=PersonalData())
    texts = {i: fate.text for i, fate in fates.items()}
    values = [
        (d.id, kind, value) for d in documents if d.kind == "personal" for kind, value in d.label["values"]
    ]
    made = {}
    for kind in PERSONAL:
        mine = [(i, value) for i, k, value in values if k == kind]
        gone = [1 for i, value in mine if value not in texts[i] and f"[{kind.upper()}]" in texts[i]]
        made[kind] = Score("personal data", kind, len(gone), len(mine), 0, 0)
    SCORES.extend(made.values())
    for kind, found in made.items():
        # Of addresses without a part above 99 one cannot know whether they are versions: they are left alone.
        found.check(0.9 if kind == "ip" else 1.0, 1.0)


def test_what_only_looks_like_personal_data_stays(documents):
    texts = {i: fate.text for i, fate in cleaned(documents, personal_data=PersonalData()).items()}
    values = [
        (d.id, sort, value) for d in documents if d.kind == "decoy" for sort, value in d.label["values"]
    ]
    made = []
    for sort in DECOYS:
        mine = [(i, value) for i, s, value in values if s == sort]
        kept = [value for i, value in mine if value in texts[i]]
        made.append(Score("personal data", f"left alone: {sort}", len(kept), len(mine), 0, 0))
    SCORES.extend(made)
    for kept_alone in made:
        kept_alone.check(1.0, 1.0)
    before = {d.id: d.text for d in documents}
    clean = ids(documents, "clean")
    same = {i for i in clean if texts[i] == before[i]}
    score("personal data", "left alone: clean documents", same, clean, clean).check(1.0, 1.0)


# --- copies and contamination -------------------------------------------------------------------------------


def test_exact_copies(documents):
    from llmkit.data.duplicates.exact import document_keys, keep_first

    half = len(documents) // 2
    parts = [documents[:half], documents[half:]]
    masks = keep_first([document_keys([d.text for d in part]) for part in parts])
    dropped = [
        d
        for part, keep in zip(parts, masks, strict=True)
        for d, kept in zip(part, keep, strict=True)
        if not kept
    ]
    groups = defaultdict(list)
    for d in documents:
        groups[d.text].append(d.id)
    copies = sum(len(group) - 1 for group in groups.values())
    assert copies >= 80
    assert len({d.text for d in dropped}) <= len(dropped) == copies  # one of each group is left
    right = sum(len(groups[d.text]) > 1 for d in dropped)
    made = Score("exact copies", "document", right, copies, len(dropped) - right, len(documents) - copies)
    SCORES.append(made)
    made.check(1.0, 1.0)


def test_frequent_lines(documents):
    from llmkit.data.duplicates.lines import frequent_lines, line_keys, strip_lines

    menu = ["Home | Products | About us", "© 2024 Example Ltd. All rights reserved."]
    clean = [d for d in documents if d.kind == "clean"][:200]
    texts = ["\n".join([menu[0], d.text, menu[1]]) if i % 2 else d.text for i, d in enumerate(clean)]
    frequent = frequent_lines([np.concatenate([line_keys(t) for t in texts])], 20)
    stripped = [strip_lines(t, frequent) for t in texts]
    right = sum(
        text.strip() == d.text and lines == 2
        for i, ((text, lines), d) in enumerate(zip(stripped, clean, strict=True))
        if i % 2
    )
    wrong = sum(
        text != d.text for i, ((text, _), d) in enumerate(zip(stripped, clean, strict=True)) if i % 2 == 0
    )
    made = Score("lines", "menu and footer in half of 200", right, 100, wrong, 100)
    SCORES.append(made)
    made.check(1.0, 1.0)


def test_near_copies(documents):
    from llmkit.data.duplicates.exact import document_keys
    from llmkit.data.duplicates.near import Signer, near_copies

    spec = NearDuplicates()
    texts = {d.id: d.text for d in documents}
    chosen = [d for d in documents if d.kind in ("clean", "near copy")]
    keys = document_keys([d.text for d in chosen])
    signatures = Signer(spec).sign([d.text for d in chosen])
    lengths = np.array([len(d.text.encode()) for d in chosen])
    keep = np.ones(len(chosen), bool)
    (kept,) = near_copies([signatures], [lengths], [keys], [keep], spec)
    left = {d.id for d, stays in zip(chosen, kept, strict=True) if stays}

    similarity = {
        d.id: jaccard(d.text, texts[d.label["of"]], spec.ngram) for d in chosen if d.kind == "near copy"
    }
    # Of a pair the longer one stays: found is a pair of which at most one is left.
    found = {d.id for d in chosen if d.kind == "near copy" and not {d.id, d.label["of"]} <= left}
    near = set(similarity)
    for low, high, floor in ((0.9, 1.01, 1.0), (spec.threshold, 0.9, 0.9)):
        planted = {i for i, s in similarity.items() if low <= s < high}
        score("near copies", f"Jaccard {low} to {min(high, 1.0)}", found & planted, planted, planted).check(
            floor, 1.0
        )
    unlike = {i for i, s in similarity.items() if s < spec.threshold - 0.15}
    originals = {d.label["of"] for d in chosen if d.kind == "near copy"}
    alone = {d.id for d in chosen if d.kind == "clean"} - originals
    above = {i for i, s in similarity.items() if s >= spec.threshold}
    wrongly = (found & unlike) | (alone - left)
    score(
        "near copies",
        f"Jaccard from {spec.threshold}",
        (found & above) | wrongly,
        above,
        above | unlike | alone,
    ).check(0.9, 1.0)
    assert near


def test_evaluation_data(documents, tmp_path):
    from llmkit.data.duplicates.contamination import Decontaminator

    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(json.dumps({"question": text, "answer": "42"}) + "\n" for text in evaluation_texts())
    )
    judge = Decontaminator(Decontaminate(files=["questions.jsonl"], ngram=13), tmp_path)
    hits = {d.id for d in documents if judge(d.text) is not None}
    planted = {d.id for d in documents if d.kind == "evaluation" and d.label["words"] >= 13}
    everything = {d.id for d in documents}
    score("evaluation data", "13 to 30 words in a row", hits, planted, everything).check(1.0, 1.0)
    assert not hits & ids(documents, "evaluation", words=12)
