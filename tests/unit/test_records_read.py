"""Files of every form as records with exact places, and a fingerprint of their content."""

import gzip
import json
from pathlib import Path

import pytest
from records import read, refused, rows, write

from llmkit.data.records import fingerprint, read_rows
from llmkit.errors import DataError, RecipeError
from llmkit.recipe.labelled import Labelled

ROWS = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]


def places(found):
    return [row["place"].rsplit("/", 1)[-1] for row in found.rows]


@pytest.mark.parametrize(
    ("content", "first"),
    [
        (ROWS, "[0]"),
        ({"version": 1, "rows": ROWS}, "rows[0]"),
    ],
)
def test_json_lists(tmp_path, content, first):
    found = read(tmp_path, "a.json", json.dumps(content), "cls")
    assert [(row["text"], row["label"]) for row in found.rows] == [("good", "pos"), ("bad", "neg")]
    assert places(found)[0] == f"a.json: {first}"


def test_json_that_is_an_object_a_line(tmp_path):
    content = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert places(read(tmp_path, "a.json", content, "cls")) == ["a.json:1", "a.json:2"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}', "no list of objects (a)"),
        ('{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of objects (a, b)"),
        ("[\n{]", "a.json:2:2: broken JSON"),
        ('[{"text": "a", "label": "x"}, 3]', "a.json: [1]: 3 is no JSON object"),
    ],
)
def test_json_without_rows(tmp_path, content, said):
    assert said in refused(tmp_path, "a.json", content, "cls")


def test_a_broken_line_is_named_or_skipped(tmp_path):
    content = json.dumps(ROWS[0]) + "\n{broken\n\n" + json.dumps(ROWS[1])
    assert "a.jsonl:2:2: broken JSON" in refused(tmp_path, "a.jsonl", content, "cls")
    found = read(tmp_path, "a.jsonl", content, "cls", on_error="skip")
    assert places(found) == ["a.jsonl:1", "a.jsonl:4"]
    assert found.skipped.skipped_rows == {"broken JSON": 1}


def test_half_a_character_is_no_text(tmp_path):
    content = '{"text": "a\\ud83d", "label": "x"}\n'
    assert "half of a surrogate pair" in refused(tmp_path, "a.jsonl", content, "cls")


def test_csv_places_are_the_lines_at_which_rows_begin(tmp_path):
    content = 'text,label\n"two\nlines",x\n"say ""hi""",y\n'
    found = read(tmp_path, "a.csv", content, "cls")
    assert places(found) == ["a.csv:2", "a.csv:4"]
    assert [row["text"] for row in found.rows] == ["two\nlines", 'say "hi"']


def test_a_name_twice(tmp_path):
    assert "a.csv:1: two columns are called 'text'" in refused(
        tmp_path, "a.csv", "text,text,label\na,b,c\n", "cls"
    )


def test_several_files_and_compression(tmp_path):
    write(tmp_path, "a.jsonl", ROWS[:1])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    found = read_rows(Labelled(files=[str(tmp_path / "*.jsonl*")]), "cls", base=tmp_path)
    assert places(found) == ["a.jsonl:1", "b.jsonl.gz:1"]


def test_another_encoding(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\n好,正\n坏,负\n".encode("gb18030"))
    found = read_rows(Labelled(files=[str(path)], encoding="gb18030"), "cls", base=tmp_path)
    assert [row["text"] for row in found.rows] == ["好", "坏"]
    with pytest.raises(DataError, match="gb18030"):
        read_rows(Labelled(files=[str(path)]), "cls", base=tmp_path)


def test_a_limit_of_rows(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(3000))
    assert len(read(tmp_path, "a.csv", content, "cls", limit=1500).rows) == 1500


def test_parquet_with_names_of_classes(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "text": datasets.Value("string"),
        }
    )
    made = {"tokens": [["a", "b"]] * 2, "ner_tags": [[0, 1]] * 2, "label": [1, 0], "text": ["good", "bad"]}
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(made, features=features).to_parquet(str(folder / "train.parquet"))
    path = str(folder / "train.parquet")
    found = read_rows(Labelled(files=[path]), "cls", base=tmp_path)
    assert [row["label"] for row in found.rows] == ["pos", "neg"]
    assert places(found) == ["train.parquet: row 1", "train.parquet: row 2"]
    assert read_rows(Labelled(files=[path]), "tag", base=tmp_path).rows[0]["tags"] == ["O", "B-x"]
    hidden = str(folder / "test.parquet")
    datasets.Dataset.from_dict({**made, "label": [1, -1]}, features=features).to_parquet(hidden)
    with pytest.raises(DataError, match=r"row 2: column 'label' holds null, which is no label"):
        read_rows(Labelled(files=[hidden]), "cls", base=tmp_path)


def test_a_data_set_in_a_folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "train.jsonl", ROWS)
    data = Labelled(dataset=str(folder))
    found = read_rows(data, "cls", base=tmp_path)
    assert [row["label"] for row in found.rows] == ["pos", "neg"]
    assert found.rows[1]["place"] == f"{folder}:train:1"
    before = fingerprint(data, tmp_path)
    write(folder, "train.jsonl", ROWS[:1])
    assert fingerprint(data, tmp_path) != before


def test_files_and_a_data_set(tmp_path):
    with pytest.raises(RecipeError):
        read_rows(Labelled(dataset="a/b", files=["c"]), "cls", base=tmp_path)


def test_text_with_tabs_is_a_table(tmp_path):
    assert rows(tmp_path, "a.txt", "Hi.\t嗨。\tx\nRun.\t跑。\ty\n", "seq2seq")[1] == {
        "source": "Run.",
        "target": "跑。",
    }


def test_objects_a_line_whatever_the_name(tmp_path):
    assert len(rows(tmp_path, "stdin", ROWS, "cls")) == 2
    content = [{"tokens": ["a"], "tags": ["O"]}]
    assert rows(tmp_path, "a.txt", content, "tag") == content


def test_the_fingerprint_is_of_bytes_and_settings(tmp_path):
    path = write(tmp_path, "a.jsonl", ROWS)
    first = fingerprint(Labelled(files=[str(path)]), tmp_path)
    other = write(tmp_path, "other.jsonl", ROWS)
    assert fingerprint(Labelled(files=[str(other)], name="n", on_error="skip"), tmp_path) == first
    assert fingerprint(Labelled(files=[str(path)], columns={"text": "label"}), tmp_path) != first
    write(tmp_path, "a.jsonl", ROWS[:1])
    assert fingerprint(Labelled(files=[str(path)]), tmp_path) != first


def test_notes(tmp_path):
    told = []
    path = write(tmp_path, "a.csv", "text,label\na,x\nb,y\n,z\n")
    read_rows(Labelled(files=[str(path)], on_error="skip"), "cls", base=tmp_path, note=told.append)
    assert told[0] == "read as columns: text from `text`, label from `label`, 2 classes; 2 rows"
    assert told[1] == f"skipped 1: empty text, such as {path}:4"


def test_places_are_relative_where_they_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.jsonl", ROWS)
    assert read_rows(Labelled(files=["a.jsonl"]), "cls", base=Path()).rows[0]["place"] == "a.jsonl:1"
