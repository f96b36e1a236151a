"""Evaluation data is found in documents, whatever file it is in; against a slow reference."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.duplicates.contamination import Decontaminator
from llmkit.data.duplicates.evaluation import evaluation_texts, texts_in
from llmkit.data.words import word_tokens
from llmkit.errors import DataError
from llmkit.recipe.preparation import Decontaminate

LONG = "The quick brown fox jumps over the lazy dog and then runs away from it at once."
SHORT = "What is the capital of the largest French region?"
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


def made(folder: Path, *names: str, ngram: int = 13) -> Decontaminator:
    return Decontaminator(Decontaminate(files=list(names), ngram=ngram), folder)


def write(folder: Path, name: str, *texts: str) -> str:
    rows = "".join(json.dumps({"q": text}) + "\n" for text in texts)
    (folder / name).write_text(rows, "utf-8")
    return name


def test_a_run_of_words_is_found_whatever_stands_around(tmp_path: Path) -> None:
    check = made(tmp_path, write(tmp_path, "a.jsonl", LONG), write(tmp_path, "b.jsonl", CHINESE))
    words = LONG.split()
    assert check("Before. " + LONG.upper() + " After.") == "a.jsonl"
    assert check("x " + " -- ".join(words[2:15]) + " y") == "a.jsonl"
    assert check("x " + " ".join(words[2:14]) + " y") is None
    assert check(" ".join([*words[:12], "not", *words[12:]])) is None
    assert check("诗：" + CHINESE[3:19]) == "b.jsonl"  # 13 characters and 3 marks
    assert check("诗：" + CHINESE[3:18]) is None
    assert check("") is None


def test_a_short_text_counts_as_a_whole(tmp_path: Path) -> None:
    check = made(tmp_path, write(tmp_path, "a.jsonl", SHORT, "Yes, of course it is.", "!"))
    assert check("Quiz: what is the capital of the largest french region? Paris") == "a.jsonl"
    assert check("what is the capital of the largest french town") is None
    assert check("yes of course it is") is None
    assert check.figures == {"a.jsonl": {"texts": 2, "runs": 1, "too_short": 1}}


def test_runs_do_not_cross_from_one_text_into_the_next(tmp_path: Path) -> None:
    first, second = LONG.split()[:9], [f"word{i}" for i in range(9)]
    check = made(tmp_path, write(tmp_path, "a.jsonl", " ".join(first), " ".join(second)), ngram=10)
    assert check(" ".join([*first[1:], *second[:-1]])) is None
    assert check(" ".join([*first[1:], *second])) == "a.jsonl"


def test_a_run_across_blocks_is_found(tmp_path: Path) -> None:
    check = made(tmp_path, write(tmp_path, "a.jsonl", LONG))
    for before in range(65_460, 65_540, 7):
        assert check("x" * 40 + " y" * ((before - 40) // 2) + " " + LONG) == "a.jsonl"


VOCABULARY = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(VOCABULARY, min_size=1, max_size=4), st.lists(VOCABULARY, max_size=6), st.integers(2, 11))
def test_as_a_slow_reference(evaluation: list[str], documents: list[str], ngram: int) -> None:
    least = min(8, ngram)
    wanted = set()
    for text in evaluation:
        words = word_tokens(text)
        size = min(ngram, len(words))
        if size >= least:
            wanted |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkit.data.duplicates.contamination.evaluation_texts", lambda _: iter(evaluation))
        if not wanted:
            with pytest.raises(DataError):
                made(Path(__file__).parent, Path(__file__).name, ngram=ngram)
            return
        check = made(Path(__file__).parent, Path(__file__).name, ngram=ngram)
    for text in [*documents, *evaluation]:
        words = word_tokens(text)
        found = any(
            tuple(words[i : i + size]) in wanted
            for size in range(1, ngram + 1)
            for i in range(len(words) - size + 1)
        )
        assert (check(text) is not None) == found


def test_every_text_of_every_form_is_read(tmp_path: Path) -> None:
    rows = [{"q": "one", "choices": ["two", {"text": "three"}], "n": 4, "x": None}, {"q": 'f"our\nfive'}]
    expected = ["one", "two", "three", 'f"our\nfive']
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, "utf-8")
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}), "utf-8")
    (tmp_path / "lines.json").write_text(lines, "utf-8")
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.json", "lines.json", "a.ndjson.gz"):
        assert list(evaluation_texts(tmp_path / name)) == expected
    (tmp_path / "a.csv").write_bytes(b'q,a\r\n"one\ntwo","th""ree"\r\n')
    assert list(evaluation_texts(tmp_path / "a.csv")) == ["q", "a", "one\ntwo", 'th"ree']
    (tmp_path / "a.tsv").write_text('q\ta\n"one\ttwo\n')
    assert list(evaluation_texts(tmp_path / "a.tsv")) == ["q", "a", '"one', "two"]
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert list(evaluation_texts(tmp_path / "a.txt")) == ["one\ntwo", "three"]
    assert list(texts_in({"a": [1, "x", {"b": "y", "c": ("z", None)}]})) == ["x", "y", "z"]


def test_parquet_and_zst(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"q": ["one", None], "c": [["two", "three"], []], "b": [b"no", b"no"], "n": [1, 2]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert list(evaluation_texts(tmp_path / "a.parquet")) == ["one", "two", "three"]
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one"))
    assert list(evaluation_texts(tmp_path / "a.txt.zst")) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": \n', "a.jsonl:2:7: broken JSON"),
        ("a.json", b'{\n"q": }', "a.json:2:6: broken JSON"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.csv", b'a,b\n"x,y\n', "a.csv:2: broken CSV"),
        ("a.txt", b"\xff\xfe\xff", "not utf-8 text"),
        ("a.txt", b"", "no text in it"),
        ("a.jsonl", b'{"n": 5}\n', "no text in it"),
        ("a.jsonl", b'{"answer": "yes"}\n', "no text of 8 words or more"),
        ("a.parquet", b"nonsense", "not a readable parquet file"),
        ("a.txt.gz", b"nonsense", "damaged .gz data"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        made(tmp_path, name)
    with pytest.raises(DataError, match="no such file"):
        made(tmp_path, "missing.jsonl")


def test_identity_changes_with_what_decides(tmp_path: Path) -> None:
    name = write(tmp_path, "a.jsonl", LONG)
    first = made(tmp_path, name)
    again = pickle.loads(pickle.dumps(first))
    assert again(LONG) == name
    assert again.identity == first.identity == made(tmp_path, name).identity
    assert made(tmp_path, name, ngram=12).identity != first.identity
    write(tmp_path, "a.jsonl", LONG + "!")
    assert made(tmp_path, name).identity != first.identity


def test_files_of_one_name_are_told_apart_and_the_first_is_named(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "test.jsonl", LONG, *([CHINESE] if folder == "y" else []))
    check = made(tmp_path, "y/test.jsonl", "x")
    assert check(LONG) == "y/test.jsonl"
    assert check(CHINESE) == "y/test.jsonl"
    assert list(check.figures) == ["y/test.jsonl", "x/test.jsonl"]
