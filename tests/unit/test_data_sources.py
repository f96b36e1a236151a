import gzip
import io
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmkit.data import files, hub, python_library
from llmkit.data.parts import parts_of, read_part
from llmkit.data.sources import Tally, fingerprint, num_bytes, read_documents, resolve_files, source_name
from llmkit.errors import DataError, MissingError, RecipeError
from llmkit.recipe.schema import Source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(here, tally=None, **settings):
    found = read_documents(Source(**settings), base=here, cache=here / "cache", tally=tally)
    return [(document.where, document.text) for document in found]


def error_of(here, kind=DataError, **settings):
    with pytest.raises(kind) as caught:
        read(here, **settings)
    return str(caught.value)


TEXTS = ['one, "two"\nthree', "从前有座山", "😀\ttab"]


def csv_of(texts, separator=","):
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return "\r\n".join([f"n{separator}body"] + [f"{i}{separator}{q}" for i, q in enumerate(quoted)]) + "\r\n"


def parquet_of(texts, kind=None):
    file = io.BytesIO()
    table = pyarrow.table({"n": range(len(texts)), "body": pyarrow.array(texts, type=kind)})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


TABLES = {
    "a.jsonl": "\n\n".join(json.dumps({"n": 1, "body": text}) for text in TEXTS).encode(),
    "a.csv": csv_of(TEXTS).encode(),
    "a.parquet": parquet_of(TEXTS),
}


@pytest.mark.parametrize("compress", [None, ".gz", ".zst"])
@pytest.mark.parametrize("name", TABLES)
def test_tables(here, name, compress):
    data = TABLES[name]
    packed = {None: data, ".gz": gzip.compress(data), ".zst": zstandard.compress(data)}[compress]
    write(here / (name + (compress or "")), packed)
    got = read(here, files="a.*", columns={"text": "body"})
    assert [text for _, text in got] == TEXTS
    assert got[1][0].startswith("a.")
    if name == "a.jsonl":
        assert [where for where, _ in got] == [f"{name}{compress or ''}:{n}" for n in (1, 3, 5)]
    if name == "a.csv":
        assert [where for where, _ in got] == [f"{name}{compress or ''}:{n}" for n in (2, 4, 5)]


def test_tsv_takes_quotes_as_they_are(here):
    write(here / "a.tsv", 'n\ttext\n1\t"quoted\n2\tsay "hi"\n')
    assert read(here, files="a.tsv") == [("a.tsv:2", '"quoted'), ("a.tsv:3", 'say "hi"')]


def test_nested_and_dotted_columns(here):
    write(here / "a.jsonl", '{"meta": {"body": "x"}}\n{"meta.body": "y", "meta": 1}\n')
    assert [text for _, text in read(here, files="a.jsonl", columns={"text": "meta.body"})] == ["x", "y"]
    table = pyarrow.table({"meta": [{"body": "p"}, {"body": "q"}]})
    pyarrow.parquet.write_table(table, here / "a.parquet")
    assert [text for _, text in read(here, files="a.parquet", columns={"text": "meta.body"})] == ["p", "q"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_several_compressed_streams_in_one_file(here, compress):
    ending = "gz" if compress is gzip.compress else "zst"
    write(here / f"a.txt.{ending}", compress(b"one\n") + compress(b"two\n"))
    assert [text for _, text in read(here, files=f"a.txt.{ending}")] == ["one\ntwo\n"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_damaged_compressed_files(here, compress):
    ending = "gz" if compress is gzip.compress else "zst"
    whole = compress(b"".join(b"%d\n" % (i * i) for i in range(50_000)))
    write(here / f"a.txt.{ending}", whole[: len(whole) // 2])
    assert f"a.txt.{ending}: damaged .{ending} data" in error_of(here, files=f"a.txt.{ending}")
    write(here / f"a.txt.{ending}", b"this is plain text")
    assert f"a.txt.{ending}: damaged .{ending} data" in error_of(here, files=f"a.txt.{ending}")


def test_zstandard_missing_says_how_to_get_it(here, monkeypatch):
    write(here / "a.txt.zst", zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install 'llmkit[zstd]'" in error_of(here, MissingError, files="a.txt.zst")


def test_folders_globs_and_order(here):
    for name in ("d/b.txt", "d/a.md", "d/sub/c.py", "d/.hidden", "d/.git/x.txt", "e.txt"):
        write(here / name, name)
    relative = [str(path.relative_to(here)) for path in resolve_files(Source(files=["e.txt", "d"]), here)]
    assert relative == ["e.txt", "d/a.md", "d/b.txt", "d/sub/c.py"]
    globbed = resolve_files(Source(files=["d/**/*.txt", "d/*"]), here)
    assert [str(path.relative_to(here)) for path in globbed] == ["d/b.txt", "d/a.md", "d/sub/c.py"]


def test_relative_paths_fall_back_to_the_recipes_folder(here):
    write(here / "recipes/a.txt", "of the recipe")
    source = Source(files="a.txt")
    assert resolve_files(source, here / "recipes") == [here / "recipes/a.txt"]
    write(here / "a.txt", "here")
    assert resolve_files(source, here / "recipes") == [here / "a.txt"]


def test_names(here):
    write(here / "books.en.jsonl.gz", b"")
    assert source_name(Source(files="*.gz"), here) == "books.en"
    assert source_name(Source(files="*.gz", name="mine"), here) == "mine"
    assert source_name(Source(files="stdlib:docs"), here) == "stdlib-docs"
    assert source_name(Source(dataset="a/b:c"), here) == "a/b:c"


def test_nothing_matches(here):
    write(here / "data/books.txt", "x")
    write(here / "data/web.jsonl", "x")
    assert "no file matches data/*.csv\n  there are: data/books.txt, data/web.jsonl" in error_of(
        here, files="data/*.csv"
    )
    assert "no such file or folder: data/boks.txt\n  nearest: data/books.txt" in error_of(
        here, files="data/boks.txt"
    )
    assert "nearest: data" in error_of(here, files="dat/books.txt")
    (here / "empty").mkdir()
    assert "empty: the folder holds no files" in error_of(here, files="empty")


def test_empty_files_are_skipped_and_counted_and_all_empty_is_an_error(here):
    write(here / "d/a.txt", b"")
    write(here / "d/b.txt", b" \n")
    assert "'d' holds no text: 1 empty files, 1 blank documents" in error_of(here, files="d")
    write(here / "d/c.txt", b"text")
    tally = Tally()
    assert read(here, tally, files="d") == [("d/c.txt", "text")]
    assert (tally.empty_files, tally.empty_documents, tally.bytes_read) == (1, 1, 6)


def test_unreadable_file(here, monkeypatch):
    path = write(here / "a.txt", "secret\n" * 9)
    real = type(path).open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(path), "open", refuse)
    assert "a.txt: cannot be read (Permission denied)\n  chmod u+r a.txt" in error_of(here, files="a.txt")
    write(here / "b.txt", "other text")
    source = Source(files="*.txt", documents="line", on_error="skip")
    unread, tally = fingerprint(source, here), Tally()
    for part in parts_of(source, here, part_bytes=1):  # more than one part, were it readable
        assert {d.text for d in read_part(part, source, tally=tally)} <= {"other text"}
    assert tally.documents == 1
    assert tally.skipped_files == {"cannot be read (Permission denied)": 1}
    with pytest.raises(DataError, match="Permission denied"):
        fingerprint(Source(files="*.txt"), here)
    monkeypatch.undo()
    assert fingerprint(source, here) not in (
        unread,
        fingerprint(Source(files="b.txt", documents="line"), here),
    )


def test_sizes_of_files_that_cannot_be_looked_at(here):
    write(here / "d/a.txt", "text")
    (here / "d/b.txt").symlink_to(here / "nowhere")
    assert num_bytes(Source(files="d", on_error="skip"), here) == 4
    with pytest.raises(DataError, match=r"d/b\.txt: cannot be read"):
        num_bytes(Source(files="d"), here)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "a.jsonl:2:13: broken JSON"),
        ('["a"]', 'a.jsonl:2: ["a"] is no JSON object'),
        ('{"txt": "a", "m": {"k": 1}}', "a.jsonl:2: there is no column 'text'; there are: txt, m, m.k"),
        ('{"text": 5}', "a.jsonl:2: column 'text' holds 5, which is of type int, not text"),
        ('{"text": null}', "a.jsonl:2: column 'text' holds null, which is nothing, not text"),
        ('{"text": "cut \\ud83d"}', "a.jsonl:2: column 'text' holds '\\ud83d' at character 4, half"),
        ("[" * 100_000, "a.jsonl:2: JSON that cannot be read"),
        ("1" * 5000, "a.jsonl:2: JSON that cannot be read"),
    ],
)
def test_broken_jsonl(here, line, message):
    write(here / "a.jsonl", '{"text": "good"}\n' + line + "\n")
    assert message in error_of(here, files="a.jsonl")


def test_nearest_column_is_proposed(here):
    write(here / "a.csv", "id,contents\n1,x\n")
    message = error_of(here, files="a.csv", columns={"text": "content"})
    assert "a.csv:1: there is no column 'content'; there are: id, contents" in message
    assert "`columns: {text: contents}`" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n2,b,c\n", "a.csv:3: 3 fields where line 1 names 2 columns (id, text)"),
        ('id,text\n1,"a\n2,b\n', "a.csv:2: broken CSV"),
        ('id,text\n1,"a"b\n', "a.csv:2: broken CSV"),
    ],
)
def test_broken_csv(here, content, message):
    write(here / "a.csv", content)
    assert message in error_of(here, files="a.csv")


def test_broken_parquet(here):
    write(here / "a.parquet", b"nothing of the kind")
    assert "a.parquet: not a readable parquet file" in error_of(here, files="a.parquet")
    write(here / "a.parquet", parquet_of([1, 2]))
    assert "column 'body' is of type int64, not text" in error_of(
        here, files="a.parquet", columns={"text": "body"}
    )
    assert "no column 'bod'; there are: n, body" in error_of(here, files="a.parquet", columns={"text": "bod"})
    write(here / "a.parquet", parquet_of(["x", None], pyarrow.large_string()))
    assert "a.parquet: row 2: column 'body' holds null" in error_of(
        here, files="a.parquet", columns={"text": "body"}
    )


def test_binary_and_wrongly_encoded_files_name_the_file(here):
    write(here / "a.txt", b"ab\0")
    assert "a.txt: byte 2 is NUL" in error_of(here, files="a.txt")
    write(here / "a.txt", "从前有座山\n".encode("gb18030"))
    assert "a.txt: byte 0 (0xb4) is not utf-8 text" in error_of(here, files="a.txt")
    assert "encoding: gb18030" in error_of(here, files="a.txt")
    assert read(here, files="a.txt", encoding="gb18030") == [("a.txt", "从前有座山\n")]


def test_long_rows_are_cut(here):
    write(here / "a.jsonl", json.dumps({"text": "x" * 1_000_000}) + "\n" + json.dumps({"text": "y" * 2**21}))
    got = [text for _, text in read(here, files="a.jsonl")]
    assert [len(text) for text in got] == [1_000_000] + [65_536] * 32


def test_stdin_is_spooled_once(here, monkeypatch):
    files.spool_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped\ntext")))
    source = Source(files="-", documents="line")
    for _ in range(2):
        assert [text for _, text in read(here, files="-", documents="line")] == ["piped", "text"]
    assert source_name(source, here) == "stdin"
    path = resolve_files(source, here, cache=here / "cache")[0]
    assert path.read_bytes() == b"piped\ntext"
    assert path.is_relative_to(here / "cache" / "stdin")
    write(here / "same.txt", "piped\ntext")
    same = Source(files="same.txt", documents="line")
    assert fingerprint(source, here, cache=here / "cache") == fingerprint(same, here)
    files.spool_stdin.cache_clear()


def test_stdin_that_is_a_terminal(here, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "nothing is piped" in error_of(here, files="-")


def test_fingerprint_follows_content_and_settings_and_nothing_else(here):
    path = write(here / "a.txt", "some text")
    first = fingerprint(Source(files="a.txt"), here)
    path.rename(here / "b.txt")
    assert fingerprint(Source(files="b.txt", name="other", weight=2), here) == first
    assert fingerprint(Source(files="b.txt", documents="line"), here) != first
    assert fingerprint(Source(files="b.txt", format="csv"), here) != first
    before = (here / "b.txt").stat()
    write(here / "b.txt", "some texT")
    os.utime(here / "b.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(Source(files="b.txt"), here) != first


def test_sizes(here):
    write(here / "a.txt", "12345")
    assert num_bytes(Source(files="a.txt"), here) == 5
    assert num_bytes(Source(dataset="a/b"), here) == 0


def test_a_limit_reads_whole_documents_and_gives_another_fingerprint(here):
    for name in "abc":
        write(here / "d" / f"{name}.txt", name * 10)
    assert [text for _, text in read(here, files=["d"], limit=25)] == ["a" * 10, "b" * 10]
    assert [text for _, text in read(here, files=["d"], limit=3)] == ["a" * 10]
    assert num_bytes(Source(files=["d"], limit=25), here) == 25
    assert num_bytes(Source(files=["d"], limit=99), here) == 30
    assert fingerprint(Source(files=["d"]), here) != fingerprint(Source(files=["d"], limit=25), here)


def test_files_or_dataset_exactly_one(here):
    for settings in ({}, {"files": "a", "dataset": "b"}, {"files": []}):
        assert "either `files` or `dataset`" in error_of(here, RecipeError, **settings)
    assert "stands alone" in error_of(here, RecipeError, files=["stdlib:docs", "a.txt"])


def test_standard_library_sources(here):
    paths = python_library.library_files()
    names = {path.name for path in paths}
    assert {"argparse.py", "textwrap.py"} <= names
    for path in paths:
        assert not {"site-packages", "test", "idlelib", "lib2to3"} & set(path.parts[:-1])
    text = " ".join(document.text for document in read_documents(Source(files="stdlib:"), base=here))
    assert "class TextWrapper" in text
    assert len(text) > 5_000_000


def test_docstrings_in_order_as_prose(here):
    path = write(
        here / "m.py",
        '''"""Module.

    Indented.
"""
class A:
    """Class A."""
    def f(self):
        "Method f."
        async def g():
            """Inner g."""
x = """no docstring"""
if True:
    def h():
        """Function h."""
''',
    )
    tally = Tally()
    [(where, text)] = python_library.docstring_documents([path], tally)
    assert where == "m.py"
    assert text == "Module.\n\nIndented.\n\nClass A.\n\nMethod f.\n\nInner g.\n\nFunction h."
    assert tally.bytes_read == path.stat().st_size


def test_data_set_in_a_folder(here):
    write(here / "set/train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert read(here, dataset="set") == [("set:train:0", "a"), ("set:train:1", "b")]
    assert "data set 'set', split 'tset'" in error_of(here, dataset="set", split="tset")
    assert "there is no column 'body'; there are: text" in error_of(
        here, dataset="set", columns={"text": "body"}
    )
    first = fingerprint(Source(dataset="set"), here)
    write(here / "set/train.jsonl", '{"text": "a"}\n{"text": "B"}\n')
    assert fingerprint(Source(dataset="set"), here) != first


def test_a_data_set_of_several_files_is_read_in_its_own_shards(here):
    for number in range(3):
        rows = "".join(json.dumps({"text": f"{number}-{row}"}) + "\n" for row in range(4))
        write(here / f"set/train-{number}.jsonl", rows + '{"text": null}\n')
    source = Source(dataset="set", on_error="skip")
    parts = parts_of(source, here, part_bytes=10**9)
    assert [part.name for part in parts] == ["set 1 of 3", "set 2 of 3", "set 3 of 3"]
    for number, part in enumerate(parts):
        tally = Tally()
        found = [(d.where, d.text) for d in read_part(part, source, tally=tally)]
        assert found == [(f"set:train[{number + 1} of 3]:{row}", f"{number}-{row}") for row in range(4)]
        assert tally.skipped_rows == {"missing value": 1}
        assert tally.examples[0].where == f"set:train[{number + 1} of 3]:4"
    assert [text for _, text in read(here, dataset="set", on_error="skip")] == [
        f"{number}-{row}" for number in range(3) for row in range(4)
    ]
    limited = Source(dataset="set", limit=15)
    assert len(parts_of(limited, here, part_bytes=10)) == 1
    assert [text for _, text in read(here, dataset="set", on_error="skip", limit=15)] == [
        "0-0",
        "0-1",
        "0-2",
        "0-3",
        "1-0",
    ]


def test_broken_data_set_in_a_folder(here):
    write(here / "set/train.jsonl", '{"text": "a"}\n{"text": \n')
    assert "data set 'set' cannot be read" in error_of(here, dataset="set")
    write(here / "set/train.jsonl", '{"text": "a"}\n{"text": null}\n')
    assert "set:train:1: column 'text' holds null" in error_of(here, dataset="set")


def test_data_set_out_of_reach(here):
    message = error_of(here, MissingError, dataset="nobody/nothing:en")
    assert "'nobody/nothing" in message
    assert "hf download --repo-type dataset nobody/nothing" in message
    with pytest.raises(MissingError, match="nobody/nothing"):
        hub.dataset_fingerprint("nobody/nothing", "train", here)


STRANGE_LINES = [
    '{"text": "plain"}',
    '  {"text": "blanks around"}  ',
    '{"text": "first", "text": "last"}',
    '{"text": "not a number beside", "x": NaN, "y": -Infinity}',
    '{"text": "large", "x": 123456789012345678901234567890, "y": 1e999}',
    '{"text": "tab\\t \\u00e9 \\ud83d\\ude00 \\u0000 \\u2028 \u2028"}',
    '{"text": "deep", "x": ' + "[" * 1200 + "]" * 1200 + "}",
    '{"text": "half \\ud83d"}',
    '{"text": "two"} {"text": "values"}',
    '{"text": "control \x01"}',
    '{"text": 5}',
    '["text"]',
    '{"text": "open',
    "nothing",
]


def test_either_json_reader_gives_the_same_rows_and_the_same_faults(tmp_path, monkeypatch):
    pytest.importorskip("orjson")
    path = tmp_path / "strange.jsonl"
    path.write_text("".join(f"{line}\n" for line in STRANGE_LINES))
    source = Source(files=[str(path)], on_error="skip")

    def read():
        tally = Tally()
        texts = [document.text for document in read_documents(source, base=tmp_path, tally=tally)]
        return texts, tally.shown()

    fast = read()
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert read() == fast
    assert len(fast[0]) == 6  # the deep one goes deeper than Python reads
    assert sum(fast[1]["rows"].values()) == 8
