"""Recall and precision of every preparation step on planted documents; `-s` prints the table."""

import json
import re
from collections import Counter, defaultdict

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
from llmkit.data.pipeline import Engine
from llmkit.data.places import Tally
from llmkit.recipe.preparation import Decontaminate, Filter, NearDuplicates, Normalise, PersonalData, Prepare
from llmkit.recipe.schema import Source

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
    prose_ids = ids(documents, "clean", "exact copy", "near copy", "personal", "decoy", "evaluation")
    fates = cleaned(documents, filter=Filter(rules=["gopher", "gopher-repetition", "c4", "fineweb"]))
    dropped = {i for i, fate in fates.items() if fate.step is not None}
    for sort in ("menu", "cookies", "filler", "links", "repeated"):
        planted = ids(documents, "boilerplate", sort=sort)
        score("quality", sort, dropped & planted, planted, planted | prose_ids).check(1.0, 1.0)
    planted = ids(documents, "boilerplate")
    score("quality", "all", dropped & (planted | prose_ids), planted, planted | prose_ids).check(1.0, 0.9)


def marks(before, after):
    """How many marks of each kind were set in a text."""
    signs = {kind: f"[{kind.upper()}]" for kind in PERSONAL}
    return {kind: after.count(sign) - before.count(sign) for kind, sign in signs.items()}


def personal_scores(documents, **settings):
    """For each kind what was found of it, and every mark of that kind which should not be."""
    fates = cleaned(documents, personal_data=PersonalData(**settings))
    texts = {i: fate.text for i, fate in fates.items()}
    planted = {d.id: d.label["values"] if d.kind == "personal" else [] for d in documents}
    found = {d.id: marks(d.text, texts[d.id]) for d in documents}
    made = {}
    for kind in PERSONAL:
        mine = [(i, value) for i, values in planted.items() for k, value in values if k == kind]
        gone = sum(value not in texts[i] and found[i][kind] > 0 for i, value in mine)
        # Every mark beyond what was planted is a false find: in prose, decoys, other languages, beside other data.
        there = {i: sum(k == kind for k, _ in values) for i, values in planted.items()}
        wrong = sum(max(0, found[i][kind] - there[i]) for i in planted)
        others = sum(not count for count in there.values())
        made[kind] = Score("personal data", kind, gone, len(mine), wrong, others)
    return made


def check_personal(made):
    for kind, one in made.items():
        # Of addresses without a part above 99 one cannot know whether they are versions: they are left alone.
        one.check(0.9 if kind == "ip" else 1.0, 1.0)


def decoy_scores(documents, **settings):
    """For each sort of decoy what was left alone of it; and the documents without personal data that were."""
    before = {d.id: d.text for d in documents}
    fates = cleaned(documents, personal_data=PersonalData(**settings))
    texts = {i: fate.text for i, fate in fates.items()}
    values = [
        (d.id, sort, value) for d in documents if d.kind == "decoy" for sort, value in d.label["values"]
    ]
    made = []
    for sort in DECOYS:
        mine = [(i, value) for i, s, value in values if s == sort]
        kept = sum(texts[i].count(value) == before[i].count(value) for i, value in mine)
        made.append(Score("personal data", f"left alone: {sort}", kept, len(mine), 0, 0))
    without = {d.id for d in documents if d.kind != "personal"}
    same = {i for i in without if texts[i] == before[i]}
    made.append(Score.of("personal data", "left alone: documents without any", same, without, without))
    return made


def versions(text):
    """A detector that takes versions for addresses."""
    return [(m.start(), m.end(), "ip") for m in re.finditer(r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])", text)]


def test_personal_data(documents):
    made = personal_scores(documents)
    SCORES.extend(made.values())
    check_personal(made)


def test_what_only_looks_like_personal_data_stays(documents):
    made = decoy_scores(documents)
    SCORES.extend(made)
    for left_alone in made:
        left_alone.check(1.0)


def test_false_finds_are_counted(documents):
    """Precision can fall: a detector of versions finds what is no address."""
    wrong = {"detector": f"{__name__}:versions"}
    made = personal_scores(documents, **wrong)
    planted = sum(sort == "version" for d in documents if d.kind == "decoy" for sort, _ in d.label["values"])
    assert made["ip"].wrong >= planted > 0
    assert {kind for kind, one in made.items() if one.wrong} == {"ip"}
    with pytest.raises(AssertionError, match="is wrong too often"):
        check_personal(made)
    low = [one.what for one in decoy_scores(documents, **wrong) if one.recall < 1]
    assert low == ["left alone: version", "left alone: documents without any"]
    with pytest.raises(AssertionError, match="nothing could be wrong"):
        Score("step", "what", 1, 1, 0, 0).check(1.0, 1.0)


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
            floor
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


# --- all steps in a row -------------------------------------------------------------------------------------

EVERYTHING = {
    "normalise": {},
    "filter": {"languages": ["en"], "rules": ["gopher", "gopher-repetition", "c4", "fineweb"]},
    "personal_data": {},
    "decontaminate": {"files": ["questions.jsonl"]},
    "duplicates": {"near": {}},
}


def prepared(documents, here):
    """All steps over two sources of several parts each."""
    from llmkit.data.corpus import Corpus

    (here / "questions.jsonl").write_text(
        "".join(json.dumps({"q": text}) + "\n" for text in evaluation_texts())
    )
    names = []
    for number in range(2):
        path = here / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents[number::2]))
        names.append(path)
    sources = [Source(files=str(path), name=path.stem) for path in names]
    text = Corpus(sources, Prepare.model_validate(EVERYTHING), 0.1, here, here / "cache", Engine())
    assert all(len(one.sizes) >= 3 for one in text.texts)
    return text


def within(count, planted, recall, precision=1.0):
    """Whether as many were found as the floors allow, no more and no fewer."""
    return planted * recall <= count <= planted / precision


def test_all_steps_together_take_what_was_planted(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.texts.SMALLEST_PART", 200_000)
    text = prepared(documents, tmp_path)
    steps = {step["name"]: step for step in text.prepared.report["steps"]}
    took = {name: sum(step["dropped"].values()) for name, step in steps.items()}
    assert steps["normalise"]["documents_in"] == len(documents)
    assert steps["normalise"]["changed"] == len(ids(documents, "damaged"))
    assert took["normalise"] == took["personal_data"] == 0
    # Of the quality rules one document in a hundred is allowed to fall that should not.
    assert within(took["filter"], len(ids(documents, "foreign", "boilerplate")), 1.0, 0.99)
    wanted = Counter(kind for d in documents if d.kind == "personal" for kind, _ in d.label["values"])
    replaced = steps["personal_data"]["replaced"]
    assert {*replaced} == {*wanted}
    # What the filter took wrongly had three data of its own; so it is not marked.
    lost = 3 * (took["filter"] - len(ids(documents, "foreign", "boilerplate")))
    for kind, count in wanted.items():
        assert count * (0.9 if kind == "ip" else 1.0) - lost <= replaced[kind] <= count
    contaminated = {d.id for d in documents if d.kind == "evaluation" and d.label["words"] >= 13}
    assert took["decontaminate"] == len(contaminated)
    assert took["exact"] == len(ids(documents, "exact copy"))
    originals = {d.id: d.text for d in documents}
    alike = [jaccard(d.text, originals[d.label["of"]], 5) for d in documents if d.kind == "near copy"]
    surely, perhaps = sum(s >= 0.9 for s in alike), sum(s >= 0.65 for s in alike)
    assert surely <= took["near"] <= perhaps
    assert within(took["near"], sum(s >= 0.8 for s in alike), 0.9, 0.9)
    assert steps["near"]["documents_out"] == text.prepared.report["kept"]["documents"]


def test_what_all_steps_together_leave_are_the_right_documents(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.texts.SMALLEST_PART", 200_000)
    text = prepared(documents, tmp_path)
    left = Counter(t for one in text.texts for n in range(len(one.sizes)) for t in one.read(n, Tally()))
    assert set(left.values()) == {1}
    for d in documents:
        if d.kind in ("foreign", "boilerplate", "personal"):
            assert d.text not in left
        elif d.kind == "evaluation":
            assert (d.text in left) == (d.label["words"] < 13)
        elif d.kind == "damaged":
            assert d.label["repaired"] in left
        elif d.kind == "decoy":
            assert d.text in left
    originals = {d.id: d.text for d in documents}
    near = {d.label["of"]: d for d in documents if d.kind == "near copy"}
    for i in ids(documents, "clean"):
        one = near.get(i)
        assert originals[i] in left or (one is not None and one.text in left)
        if one is not None and jaccard(one.text, originals[i], 5) >= 0.9:
            # The longest of near copies stays, and only it.
            assert len({one.text, originals[i]} & left.keys()) == 1
            assert max(one.text, originals[i], key=lambda t: len(t.encode())) in left
