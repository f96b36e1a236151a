"""Everything that decides a tokenizer or shards is part of their address, and nothing else is."""

import importlib.metadata
import os

import pytest
import rensa
from tokenizing import train_bpe

from llmkit.data.corpus import Corpus
from llmkit.data.pipeline import Engine
from llmkit.data.prepare import ensure_tokenizer
from llmkit.data.tokenizers import open_tokenizer
from llmkit.recipe.preparation import (
    Decontaminate,
    Duplicates,
    Filter,
    NearDuplicates,
    Normalise,
    PersonalData,
    Prepare,
)
from llmkit.recipe.schema import Source, TextForm, Tokenize
from llmkit.report.console import make_reporter

TEXTS = [f"the number {n} of the documents that there are says that it has {n * n} words" for n in range(60)]
EXAM = "what is the name of the mountain that the traveller saw from the window of the last train"
DETECTOR = "def find(text):\n    return []\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = []
    for size in (262, 270):
        folder = tmp_path_factory.mktemp("tokenizer")
        train_bpe(TEXTS, vocab_size=size, folder=folder)
        made.append(open_tokenizer(str(folder)))
    assert [len(one) for one in made] == [262, 270]
    return made


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    write(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def write(folder, texts=TEXTS):
    """A recipe's folder with its text and the files it speaks of."""
    folder.mkdir()
    rows = "".join(f'{{"text": "{text}", "title": "{text} as a title"}}\n' for text in texts)
    (folder / "a.jsonl").write_text(rows)
    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "b.txt").write_text("one more document for the order of files")
    (folder / "exam.txt").write_text(EXAM)
    (folder / "other_exam.txt").write_text(f"{EXAM} for today")
    (folder / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "a_detector.py").write_text(DETECTOR)


def corpus(here, *sources, held_out=0.1, workers=1, cache="cache", **prepare):
    found = [Source.model_validate(source) for source in sources or [{"files": "a.jsonl"}]]
    prepared = Prepare.model_validate(prepare)
    return Corpus(found, prepared, held_out, here, here.parent / cache, Engine(workers))


def address(here, tokenizer, *sources, **settings):
    """Where the shards of the last source are."""
    return corpus(here, *sources, **settings).shards(tokenizer)[-1].folder.name


# --- shards: the source and the split -----------------------------------------------------------------------

SOURCES = {
    "column": ({"files": "a.jsonl"}, {"files": "a.jsonl", "columns": {"text": "title"}}),
    "documents": ({"files": "a.txt", "documents": "line"}, {"files": "a.txt", "documents": "paragraph"}),
    "encoding": ({"files": "a.jsonl"}, {"files": "a.jsonl", "encoding": "latin-1"}),
    "limit": ({"files": "a.jsonl"}, {"files": "a.jsonl", "limit": "1KB"}),
    "another limit": ({"files": "a.jsonl", "limit": "900B"}, {"files": "a.jsonl", "limit": "1KB"}),
    "on_error": ({"files": "a.jsonl"}, {"files": "a.jsonl", "on_error": "skip"}),
    "format": ({"files": "a.jsonl"}, {"files": "a.jsonl", "format": "text", "documents": "line"}),
    "one more file": (
        {"files": ["a.txt"], "documents": "line"},
        {"files": ["a.txt", "b.txt"], "documents": "line"},
    ),
    "order of files": (
        {"files": ["a.txt", "b.txt"], "documents": "line"},
        {"files": ["b.txt", "a.txt"], "documents": "line"},
    ),
}


@pytest.mark.parametrize("prepare", [{}, {"duplicates": {}}], ids=["as it is", "prepared"])
@pytest.mark.parametrize("what", SOURCES)
def test_every_setting_of_a_source_moves_its_shards(here, tokenizers, what, prepare):
    one, other = SOURCES[what]
    assert address(here, tokenizers[0], one, **prepare) != address(here, tokenizers[0], other, **prepare)


@pytest.mark.parametrize("prepare", [{}, {"duplicates": {}}], ids=["as it is", "prepared"])
def test_content_tokenizer_and_split_move_shards(here, tokenizers, prepare):
    found = [
        address(here, tokenizers[0], **prepare),
        address(here, tokenizers[1], **prepare),
        address(here, tokenizers[0], held_out=0.2, **prepare),
        address(here, tokenizers[0], held_out=0, **prepare),
    ]
    path = here / "a.jsonl"
    stamp = path.stat()
    path.write_text(path.read_text().replace("number 7 of", "number 9 of"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same date, another byte
    found.append(address(here, tokenizers[0], **prepare))
    assert len(set(found)) == len(found)


def test_another_source_counts_where_copies_are_looked_for_and_not_otherwise(here, tokenizers):
    beside = ({"files": "b.txt"}, {"files": "a.jsonl"})
    alone = address(here, tokenizers[0], held_out=0)
    assert address(here, tokenizers[0], *beside, held_out=0) == alone
    prepared = address(here, tokenizers[0], held_out=0, duplicates={})
    assert address(here, tokenizers[0], *beside, held_out=0, duplicates={}) != prepared


# --- shards: what is done to the text -----------------------------------------------------------------------

PREPARED = {
    "normalise": ({}, {"normalise": {}}),
    "fix": ({"normalise": {}}, {"normalise": {"fix": False}}),
    "unicode": ({"normalise": {}}, {"normalise": {"unicode": "nfkc"}}),
    "control": ({"normalise": {}}, {"normalise": {"control": False}}),
    "html": ({"normalise": {}}, {"normalise": {"html": True}}),
    "half_width": ({"normalise": {}}, {"normalise": {"half_width": True}}),
    "whitespace": ({"normalise": {}}, {"normalise": {"whitespace": False}}),
    "filter": ({}, {"filter": {}}),
    "min_chars": ({"filter": {}}, {"filter": {"min_chars": 2}}),
    "max_chars": ({"filter": {}}, {"filter": {"max_chars": 9000}}),
    "languages": ({"filter": {}}, {"filter": {"languages": ["en"]}}),
    "another language": ({"filter": {"languages": ["en"]}}, {"filter": {"languages": ["en", "de"]}}),
    "language_score": (
        {"filter": {"languages": ["en"]}},
        {"filter": {"languages": ["en"], "language_score": 0.1}},
    ),
    "rules": ({"filter": {"rules": []}}, {"filter": {"rules": ["gopher-repetition"]}}),
    "personal_data": ({}, {"personal_data": {}}),
    "kinds": ({"personal_data": {}}, {"personal_data": {"kinds": ["mail"]}}),
    "detector": ({"personal_data": {}}, {"personal_data": {"detector": "a_detector:find"}}),
    "decontaminate": ({}, {"decontaminate": {"files": ["exam.txt"]}}),
    "evaluation file": (
        {"decontaminate": {"files": ["exam.txt"]}},
        {"decontaminate": {"files": ["other_exam.txt"]}},
    ),
    "decontaminate.ngram": (
        {"decontaminate": {"files": ["exam.txt"]}},
        {"decontaminate": {"files": ["exam.txt"], "ngram": 12}},
    ),
    "duplicates": ({}, {"duplicates": {}}),
    "exact": ({"duplicates": {"near": {}}}, {"duplicates": {"near": {}, "exact": False}}),
    "lines": ({"duplicates": {}}, {"duplicates": {"lines": 500}}),
    "another number of lines": ({"duplicates": {"lines": 400}}, {"duplicates": {"lines": 500}}),
    "near": ({"duplicates": {}}, {"duplicates": {"near": {}}}),
    "threshold": ({"duplicates": {"near": {}}}, {"duplicates": {"near": {"threshold": 0.81}}}),
    "near.ngram": ({"duplicates": {"near": {}}}, {"duplicates": {"near": {"ngram": 4}}}),
    "permutations": ({"duplicates": {"near": {}}}, {"duplicates": {"near": {"permutations": 64}}}),
}


@pytest.mark.parametrize("what", PREPARED)
def test_every_setting_of_preparation_moves_the_shards(here, tokenizers, what):
    one, other = PREPARED[what]
    # Without a held-out part, so that nothing but the text's identity can move them.
    found = [address(here, tokenizers[0], held_out=0, **prepare) for prepare in (one, other)]
    assert found[0] != found[1]


BLOCKS = {
    "normalise": Normalise,
    "filter": Filter,
    "personal_data": PersonalData,
    "decontaminate": Decontaminate,
    "duplicates": Duplicates,
}


def moved(one, other):
    """The settings that two preparations differ in, by their path."""
    for step, block in other.items():
        before = one.get(step, {})
        yield from (f"{step}.{key}" for key, value in block.items() if before.get(key) != value)
        yield from (f"{step}.near.{key}" for key in block.get("near") or {})


def test_no_setting_of_preparation_is_forgotten_here():
    assert {*BLOCKS} == {*Prepare.model_fields}
    wanted = {f"{step}.{name}" for step, block in BLOCKS.items() for name in block.model_fields}
    wanted |= {f"duplicates.near.{name}" for name in NearDuplicates.model_fields}
    tried = {path for one, other in PREPARED.values() for path in moved(one, other)}
    assert wanted == tried


def test_the_content_of_an_evaluation_file_moves_the_shards_and_its_date_does_not(here, tokenizers):
    settings = {"decontaminate": {"files": ["exam.txt"]}}
    before = address(here, tokenizers[0], **settings)
    os.utime(here / "exam.txt", (1, 1))
    assert address(here, tokenizers[0], **settings) == before
    (here / "exam.txt").write_text(EXAM.replace("mountain", "fountain"))
    assert address(here, tokenizers[0], **settings) != before


# --- versions -----------------------------------------------------------------------------------------------


def pretend(monkeypatch, package, version):
    """Let an installed package say that it is of another version."""
    known = importlib.metadata.Distribution.version

    def say(self):
        return version if self.metadata["Name"].lower() == package else known.fget(self)

    monkeypatch.setattr(importlib.metadata.Distribution, "version", property(say))


@pytest.mark.parametrize(
    ("package", "settings"),
    [("ftfy", {"normalise": {}}), ("resiliparse", {"normalise": {"fix": False, "html": True}})],
)
def test_another_version_of_a_package_moves_what_it_was_used_for(
    here, tokenizers, monkeypatch, package, settings
):
    plain = {"normalise": {"fix": False}}
    before = [address(here, tokenizers[0], **prepare) for prepare in (settings, plain)]
    pretend(monkeypatch, package, "99.1")
    assert importlib.metadata.version(package) == "99.1"
    after = [address(here, tokenizers[0], **prepare) for prepare in (settings, plain)]
    assert after[0] != before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("what", "value", "settings"),
    [
        ("llmkit.data.clean.cleaner.RULES_VERSION", 4711, {"filter": {}}),
        ("unicodedata.unidata_version", "99.0.0", {"personal_data": {}}),
        ("llmkit.data.duplicates.near.RULES", 4711, {"duplicates": {"near": {}}}),
    ],
)
def test_another_version_of_rules_moves_what_they_decide(
    here, tokenizers, monkeypatch, what, value, settings
):
    before = [address(here, tokenizers[0], **prepare) for prepare in (settings, {"duplicates": {}})]
    monkeypatch.setattr(what, value)
    after = [address(here, tokenizers[0], **prepare) for prepare in (settings, {"duplicates": {}})]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_other_signatures_move_the_shards(here, tokenizers, monkeypatch):
    settings = {"duplicates": {"near": {}}}
    before = address(here, tokenizers[0], **settings)
    known = rensa.RMinHash

    class Later:
        ALGORITHM_VERSION = known.ALGORITHM_VERSION + 1

        def __getattr__(self, name):
            return getattr(known, name)

    monkeypatch.setattr("llmkit.data.duplicates.near._rensa", Later)
    assert address(here, tokenizers[0], **settings) != before


def test_another_language_model_moves_the_shards(here, tokenizers, monkeypatch):
    settings = {"filter": {"languages": ["en"]}}
    before = address(here, tokenizers[0], **settings)
    monkeypatch.setattr("llmkit.data.clean.cleaner.model_file", lambda: here / "exam.txt")
    assert address(here, tokenizers[0], **settings) != before


# --- the tokenizer ------------------------------------------------------------------------------------------


def learnt(here, *sources, max_length=None, held_out=0.1, cache="cache", prepare=None, workers=1, **settings):
    """Where the tokenizer is."""
    spec = Tokenize.model_validate({"vocab_size": 300, **settings})
    text = corpus(here, *sources, held_out=held_out, cache=cache, workers=workers, **(prepare or {}))
    return ensure_tokenizer(spec, text, make_reporter(quiet=True), max_length=max_length)[0].name


UNIGRAM = {"algorithm": "unigram", "vocab_size": 400}
LEARNT = {
    "algorithm": ({"vocab_size": 400}, UNIGRAM),
    "vocab_size": ({}, {"vocab_size": 301}),
    "sample": ({}, {"sample": "50MB"}),
    "special_tokens": ({}, {"special_tokens": ["<|user|>"]}),
    "order of special tokens": (
        {"special_tokens": ["<|user|>", "<|tool|>"]},
        {"special_tokens": ["<|tool|>", "<|user|>"]},
    ),
    "normalise.unicode": ({}, {"normalise": {"unicode": "nfc"}}),
    "normalise.lowercase": ({}, {"normalise": {"lowercase": True}}),
    "normalise.strip_accents": ({}, {"normalise": {"strip_accents": True}}),
    "byte_fallback": (UNIGRAM, {**UNIGRAM, "byte_fallback": False}),
    "chat_template": ({}, {"chat_template": "chatml"}),
    "file of chat_template": ({"chat_template": "chatml"}, {"chat_template": "chat.jinja"}),
    "held_out": ({}, {"held_out": 0.2}),
    "max_length": ({}, {"max_length": 64}),
    "prepare": ({}, {"prepare": {"duplicates": {}}}),
}


@pytest.mark.parametrize("what", LEARNT)
def test_every_setting_moves_the_tokenizer(here, what):
    one, other = LEARNT[what]
    assert learnt(here, **one) != learnt(here, **other)


def test_no_setting_of_tokenizers_is_forgotten_here():
    tried = {name.partition(".")[0] for _, other in LEARNT.values() for name in other}
    # An existing tokenizer and the text have tests of their own.
    assert {*Tokenize.model_fields} - {"tokenizer", "data"} <= tried
    forms = {name.partition(".")[2] for name in LEARNT if name.startswith("normalise.")}
    assert forms == {*TextForm.model_fields}


def test_the_text_moves_the_tokenizer(here):
    found = [
        learnt(here),
        learnt(here, {"files": "a.txt"}, held_out=0),
        learnt(here, {"files": "a.txt", "documents": "line"}, held_out=0),
        learnt(here, {"files": "a.jsonl"}, {"files": "b.txt"}),
    ]
    path = here / "a.jsonl"
    path.write_text(path.read_text().replace("number 7 of", "number 9 of"))
    found.append(learnt(here))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("settings", [{}, {"tokenizer": "taken"}], ids=["learnt", "taken"])
def test_the_content_of_a_chat_template_moves_the_tokenizer(here, tokenizers, settings):
    if settings:
        settings = {"tokenizer": tokenizers[0].name_or_path}
    before = learnt(here, chat_template="chat.jinja", **settings)
    assert learnt(here, chat_template="chat.jinja", **settings) == before
    (here / "chat.jinja").write_text("{{ messages[1]['content'] }}")
    assert learnt(here, chat_template="chat.jinja", **settings) != before


def test_what_is_taken_moves_by_its_content_and_what_is_added(here, tokenizers):
    one, other = (tokenizer.name_or_path for tokenizer in tokenizers)
    found = [
        learnt(here, tokenizer=one),
        learnt(here, tokenizer=other),
        learnt(here, tokenizer=one, special_tokens=["<|user|>"]),
        learnt(here, tokenizer=one, chat_template="chatml"),
    ]
    assert len(set(found)) == len(found)


# --- what must not count ------------------------------------------------------------------------------------

PREPARATIONS = pytest.mark.parametrize(
    "prepare", [{}, {"normalise": {}, "duplicates": {}}], ids=["as it is", "prepared"]
)
SAME = {
    "name": {"name": "another"},
    "weight": {"weight": 0.3},
    "max_epochs": {"weight": 0.3, "max_epochs": 2},
    "stated format": {"format": "jsonl"},
    "pattern": {"files": "a*.jsonl"},
}


@PREPARATIONS
@pytest.mark.parametrize("what", SAME)
def test_what_does_not_decide_the_text_does_not_count(here, tokenizers, what, prepare):
    source = {"files": "a.jsonl", **SAME[what]}
    assert address(here, tokenizers[0], **prepare) == address(here, tokenizers[0], source, **prepare)
    assert learnt(here, prepare=prepare) == learnt(here, source, prepare=prepare)


@PREPARATIONS
def test_neither_do_dates_places_names_of_files_and_processes(here, tokenizers, tmp_path, prepare):
    before = address(here, tokenizers[0], **prepare), learnt(here, prepare=prepare)

    def now(folder=here, *sources, **options):
        return (
            address(folder, tokenizers[0], *sources, **prepare, **options),
            learnt(folder, *sources, prepare=prepare, **options),
        )

    os.utime(here / "a.jsonl", (1, 1))
    assert now() == before
    assert now(cache="elsewhere", workers=2) == before
    write(tmp_path / "moved")
    assert now(tmp_path / "moved", cache="third") == before
    (here / "a.jsonl").rename(here / "renamed.jsonl")
    assert now(here, {"files": "renamed.jsonl"}) == before
