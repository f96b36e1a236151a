"""Rows of `seq2seq` and `embed`."""

import pytest
from records import read, refused, rows

from llmkit.data.records.pairs import CUT


def test_a_table_without_a_header(tmp_path):
    found = read(tmp_path, "a.tsv", "Hi.\t嗨。\tCC-BY\nRun.\t跑。\tCC-BY\n", "seq2seq")
    assert [(row["source"], row["target"]) for row in found.rows] == [("Hi.", "嗨。"), ("Run.", "跑。")]
    assert found.said == "read as columns: source from `1`, target from `2`; not used: `3`"
    assert rows(tmp_path, "a.tsv", "Hi.\t嗨。\n", "seq2seq", columns={"source": "2", "target": "1"}) == [
        {"source": "嗨。", "target": "Hi."}
    ]


@pytest.mark.parametrize(
    ("source", "target"), [("prompt", "completion"), ("article", "highlights"), ("en", "zh"), ("src", "tgt")]
)
def test_names(tmp_path, source, target):
    content = [{"id": 1, source: "a", target: "b"}] if source != "en" else [{source: "a", target: "b"}]
    assert rows(tmp_path, "a.jsonl", content, "seq2seq") == [{"source": "a", "target": "b"}]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("text,category\na red cat,1\na bad dog,0\n", "text, category"),
        ("text,kind\na b,pos\nc d,neg\ne f,pos\ng h,neg\n", "text, kind"),
        ("one,two,gold\na b,c d,0.4\ne f,g h,0.9\n", "one, two, gold"),
        ("a red cat,1\na bad dog,0\n", "1, 2"),
    ],
)
def test_what_stands_over_labels_is_no_text(tmp_path, text, keys):
    said = refused(tmp_path, "a.csv", text, "embed")
    assert f"the keys found are {keys}; nothing tells which is" in said
    assert "columns: {" in said
    assert "positive: category" not in said


def test_texts_of_a_word_are_pairs(tmp_path):
    found = rows(tmp_path, "a.csv", "house,Haus\ncat,Katze\n", "embed")
    assert [row["anchor"] for row in found] == ["house", "cat"]


def test_a_lone_column_of_text_is_not_proposed_for_labels(tmp_path):
    said = refused(tmp_path, "a.csv", "text\na b\nc d\n", "cls")
    assert "add one with the 'label'" in said
    assert "label: text" not in said


def test_a_header_is_no_row(tmp_path):
    assert rows(tmp_path, "a.tsv", "source\ttarget\na\tb\n", "seq2seq") == [{"source": "a", "target": "b"}]


def test_translation(tmp_path):
    content = [{"translation": {"en": "Hi.", "zh": "嗨。"}}]
    found = read(tmp_path, "a.jsonl", content, "seq2seq")
    assert (found.said, found.form) == ("read as translation, en to zh", "translation")
    turned = rows(tmp_path, "a.jsonl", content, "seq2seq", columns={"source": "zh"})
    assert turned == [{"source": "嗨。", "target": "Hi."}]
    assert rows(tmp_path, "a.jsonl", content, "seq2seq", columns={"target": "translation.en"}) == turned


def test_marks_of_the_end_are_taken_off_and_counted(tmp_path):
    content = [{"prompt": "a", "completion": "b.<|endoftext|>"}, {"prompt": "a", "completion": "c</s>\n"}]
    found = read(tmp_path, "a.jsonl", content, "seq2seq")
    assert [row["target"] for row in found.rows] == ["b.", "c"]
    assert found.counts == {CUT: 2}


def test_an_empty_target(tmp_path):
    message = refused(tmp_path, "a.tsv", "a\tb\nc\t\n", "seq2seq")
    assert "a.tsv:2: column '2' is empty" in message


def test_no_target(tmp_path):
    message = refused(tmp_path, "a.jsonl", [{"source": "a", "targget": "b"}], "seq2seq")
    assert "nothing tells which is 'target'" in message
    assert "`columns: {target: targget}`" in message


def test_embed_pairs_triplets_and_scores(tmp_path):
    found = read(tmp_path, "a.jsonl", [{"query": "a", "answer": "b"}], "embed")
    assert (found.form, found.rows[0]["anchor"], found.rows[0]["positive"]) == ("pairs", "a", "b")
    content = [{"anchor": "a", "positive": "b", "negative": "c"}]
    assert rows(tmp_path, "a.jsonl", content, "embed")[0]["negatives"] == ["c"]
    found = read(tmp_path, "a.csv", "sentence1,sentence2,score\na,b,0.8\n", "embed")
    assert (found.form, found.rows[0]["score"]) == ("scored", 0.8)
    assert rows(tmp_path, "a.tsv", "a\tb\t4.5\n", "embed")[0]["score"] == 4.5
    # A third column without a name may be anything, such as a licence.
    assert "negatives" not in rows(tmp_path, "a.tsv", "a\tb\tc\n", "embed")[0]
    assert rows(tmp_path, "a.tsv", "a\tb\tc\n", "embed", form="triplets")[0]["negatives"] == ["c"]


def test_several_positives_are_several_rows(tmp_path):
    content = [{"query": "a", "pos": ["b", "c"], "neg": ["d", "e"]}]
    found = read(tmp_path, "a.jsonl", content, "embed")
    assert [row["positive"] for row in found.rows] == ["b", "c"]
    assert all(row["negatives"] == ["d", "e"] for row in found.rows)
    assert found.rows[1]["place"].endswith("a.jsonl:1: pos[1]")
    assert found.said.endswith("2.0 negatives a row")


def test_a_form_can_be_said(tmp_path):
    content = [{"anchor": "a", "positive": "b", "label": 1}]
    assert "score" in rows(tmp_path, "a.jsonl", content, "embed")[0]
    assert rows(tmp_path, "a.jsonl", content, "embed", form="pairs") == [{"anchor": "a", "positive": "b"}]
    message = refused(tmp_path, "a.jsonl", content, "embed", form="triplets")
    assert "the rows are not of the form `triplets`" in message
