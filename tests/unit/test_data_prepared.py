"""A corpus prepared in parts: what each step took, the same in any order, by any number of processes."""

import json
import pickle
import random
import re
import tracemalloc

import numpy as np
import pytest

from llmkit.data import places, texts
from llmkit.data.corpus import Corpus
from llmkit.data.duplicates.exact import document_keys
from llmkit.data.duplicates.near import Signer
from llmkit.data.pipeline import Engine
from llmkit.data.places import Tally
from llmkit.data.texts import TextWriter
from llmkit.data.works import SignWork, StripWork
from llmkit.errors import DataError
from llmkit.recipe.preparation import NearDuplicates, Prepare
from llmkit.recipe.schema import Source

WORDS = re.findall(
    r"\w+",
    """the river bends where old mills stand and children throw stones across its brown water while cows look on from
    meadows full of yellow flowers that nobody planted but everyone remembers from long quiet summers""",
)


def prose(seed, words=120):
    """Text in which no two seeds share a run of words."""
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(50)}" for _ in range(words))


PLAIN = [prose(seed) for seed in range(30)]
NEAR = PLAIN[3].rsplit(" ", 4)[0] + " but the end is another one"
EVALUATION = "what is the name of the mountain that the traveller saw from the window of the last train"


def documents():
    """Thirty texts of their own, and what is to be found."""
    leaked = f"{prose(100)} {EVALUATION} {prose(101)}"
    menu = [f"Home | About | Contact\n{prose(200 + i)}" for i in range(6)]
    return [
        *PLAIN,
        PLAIN[7],
        PLAIN[8],
        PLAIN[7],
        NEAR,
        "short",
        leaked,
        *menu,
        f"{prose(300)} write to jane.doe@example.org today",
    ]


SPEC = {
    "normalise": {},
    "filter": {"min_chars": 20},
    "personal_data": {},
    "duplicates": {"lines": 5, "near": {}},
    "decontaminate": {"files": ["exam.txt"]},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exam.txt").write_text(EVALUATION)
    return tmp_path


def write(here, name, texts):
    (here / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def corpus(here, *files, workers=1, cache="cache", **spec):
    sources = [Source(files=[name], name=name) for name in files]
    return Corpus(sources, Prepare.model_validate({**SPEC, **spec}), 0.1, here, here / cache, Engine(workers))


def kept(text):
    return [[*one.read(number, Tally())] for one in text.texts for number in range(len(one.sizes))]


def test_each_step_takes_what_it_is_for(here):
    write(here, "a.jsonl", documents())
    text = corpus(here, "a.jsonl")
    [texts] = kept(text)
    report = text.prepared.report
    steps = {step["name"]: step for step in report["steps"]}
    assert [*steps] == ["normalise", "filter", "personal_data", "decontaminate", "lines", "exact", "near"]
    assert steps["filter"]["dropped"] == {"too short": 1}
    assert steps["personal_data"]["replaced"] == {"mail": 1}
    assert sum(steps["decontaminate"]["dropped"].values()) == 1
    assert steps["lines"]["replaced"] == {"line": 6}
    assert steps["exact"]["dropped"] == {"copy": 3}
    assert steps["near"]["dropped"] == {"near copy": 1}
    assert report["read"]["documents"] == len(documents())
    assert report["kept"]["documents"] == len(texts) == len(documents()) - 6
    # The longest of near copies stays; menus are gone, the text below them is not; no address is left.
    assert (NEAR in texts) != (PLAIN[3] in texts)
    assert max(NEAR, PLAIN[3], key=len) in texts
    assert sum(PLAIN[7] == one for one in texts) == 1
    assert prose(202) in texts
    assert not any("Contact" in one or "@" in one for one in texts)
    assert any("[MAIL]" in one for one in texts)
    for before, after in zip(report["steps"], report["steps"][1:], strict=False):
        assert before["documents_out"] == after["documents_in"]


def test_what_is_kept_does_not_depend_on_order_files_or_workers(here):
    texts = documents()
    write(here, "a.jsonl", texts)
    expected = kept(corpus(here, "a.jsonl"))[0]
    shuffled = random.Random(1).sample(texts, len(texts))
    write(here, "b.jsonl", shuffled[:15])
    write(here, "c.jsonl", shuffled[15:])
    for number, (files, workers) in enumerate([(("b.jsonl", "c.jsonl"), 2), (("c.jsonl", "b.jsonl"), 1)]):
        text = corpus(here, *files, workers=workers, cache=f"other{number}")
        assert sorted(one for part in kept(text) for one in part) == sorted(expected)
        assert text.prepared.report["kept"]["documents"] == len(expected)


def test_one_process_and_two_write_the_same_bytes(here):
    write(here, "a.jsonl", documents())
    write(here, "b.jsonl", [prose(seed) for seed in range(25, 60)])
    for workers in (1, 2):
        assert kept(corpus(here, "a.jsonl", "b.jsonl", workers=workers, cache=f"by{workers}"))
    files = [
        {
            path.relative_to(here / f"by{workers}"): path.read_bytes()
            for path in (here / f"by{workers}").rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        for workers in (1, 2)
    ]
    assert files[0] == files[1]
    assert len(files[0]) > 6


def test_another_threshold_does_not_clean_again_and_another_file_does(here):
    write(here, "a.jsonl", documents())
    kept(corpus(here, "a.jsonl"))
    cleaned = {*(here / "cache/text").glob("*.clean")}
    kept(corpus(here, "a.jsonl", duplicates={"near": {"threshold": 0.5}}))
    assert {*(here / "cache/text").glob("*.clean")} == cleaned
    assert len([*(here / "cache/text").glob("*.decided")]) == 2
    write(here, "a.jsonl", documents()[1:])
    kept(corpus(here, "a.jsonl"))
    assert len([*(here / "cache/text").glob("*.clean")]) == 2


def test_damaged_text_is_made_again(here):
    write(here, "a.jsonl", documents())
    first = kept(corpus(here, "a.jsonl"))
    damaged = next((here / "cache/text").glob("*.stripped/part-000000/text.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert kept(corpus(here, "a.jsonl")) == first


def test_nothing_left_says_which_step_took_it(here):
    write(here, "a.jsonl", [prose(1), prose(2), "x"])
    text = corpus(here, "a.jsonl", filter={"min_chars": 10_000})
    with pytest.raises(DataError, match=r"none of the 3 documents: filter \(too short\) took 3"):
        _ = text.texts


def test_examples_tell_why_and_give_no_personal_data_away(here):
    write(here, "a.jsonl", [*documents(), "me@example.org"])
    examples = corpus(here, "a.jsonl").prepared.examples
    reasons = {(one["step"], one["reason"]) for one in examples}
    assert {("filter", "too short"), ("exact", "copy"), ("near", "near copy")} <= reasons
    assert not any("@" in one["text"] for one in examples)
    short = [one for one in examples if one["step"] == "filter"]
    assert sorted(one["where"] for one in short) == ["a.jsonl:35", "a.jsonl:44"]
    copies = {one["text"]: one["kept"] for one in examples if one["step"] == "exact"}
    assert copies == {PLAIN[number][:300]: PLAIN[number][:100] for number in (7, 8)}
    [near] = [one for one in examples if one["step"] == "near"]
    assert near["kept"] == max(NEAR, PLAIN[3], key=len)[:100]
    assert near["text"] == min(NEAR, PLAIN[3], key=len)[:300]


def test_the_kept_document_is_found_in_another_part_and_behind_a_copy_of_the_signature(here, monkeypatch):
    monkeypatch.setattr(texts, "SMALLEST_PART", 500)
    long = f"{prose(1)} more words at the end"
    write(here, "a.jsonl", [prose(2), prose(1), prose(1).upper(), long, f"{long}!", prose(2)])
    text = corpus(here, "a.jsonl", personal_data=None)
    assert len(text.texts[0].sizes) > 5
    assert [one for part in kept(text) for one in part] == [prose(2), f"{long}!"]
    examples = [(one["step"], one["text"], one["kept"]) for one in text.prepared.examples]
    assert sorted(examples) == sorted(
        [("exact", prose(2)[:300], prose(2)[:100])]
        + [("near", one[:300], f"{long}!"[:100]) for one in (prose(1), prose(1).upper(), long)]
    )


def test_line_numbers_of_examples_cost_one_pass_of_the_file(here, monkeypatch):
    monkeypatch.setattr(texts, "SMALLEST_PART", 2**12)
    rows = [f"no {number}" if number % 5 == 0 else prose(number, 40) for number in range(400)]
    write(here, "a.jsonl", rows)
    with (here / "a.jsonl").open("a") as file:
        file.write("broken\n" * 30)
    read = []
    count = places._count_lines
    monkeypatch.setattr(places, "_count_lines", lambda *where: [read.append(where[1:]), count(*where)][1])
    source = Source(files=["a.jsonl"], on_error="skip", name="a")
    spec = Prepare.model_validate({"filter": {"min_chars": 20}})
    made = Corpus([source], spec, 0.1, here, here / "cache", Engine(1)).prepared
    shown = {int(one["where"].partition(":")[2]): one["text"] for one in made.examples}
    assert len(shown) == 20
    assert all(rows[line - 1] == text for line, text in shown.items())
    skipped = made.report["skipped"]["examples"]
    assert [one["where"] for one in skipped] == [f"a.jsonl:{401 + number}" for number in range(20)]
    assert len(read) > 10
    assert sum(stop - start for start, stop in read) <= (here / "a.jsonl").stat().st_size


def test_a_long_row_is_cleaned_whole_and_cut_afterwards(here):
    script = "var a = 1;\n\n" * 120_000
    page = f"<html><head><script>{script}</script></head><body><p>{prose(1)}</p></body></html>"
    long = "\n".join(prose(number, 2_000) for number in range(100))
    assert len(long) > 2**20
    write(here, "a.jsonl", [page, long, prose(2)])
    spec = {"normalise": {"html": True}, "filter": None, "duplicates": {}, "decontaminate": None}
    text = corpus(here, "a.jsonl", **spec)
    [found] = kept(text)
    assert (found[0], found[-1]) == (prose(1), prose(2))
    assert "".join(found[1:-1]) == long
    assert max(map(len, found)) <= 2**16
    steps = {step["name"]: step for step in text.prepared.report["steps"]}
    assert text.prepared.report["read"]["documents"] == 3
    assert (steps["cut"]["documents_in"], steps["cut"]["documents_out"]) == (3, len(found))
    assert steps["exact"]["documents_in"] == len(found)


def test_frequent_lines_reach_the_workers_as_a_file_that_is_gone_afterwards(here):
    write(here, "a.jsonl", documents())
    write(here, "b.jsonl", documents())
    text = corpus(here, "a.jsonl", "b.jsonl", workers=2)
    steps = {step["name"]: step for step in text.prepared.report["steps"]}
    assert steps["lines"]["replaced"] == {"line": 12}
    assert len(pickle.dumps(StripWork((), here / "frequent.npy"))) < 1000
    assert not [*(here / "cache/text").glob("*.frequent")]


def test_signing_holds_a_batch_of_a_part_and_not_all_of_it(here):
    part, out = here / "part", here / "out"
    part.mkdir()
    out.mkdir()
    writer = TextWriter(part)
    for number in range(30_000):
        writer.add(f"short text {number}")
    writer.close()
    work = SignWork((part,), NearDuplicates()).open()
    Signer(NearDuplicates()).sign(["what is made once"])
    tracemalloc.start()
    work(0, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    signatures, keys = np.load(out / "signatures.npy"), np.load(out / "keys.npy")
    assert (signatures.shape, keys.shape) == ((30_000, 128), (30_000, 2))
    assert peak < signatures.nbytes // 2
    chosen = [0, 255, 256, 29_999]
    some = [f"short text {number}" for number in chosen]
    assert np.array_equal(keys[chosen], document_keys(some))
    assert np.array_equal(signatures[chosen], Signer(NearDuplicates()).sign(some))


def test_stored_texts_look_at_their_ends_in_blocks(here, monkeypatch):
    monkeypatch.setattr(texts, "_BLOCK", 3)
    writer = TextWriter(here)
    written = [f"übung {number}" * number for number in range(1, 9)]
    for text in written:
        writer.add(text)
    writer.close()
    assert [*texts.StoredTexts(here)] == written


def test_the_source_named_first_keeps_an_exact_copy(here):
    write(here, "a.jsonl", [prose(1), prose(2)])
    write(here, "b.jsonl", [prose(2), prose(3)])
    spec = {"decontaminate": None, "duplicates": {}, "filter": None}
    assert kept(corpus(here, "a.jsonl", "b.jsonl", **spec)) == [[prose(1), prose(2)], [prose(3)]]
    assert kept(corpus(here, "b.jsonl", "a.jsonl", **spec)) == [[prose(2), prose(3)], [prose(1)]]


def test_a_dangling_link_among_good_files_is_skipped_once(here):
    (here / "d").mkdir()
    write(here, "d/a.jsonl", [prose(1), prose(2)])
    (here / "d/b.jsonl").symlink_to(here / "nowhere")
    for prepare in (Prepare(), Prepare.model_validate({"filter": {"min_chars": 20}})):
        source = Source(files=["d"], on_error="skip")
        made = Corpus([source], prepare, 0.1, here, here / "cache", Engine(1))
        assert kept(made) == [[prose(1), prose(2)]]
    reason = "cannot be read (No such file or directory)"
    assert made.prepared.report["skipped"]["files"] == {reason: 1}
    with pytest.raises(DataError, match=r"d/b.jsonl: cannot be read"):
        kept(Corpus([Source(files=["d"])], Prepare(), 0.1, here, here / "cache", Engine(1)))
