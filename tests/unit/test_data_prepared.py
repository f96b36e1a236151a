"""A corpus prepared in parts: what each step took, the same in any order, by any number of processes."""

import json
import random
import re

import pytest

from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine
from llmkit.data.places import Tally
from llmkit.errors import DataError
from llmkit.recipe.preparation import Prepare
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
