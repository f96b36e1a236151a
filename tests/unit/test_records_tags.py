"""Rows of `tag`: CoNLL files and lists, whose schemes are told apart."""

import pytest
from records import read, refused, rows

from llmkit.data.records.tags import BARE, num_bare, tag_key

CONLL = "-DOCSTART- O\n\nEU B-ORG\nrejects O\n\n# a comment of the file\n# O\nBonn B-LOC\nam I-LOC\n"


def test_conll(tmp_path):
    found = read(tmp_path, "a.conll", CONLL, "tag")
    assert [(row["tokens"], row["tags"]) for row in found.rows] == [
        (["EU", "rejects"], ["B-ORG", "O"]),
        (["#", "Bonn", "am"], ["O", "B-LOC", "I-LOC"]),
    ]
    assert [row["place"].rsplit("/", 1)[-1] for row in found.rows] == ["a.conll:3", "a.conll:7"]
    assert found.labels == ("O", "B-LOC", "I-LOC", "B-ORG")
    assert found.classes == {"O": 2, "B-LOC": 1, "I-LOC": 1, "B-ORG": 1}
    assert found.said == "read as words and tags, BIO, 2 types"
    assert found.counts == {}


def test_tabs_keep_blanks_and_odd_spaces(tmp_path):
    content = "New York\tB-x\n#tag\tO\na\u00a0b\tO\n\t\nc\tO\n"
    made = rows(tmp_path, "a.txt", content, "tag")
    assert [row["tokens"] for row in made] == [["New York", "#tag", "a\u00a0b"], ["c"]]


def test_columns_by_number(tmp_path):
    content = "1 The DET O\n2 EU NOUN B-x\n\n"
    assert rows(tmp_path, "a.conll", content, "tag", columns={"tokens": "2", "tags": "3"}) == [
        {"tokens": ["The", "EU"], "tags": ["DET", "NOUN"]}
    ]
    assert rows(tmp_path, "a.conll", content, "tag")[0]["tags"] == ["O", "B-x"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("b", "a.conll:3: one field where the file's first word has 2"),
        ("b O x", "a.conll:3: 3 fields where the file's first word has 2"),
    ],
)
def test_a_line_of_another_width(tmp_path, line, said):
    content = f"a O\n\n{line}\nc O\n\nd O\n"
    assert said in refused(tmp_path, "a.conll", content, "tag")
    found = read(tmp_path, "a.conll", content, "tag", on_error="skip")
    assert [row["tokens"] for row in found.rows] == [["a"], ["d"]]
    assert found.skipped.num_skipped == 1


def test_words_without_tags(tmp_path):
    assert "a.conll:1: a word without a tag" in refused(tmp_path, "a.conll", "a\nb\n", "tag")


def test_lists(tmp_path):
    content = [{"tokens": ["a", "b"], "ner_tags": ["S-x", "O"]}, {"tokens": ["c"], "ner_tags": ["O"]}]
    found = read(tmp_path, "a.jsonl", content, "tag")
    assert found.said == "read as words and tags, BIOES, 1 type"
    content = [{"words": ["a", "b"], "tags": ["NOUN", "VERB"]}]
    assert read(tmp_path, "b.jsonl", content, "tag").said.endswith(
        "2 tags without marks of beginning and inside"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "a.jsonl:1: 2 tokens and 1 tag"),
        ({"tokens": [], "tags": []}, "which is no list of tokens"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "which is no list of tokens"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "at place 2, which is no token"),
        ({"tokens": ["a"], "tags": [None]}, "at place 1, which is no tag"),
    ],
)
def test_wrong_lists(tmp_path, row, said):
    assert said in refused(tmp_path, "a.jsonl", [row], "tag")


def test_an_unknown_form_shows_the_keys_and_the_forms(tmp_path):
    message = refused(tmp_path, "a.jsonl", [{"sentence": "a", "spans": []}], "tag")
    assert "the keys found are sentence, spans" in message
    assert "`tokens` and `tags`, two lists of one length" in message


def test_tags_inside_without_a_beginning_are_counted(tmp_path):
    assert num_bare(["O", "I-x", "I-x", "I-y", "B-y", "I-x", "I-x"]) == 3
    assert num_bare(["B-x", "E-x", "S-x", "E-x"]) == 1
    found = read(tmp_path, "a.conll", "a I-x\nb I-x\n", "tag")
    assert found.counts == {BARE: 1}
    assert found.said.endswith("IO, 1 type")


def test_tags_sort_by_type_and_then_as_they_follow_each_other():
    tags = ["S-b", "I-a", "O", "E-b", "B-a", "I-b", "B-b", "NOUN"]
    assert sorted(tags, key=tag_key) == ["O", "NOUN", "B-a", "I-a", "B-b", "I-b", "E-b", "S-b"]
