import gzip
import io
import json
import os
import pickle
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data import cuts, files, python_library, tables
from llmkit.data.parts import cut_row, parts_of, read_part
from llmkit.data.places import MOST_EXAMPLES, Tally
from llmkit.data.sources import read_documents
from llmkit.errors import DataError
from llmkit.recipe.schema import Source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def in_parts(here, part_bytes, tally=None, **settings):
    """Every document with its place, read part by part; the tallies of the parts added up."""
    source = Source(**settings)
    found = []
    for part in parts_of(source, here, cache=here / "cache", part_bytes=part_bytes):
        mine = Tally()
        found += [(d.where, d.text) for d in read_part(pickle.loads(pickle.dumps(part)), source, tally=mine)]
        assert mine.bytes_read == part.num_bytes
        if tally is not None:
            tally.add(Tally.from_json(json.loads(json.dumps(mine.as_json()))))
    return found


def whole(here, tally=None, **settings):
    found = read_documents(Source(**settings), base=here, cache=here / "cache", tally=tally)
    return [(document.where, document.text) for document in found]


def num_parts(here, part_bytes, **settings):
    return len(parts_of(Source(**settings), here, part_bytes=part_bytes))


LINES = ["a", "", "çé", "从前有座山", "😀 x", "y" * 50, "  ", "z\rz"]


def jsonl(lines, end="\n"):
    return end.join(json.dumps({"text": line}, ensure_ascii=False) if line else "" for line in lines)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5", "euc_jp", "shift_jis"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.txt"])
def test_every_cut_gives_the_same_documents_and_places(here, name, end, encoding):
    rows = [line for line in LINES if line.encode(encoding, "ignore").decode(encoding) == line] * 3
    content = {
        "a.jsonl": jsonl(rows, end),
        "a.tsv": end.join(["n\ttext", *(f"{i}\t{row}" if row else "" for i, row in enumerate(rows))]),
        "a.txt": end.join(rows),
    }[name]
    write(here / name, content.encode(encoding))
    source = {"files": name, "encoding": encoding, "documents": "line"}
    expected = whole(here, **source)
    first = 2 if name == "a.tsv" else 1
    assert expected == [
        (name if name == "a.txt" and number == 1 else f"{name}:{number}", row)
        for number, row in enumerate(rows, first)
        if row.strip()
    ]
    size = len(content.encode(encoding))
    for part_bytes in [*range(1, 40), size - 1, size, size + 1]:
        assert in_parts(here, part_bytes, **source) == expected
    assert num_parts(here, 40, **source) == -(-size // 40)
    assert num_parts(here, size, **source) == 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "bb", "中文", "", " \t", "\r", "word " * 9]), max_size=60),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(["auto", "paragraph"]),
    st.integers(1, 5),
)
def test_text_is_cut_at_fixed_places_whatever_the_parts(tmp_path_factory, lines, end, last, documents, count):
    here = tmp_path_factory.mktemp("x")
    data = (end.join(lines) + end * last).encode()
    write(here / "a.txt", data)
    write(here / "b.txt.gz", gzip.compress(data))
    write(here / "c.txt.zst", zstandard.compress(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(cuts, "SECTION", 40)
        patch.setattr(cuts, "WINDOW", 12)
        expected = in_parts(here, 10**6, files="a.txt", documents=documents)
        for part_bytes in (1, 40 * count, 40 * count + 1):
            assert in_parts(here, part_bytes, files="a.txt", documents=documents) == expected
        for name in ("b.txt.gz", "c.txt.zst"):
            packed = in_parts(here, 1, files=name, documents=documents)
            assert [(where.replace(name, "a.txt"), text) for where, text in packed] == expected
    if documents == "auto":
        kept = "".join(text for _, text in expected)
        assert kept.split() == data.decode().split()
    for where, text in expected:
        number = int(where.partition(":")[2] or 1)
        assert data.decode().replace("\r\n", "\n").split("\n")[number - 1].startswith(text.split("\n")[0])


def test_text_is_cut_after_a_blank_line_or_else_a_line_end_and_never_in_a_line():
    def cut(data, places, window):
        found = {}
        for at, piece in cuts.sections(
            [data[i : i + 3] for i in range(0, len(data), 3)], 0, places, window=window
        ):
            found[at] = found.get(at, b"") + piece
        return found

    text = b"aaa\nbbb\n\nccc\nddd\n"
    assert cut(text, [5], 0) == {0: b"aaa\nbbb\n", 8: b"\nccc\nddd\n"}
    assert cut(text, [4], 0) == {0: b"aaa\n", 4: b"bbb\n\nccc\nddd\n"}
    assert cut(text, [5], 4) == {0: b"aaa\nbbb\n\n", 9: b"ccc\nddd\n"}
    assert cut(text, [5], 3) == {0: b"aaa\nbbb\n", 8: b"\nccc\nddd\n"}
    assert cut(text, [1, 10], 20) == {0: b"aaa\nbbb\n\n", 9: b"ccc\n", 13: b"ddd\n"}
    giant = b"x" * 50 + b"\ny\n"
    assert cut(giant, [10, 20, 30], 5) == {0: b"x" * 50 + b"\n", 51: b"y\n"}
    assert cut(giant, [60], 5) == {0: giant}
    # A blank line that begins with the end of a line which an earlier cut had to wait for.
    assert cut(b"x" * 50 + b"\n\ny\n", [10, 49], 5) == {0: b"x" * 50 + b"\n", 51: b"\n", 52: b"y\n"}


def test_a_giant_line_is_read_once_and_by_its_first_part(here):
    text = "x" * 3_000_000
    write(here / "a.jsonl", jsonl(["a", text, "b"]))
    sizes = []
    source = Source(files="a.jsonl")
    for part in parts_of(source, here, part_bytes=2**20):
        sizes.append(sum(len(d.text) for d in read_part(part, source, tally=Tally())))
    assert sizes == [3_000_001, 0, 1]


@pytest.mark.parametrize("documents", ["auto", "paragraph", "line"])
def test_a_line_of_100_mb_is_read_in_bounded_memory(here, documents):
    with (here / "a.txt").open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b"\nlast\n")
    tracemalloc.start()
    total = sum(len(d.text) for d in read_documents(Source(files="a.txt", documents=documents), base=here))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 100 * 10**6 + (6 if documents == "auto" else 4)
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.csv", {}),
        ("a.txt", {"documents": "file"}),
        ("a.txt.gz", {"documents": "line"}),
        ("a.jsonl", {"encoding": "utf-16"}),
        ("a.jsonl", {"limit": 100}),
    ],
)
def test_what_cannot_be_cut_is_one_part(here, name, settings):
    data = jsonl(["text"] * 20).encode(settings.get("encoding", "utf-8"))
    write(here / name, gzip.compress(data) if name.endswith("gz") else data)
    assert num_parts(here, 16, files=name, **settings) == 1
    assert num_parts(here, 16, files="a.*", documents="line") == (
        1 if name in ("a.csv", "a.txt.gz") else 1 + len(data) // 16
    )


def test_small_files_share_a_part_in_order(here):
    for number in range(10):
        write(here / f"d/{number}.txt", f"text {number}\n")
    parts = parts_of(Source(files="d"), here, part_bytes=21)
    assert [len(part.segments) for part in parts] == [3, 3, 3, 1]
    assert [part.index for part in parts] == [0, 1, 2, 3]
    assert [part.num_bytes for part in parts] == [21, 21, 21, 7]
    assert [part.name for part in parts] == [
        "d/0.txt and 2 more",
        "d/3.txt and 2 more",
        "d/6.txt and 2 more",
        "d/9.txt",
    ]
    assert [text for _, text in in_parts(here, 21, files="d")] == [f"text {number}\n" for number in range(10)]
    assert num_parts(here, 1, files="stdlib:docs") == 1
    library = python_library.library_files()
    segments = [
        s.file for part in parts_of(Source(files="stdlib:"), here, part_bytes=2**22) for s in part.segments
    ]
    assert list(dict.fromkeys(segments)) == library


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_is_cut_by_row_groups(here, nested):
    texts = [f"text {i}" for i in range(1000)]
    column = [{"body": text, "n": 1} for text in texts] if nested else texts
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), here / "a.parquet", row_group_size=100)
    source = {"files": "a.parquet", "columns": {"text": "text.body" if nested else "text"}}
    expected = [(f"a.parquet: row {i + 1}", text) for i, text in enumerate(texts)]
    assert whole(here, **source) == expected
    sizes = tables.parquet_group_bytes(here / "a.parquet")
    assert len(sizes) == 10
    for part_bytes, count in ((1, 10), (max(sizes) * 2, 5), (10**9, 1)):
        assert num_parts(here, part_bytes, **source) == count
        assert in_parts(here, part_bytes, **source) == expected


def test_a_large_row_group_is_read_in_bounded_memory(here, monkeypatch):
    asked = []

    class Recording(io.FileIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    text = os.urandom(5_000).hex()
    table = pyarrow.table({"text": [f"{i}{text[i:]}" for i in range(8_000)]})
    pyarrow.parquet.write_table(
        table, here / "a.parquet", use_dictionary=False, compression="none", row_group_size=10**6
    )
    del table
    assert (here / "a.parquet").stat().st_size > 40 * 10**6
    monkeypatch.setattr(tables, "open_file", lambda path, start=0: Recording(path))
    before = pyarrow.total_allocated_bytes()
    peak = count = 0
    for document in read_documents(Source(files="a.parquet"), base=here):
        count += len(document.text) > 1000
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert count == 8_000
    assert 0 < peak < 24 * 2**20
    assert 0 <= min(asked) <= max(asked) < 12 * 2**20  # a page or so, never the whole row group


BROKEN = [
    ('{"text": "a"', "broken JSON"),
    ('{"text": 5}', "not text"),
    ('{"text": null}', "missing value"),
    ('{"txt": "x"}', "no column 'text'"),
    ('["a"]', "no JSON object"),
    ('{"text": "cut \\ud83d"}', "lone surrogate"),
    ("[" * 100_000, "broken JSON"),
    (b'{"text": "caf\xe9"}', "not text in this encoding"),
    (b'{"text": "a", "other": "\xff"}', "not text in this encoding"),
    (b'{"text": "a\0"}', "NUL byte"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_skipped_rows_are_counted_by_reason_with_an_example(here, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    write(here / "a.jsonl", b'{"text": "good"}\n' + line + b'\n{"text": "\xe4\xb8\xad\\u4e2d"}\n')
    for part_bytes in (10, 10**9):
        tally = Tally()
        got = in_parts(here, part_bytes, tally, files="a.jsonl", on_error="skip")
        assert got == [("a.jsonl:1", "good"), ("a.jsonl:3", "中中")]
        assert (tally.skipped_rows, tally.skipped_files, tally.documents) == ({reason: 1}, {}, 2)
        [example] = tally.shown()["examples"]
        assert (example["where"], example["reason"]) == ("a.jsonl:2", reason)
        assert len(example["value"]) <= 200
    with pytest.raises(DataError, match=r"a\.jsonl"):
        whole(here, files="a.jsonl")


def test_skipped_rows_of_tsv_csv_text_and_parquet(here):
    good = "id{0}text\n1{0}one\n"
    cases = {
        "a.tsv": (good.format("\t").encode() + b"2\n3\ta\tb\n4\t\xff\n5\ttwo\n", 3),
        "a.csv": (good.format(",").encode() + b'2\n3,"a"b\n4,\xff\n5,two\n', 3),
        "a.txt": (b"one\n\xff\nx\0y\ntwo\n", 2),
    }
    reasons = {
        "a.tsv": {"wrong number of fields": 2, "not text in this encoding": 1},
        "a.csv": {"wrong number of fields": 1, "broken CSV": 1, "not text in this encoding": 1},
        "a.txt": {"not text in this encoding": 1, "NUL byte": 1},
    }
    for name, (data, count) in cases.items():
        write(here / name, data)
        tally = Tally()
        got = in_parts(here, 7, tally, files=name, on_error="skip", documents="line")
        assert [text for _, text in got] == ["one", "two"]
        assert tally.skipped_rows == reasons[name]
        assert tally.num_skipped == count
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), here / "a.parquet")
    tally = Tally()
    assert [text for _, text in in_parts(here, 1, tally, files="a.parquet", on_error="skip")] == [
        "one",
        "two",
    ]
    assert tally.shown()["examples"][0]["where"] == "a.parquet: row 2"


def test_skipped_files_are_counted_by_reason(here, monkeypatch):
    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(50_000)))
    write(here / "d/1.jsonl", '{"text": "good"}\n')
    write(here / "d/2.jsonl.gz", packed[: len(packed) // 2])
    write(here / "d/3.jsonl.zst", b"nothing of the kind")
    write(here / "d/4.parquet", b"nothing of the kind" * 9)
    write(here / "d/5.txt", "从前有座山\n".encode("gb18030"))
    write(here / "d/6.txt", b"\x89PNG\0\0")
    write(here / "d/7.txt", b"cannot be opened")
    write(here / "d/8.csv", "id,body\n1,x\n")
    write(here / "d/9.txt", "good too")
    real = type(here).open

    def refuse(self, *arguments, **options):
        if self.name == "7.txt":
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(here), "open", refuse)
    for part_bytes in (1, 10**9):
        tally = Tally()
        got = in_parts(here, part_bytes, tally, files="d", on_error="skip")
        texts = [text for _, text in got]
        assert (texts[0], texts[-1]) == ("good", "good too")
        assert texts[1:-1] == [str(i * i) for i in range(len(texts) - 2)]  # the rows before the damage
        assert 10_000 < len(texts) < 49_000
        assert tally.skipped_files == {
            "damaged .gz data": 1,
            "damaged .zst data": 1,
            "not a readable parquet file": 1,
            "not utf-8 text": 2,
            "cannot be read (Permission denied)": 1,
            "no column 'text'": 1,
        }
        assert tally.skipped_rows == {}
        assert "d/5.txt: byte 0 (0xb4) is not utf-8 text" in tally.examples[3].what


def test_text_before_and_after_damage_is_kept_by_section(here, monkeypatch):
    monkeypatch.setattr(cuts, "SECTION", 1000)
    monkeypatch.setattr(cuts, "WINDOW", 100)
    paragraphs = [f"paragraph {i:04d}\n\n".encode() for i in range(400)]
    paragraphs[150] = b"bad \xff bytes\n\n"
    write(here / "a.txt", b"".join(paragraphs))
    write(here / "b.txt.gz", gzip.compress(b"".join(paragraphs)))
    kept = {}
    for name, part_bytes in (("a.txt", 1000), ("a.txt", 3000), ("a.txt", 10**6), ("b.txt.gz", 1)):
        tally = Tally()
        found = in_parts(here, part_bytes, tally, files=name, on_error="skip", documents="paragraph")
        kept[name, part_bytes] = [(int(where.rpartition(":")[2]), text) for where, text in found[1:]]
        assert tally.skipped_files == {"not utf-8 text": 1}
    first = kept["a.txt", 1000]
    assert all(found == first for found in kept.values())
    numbers = [int(text.split()[1]) for _, text in first]
    assert all(line == 2 * number + 1 for (line, _), number in zip(first, numbers, strict=True))
    missing = sorted(set(range(1, 400)) - set(numbers))
    # The damaged paragraph, and what stood between it and the next place to cut.
    assert missing == list(range(missing[0], missing[-1] + 1))
    assert missing[0] == 149 or missing[0] == 150
    assert len(missing) < 1200 // len(paragraphs[0]) + 2


def test_when_all_is_skipped_there_is_an_error_with_the_counts(here):
    write(here / "a.jsonl", '{"body": "x"}\n{"body": "y"}\n{"body"\n')
    tally = Tally()
    with pytest.raises(DataError) as caught:
        whole(here, tally, files="a.jsonl", on_error="skip")
    assert "2 rows: no column 'text'; 1 rows: broken JSON" in str(caught.value)
    assert "a.jsonl:1: there is no column 'text'; there are: body" in str(caught.value)
    assert "columns: {text: body}" in caught.value.hint


def test_examples_are_few_and_the_first_in_order(here):
    write(here / "a.jsonl", '{"text": 1}\n' * 500 + '{"text": "x"}\n')
    for part_bytes in (100, 10**9):
        tally = Tally()
        in_parts(here, part_bytes, tally, files="a.jsonl", on_error="skip")
        shown = tally.shown()
        assert shown["rows"] == {"not text": 500}
        assert [example["where"] for example in shown["examples"]] == [
            f"a.jsonl:{n + 1}" for n in range(MOST_EXAMPLES)
        ]


def test_an_error_in_a_later_part_names_the_right_line(here):
    write(here / "a.jsonl", '{"text": "x"}\r\n\n' * 100 + '{"text": 1}\n')
    source = Source(files="a.jsonl")
    last = parts_of(source, here, part_bytes=64)[-1]
    assert last.segments[0].start > 1000
    with pytest.raises(DataError, match=r"^a\.jsonl:201: column 'text' holds 1"):
        list(read_part(last, source, tally=Tally()))


def test_bom_crlf_and_empty_files_in_parts(here):
    write(here / "d/a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    write(here / "d/b.jsonl", b"")
    write(here / "d/c.jsonl", b"\r\n\r\n")
    write(here / "d/d.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    for part_bytes in (3, 10**9):
        tally = Tally()
        got = in_parts(here, part_bytes, tally, files="d")
        assert got == [("d/a.jsonl:1", "one"), ("d/a.jsonl:2", "two"), ("d/d.txt", "one\ntwo\n")]
        assert (tally.empty_files, tally.documents) == (1, 3)


def test_standard_input_that_ends_at_once(here, monkeypatch):
    files.spool_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(DataError, match="ended before a single byte came"):
        whole(here, files="-")


def test_waiting_for_standard_input_is_said(here, monkeypatch, caplog):
    files.spool_stdin.cache_clear()
    reading, writing = os.pipe()
    monkeypatch.setattr(files, "_SILENCE_S", 0.01)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    monkeypatch.setattr(files.shutil, "copyfileobj", lambda source, target, size: target.write(b"text"))
    files.spool_stdin(here / "cache")
    os.close(writing)
    assert "waiting for text on standard input" in caplog.text
    files.spool_stdin.cache_clear()


def test_long_rows_come_whole_when_asked_for_and_cut_alike_otherwise(here):
    row = "\n".join(f"line {number}" for number in range(120_000))
    assert len(row) > 2**20
    write(here / "a.jsonl", json.dumps({"text": row}) + "\n" + json.dumps({"text": "short"}) + "\n")
    source = Source(files="a.jsonl")
    [part] = parts_of(source, here, part_bytes=2**30)
    whole_ones = [*read_part(part, source, tally=Tally(), whole_rows=True)]
    assert [(d.text, d.where, d.is_row) for d in whole_ones] == [
        (row, "a.jsonl:1", True),
        ("short", "a.jsonl:2", True),
    ]
    pieces = [*read_part(part, source, tally=Tally())]
    assert [d.text for d in pieces] == [*cut_row(row), "short"]
    assert "".join(cut_row(row)) == row
    assert {d.where for d in pieces[:-1]} == {"a.jsonl:1"}
    write(here / "b.txt", row)
    text = Source(files="b.txt", documents="file")
    [part] = parts_of(text, here, part_bytes=2**30)
    assert [d.is_row for d in read_part(part, text, tally=Tally(), whole_rows=True)] == [False]
