"""Rows of `cls` and `regression`: found by the names of their columns, labels in a stated order, faults named."""

import pytest
from records import read, refused, rows

from llmkit.data.records import read_rows
from llmkit.data.records.classes import DISAGREE
from llmkit.recipe.labelled import Labelled

TWO = "text,label\ngood,pos\nbad,neg\n"


def test_columns_are_found_by_name_and_said(tmp_path):
    found = read(tmp_path, "a.csv", "id,Review,Category\n1,good,pos\n2,bad,neg\n", "cls")
    assert [(row["text"], row["label"]) for row in found.rows] == [("good", "pos"), ("bad", "neg")]
    assert [row["place"].rsplit("/", 1)[-1] for row in found.rows] == ["a.csv:2", "a.csv:3"]
    assert found.said == (
        "read as columns: text from `Review`, label from `Category`; not used: `id`, 2 classes"
    )
    assert found.classes == {"neg": 1, "pos": 1}


def test_columns_can_be_said(tmp_path):
    content = [
        {"meta": {"stars": 5}, "text": "no", "review": "good"},
        {"meta": {"stars": 1}, "review": "bad"},
    ]
    made = rows(tmp_path, "a.jsonl", content, "cls", columns={"text": "review", "label": "meta.stars"})
    assert made == [{"text": "good", "label": "5"}, {"text": "bad", "label": "1"}]


def test_two_texts(tmp_path):
    content = "sentence1\tsentence2\tlabel\na\tb\tyes\nc\td\tno\n"
    assert rows(tmp_path, "a.tsv", content, "cls")[0] == {"text": "a", "other": "b", "label": "yes"}


def test_numbers_sort_as_numbers(tmp_path):
    content = [{"text": f"t{i}", "label": label} for i, label in enumerate([10, 2, 1, 10])]
    assert read(tmp_path, "a.jsonl", content, "cls").labels == ("1", "2", "10")
    content = [{"text": f"t{i}", "label": label} for i, label in enumerate(["star 10", "star 2", "b", "a"])]
    assert read(tmp_path, "b.jsonl", content, "cls").labels == ("a", "b", "star 2", "star 10")


def test_labels_do_not_depend_on_the_order_of_rows(tmp_path):
    content = [{"text": f"t{i}", "label": label} for i, label in enumerate("badc")]
    assert read(tmp_path, "a.jsonl", content, "cls").labels == tuple("abcd")


def test_several_labels_by_list(tmp_path):
    content = [
        {"text": "a", "label": ["x", "y", "x"]},
        {"text": "b", "label": "x"},
        {"text": "c", "label": []},
    ]
    found = read(tmp_path, "a.jsonl", content, "cls")
    assert [row["label"] for row in found.rows] == [["x", "y"], ["x"], []]
    assert found.said.endswith("2 classes, 1.0 a text")


def test_several_labels_in_a_field_only_when_said(tmp_path):
    content = 'text,labels\na,x|y\nb,x\nc,"[""x"", ""z""]"\n'
    assert rows(tmp_path, "a.csv", "text,labels\na,x|y\nb,x\n", "cls")[0]["label"] == "x|y"
    assert rows(tmp_path, "a.csv", "text,labels\na,x| y\nb,\n", "cls", separator="|") == [
        {"text": "a", "label": ["x", "y"]},
        {"text": "b", "label": []},
    ]
    assert rows(tmp_path, "a.csv", content, "cls")[2]["label"] == ["x", "z"]


def test_without_a_header(tmp_path):
    found = read(tmp_path, "a.csv", "so good,pos\nso bad,neg\nfine,pos\n", "cls")
    assert [(row["text"], row["label"]) for row in found.rows] == [
        ("so good", "pos"),
        ("so bad", "neg"),
        ("fine", "pos"),
    ]
    assert rows(tmp_path, "b.tsv", "1\tgood\n0\tbad\n1\tfine\n", "cls")[1] == {"text": "bad", "label": "0"}
    made = rows(tmp_path, "c.csv", "x,9,good\ny,8,bad\n", "cls", columns={"text": "3", "label": "1"})
    assert made == [{"text": "good", "label": "x"}, {"text": "bad", "label": "y"}]


def test_a_header_of_unknown_names_is_no_row(tmp_path):
    message = refused(tmp_path, "a.csv", "foo,bar\ngood,pos\nbad,neg\n", "cls")
    assert "the keys found are foo, bar" in message
    assert "columns: {text:" in message
    found = read(tmp_path, "a.csv", "foo,bar\ngood,pos\nbad,neg\n", "cls", header=False)
    assert len(found.rows) == 3


def test_one_known_name_of_two_tells_the_other(tmp_path):
    assert rows(tmp_path, "a.csv", "review,mood\ngood,pos\nbad,neg\n", "cls")[0] == {
        "text": "good",
        "label": "pos",
    }


def test_a_known_name_makes_a_header_though_a_row_has_the_other(tmp_path):
    assert rows(tmp_path, "a.csv", "review,mood\na,mood\nb,mood\nc,x\n", "cls")[0]["text"] == "a"


def test_a_column_plays_one_role(tmp_path):
    content = [{"label": "good", "y": "pos"}, {"label": "bad", "y": "neg"}]
    assert rows(tmp_path, "a.jsonl", content, "cls", columns={"text": "label"})[0] == {
        "text": "good",
        "label": "pos",
    }


def test_semicolons(tmp_path):
    assert rows(tmp_path, "a.csv", "text;label\na;x\nb;y\n", "cls")[1] == {"text": "b", "label": "y"}


def test_none_may_be_a_class(tmp_path):
    assert read(tmp_path, "a.csv", "text,label\na,none\nb,null\n", "cls").labels == ("none", "null")


def test_texts_with_different_labels_are_counted(tmp_path):
    content = "text,label\na,x\na,y\nb,x\nb,x\n"
    assert read(tmp_path, "a.csv", content, "cls").counts == {DISAGREE: 1}


def test_fasttext(tmp_path):
    found = read(tmp_path, "a.txt", "__label__a so good\n__label__b __label__a well\n", "cls")
    assert [(row["text"], row["label"]) for row in found.rows] == [("so good", ["a"]), ("well", ["b", "a"])]
    assert found.form == "fasttext"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (",pos", "a.csv:3: column 'text' is empty"),
        ("  ,pos", "a.csv:3: column 'text' is empty"),
        ("good,", "a.csv:3: column 'label' holds , which is no label"),
        ("good,NaN", "a.csv:3: column 'label' holds NaN, which is no label"),
        ("good,pos,more", "a.csv:3: 3 fields where line 1 names 2 columns"),
        ("good", "a.csv:3: 1 fields where line 1 names 2 columns"),
    ],
)
def test_a_wrong_row_is_named_or_skipped(tmp_path, line, said):
    content = f"text,label\ngood,pos\n{line}\nbad,neg\n"
    assert said in refused(tmp_path, "a.csv", content, "cls")
    found = read(tmp_path, "a.csv", content, "cls", on_error="skip")
    assert [row["text"] for row in found.rows] == ["good", "bad"]
    assert found.skipped.num_skipped == 1
    assert found.skipped.examples[0].where.endswith("a.csv:3")


@pytest.mark.parametrize("label", [None, float("nan"), {"a": 1}])
def test_a_label_that_is_none(tmp_path, label):
    content = [{"text": "a", "label": "x"}, {"text": "b", "label": label}, {"text": "c", "label": "y"}]
    assert "a.jsonl:2: column 'label' holds" in refused(tmp_path, "a.jsonl", content, "cls")


def test_a_missing_column_of_one_row(tmp_path):
    content = [{"text": "a", "label": "x"}, {"text": "b", "lable": "y"}]
    message = refused(tmp_path, "a.jsonl", content, "cls")
    assert "a.jsonl:2: there is no column 'label'; there are: text, lable" in message
    assert "`columns: {label: lable}`" in message


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        (("5.0", "4.0"), "whole numbers without a point"),
        (("5", "4.5"), "write names"),
        ((1.5, 2.5), "write names"),
    ],
)
def test_decimals_are_no_classes(tmp_path, labels, hint):
    content = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    message = refused(tmp_path, "a.jsonl", content, "cls")
    assert "a number with a point, no class" in message
    assert "`task: regression`" in message
    assert hint in message


def test_a_version_among_names_is_a_class(tmp_path):
    content = [{"text": "a", "label": "3.11"}, {"text": "b", "label": "none of these"}]
    assert read(tmp_path, "a.jsonl", content, "cls").labels == ("3.11", "none of these")


def test_one_class_alone(tmp_path):
    content = "text,label\na,x\nb,x\n"
    assert "all 2 rows have the label 'x'" in refused(tmp_path, "a.csv", content, "cls")
    assert len(read(tmp_path, "a.csv", content, "cls", training=False).rows) == 2


def test_too_many_classes(tmp_path):
    content = "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(1001))
    message = refused(tmp_path, "a.csv", content, "cls")
    assert "1,001 different values, over 1,000 (1,001 of them once)" in message
    assert "raise `max_labels`" in message
    assert len(read(tmp_path, "a.csv", content, "cls", max_labels=1001).labels) == 1001


def test_no_rows(tmp_path):
    assert "there are no rows" in refused(tmp_path, "a.csv", "", "cls")
    assert "there are no rows" in refused(tmp_path, "a.csv", "text,label\n", "cls")
    message = refused(tmp_path, "a.csv", "text,label\n,x\n,y\n", "cls", on_error="skip")
    assert "no row can be used (2: empty text)" in message


def test_a_byte_that_is_no_text_is_skipped_by_its_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\na,x\nb\xff,x\nc,y\n")
    found = read_rows(Labelled(files=[str(path)], on_error="skip"), "cls", base=tmp_path)
    assert [row["text"] for row in found.rows] == ["a", "c"]
    assert found.skipped.examples[0].where.endswith("a.csv:3")


def test_numbers(tmp_path):
    content = "sentence1,sentence2,score\na,b,0.5\nc,d,4\n"
    found = read(tmp_path, "a.csv", content, "regression")
    assert [row["label"] for row in found.rows] == [0.5, 4.0]
    assert found.said.endswith("numbers from 0.5 to 4")
    assert found.labels == ("score",)
    assert rows(tmp_path, "b.csv", "so good,4.5\nbad,1\n", "regression")[0] == {
        "text": "so good",
        "label": 4.5,
    }


@pytest.mark.parametrize("value", ["inf", "high", "", "nan"])
def test_no_number(tmp_path, value):
    message = refused(tmp_path, "a.csv", f"text,score\na,1\nb,{value}\n", "regression")
    assert f"a.csv:3: column 'score' holds {value}, which is no finite number" in message
