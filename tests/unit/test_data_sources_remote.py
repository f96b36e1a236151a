import gzip
import io
import json
import os
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from llmkit.data import remote
from llmkit.data.parts import parts_of, read_part
from llmkit.data.places import Tally
from llmkit.data.sources import fingerprint, num_bytes, read_documents, source_name
from llmkit.errors import DataError, MissingError, RecipeError
from llmkit.recipe.schema import Source

JSONL = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(500)).encode()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def texts(here, part_bytes=10**6, tally=None, **settings):
    source = Source(**settings)
    parts = parts_of(source, here, part_bytes=part_bytes)
    found = [d for part in parts for d in read_part(part, source, tally=tally or Tally())]
    return [(d.where, d.text) for d in found]


def parquet(values):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), file, row_group_size=10)
    return file.getvalue()


class Web(ThreadingHTTPServer):
    """Files over HTTP on a free port of this machine, with the faults that a test asks for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Page)
        self.files, self.asked, self.faults = {}, [], []
        self.ranges, self.etags, self.dates = True, True, True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, name, user=""):
        return f"http://{user}127.0.0.1:{self.server_address[1]}/{name}"


class Page(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        web = self.server
        web.asked.append((self.command, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = web.faults.pop(0) if web.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        data, changed = web.files.get(self.path.lstrip("/").partition("?")[0], (None, 0))
        if data is None:
            self.send_error(404)
            return
        start = 0
        if web.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if web.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if web.etags:
            self.send_header("ETag", f'"{hash(data)}"')
        if web.dates:
            self.send_header("Last-Modified", formatdate(changed, usegmt=True))
        self.end_headers()
        if not head:
            self.wfile.write(data[start : start + 700] if fault == "cut" else data[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    server = Web()
    yield server
    server.shutdown()
    server.server_close()


def test_a_memory_file_system_is_listed_and_read_in_ranges(here, memory):
    memory.pipe("/corpus/b/2.jsonl", JSONL)
    memory.pipe("/corpus/a.txt", b"one\ntwo\n")
    memory.pipe("/corpus/b/1.jsonl.gz", gzip.compress(JSONL))
    memory.pipe("/corpus/.hidden", b"x")
    memory.pipe("/corpus/c.parquet", parquet([f"row {i}" for i in range(30)]))
    expected = [f"text {i}" for i in range(500)]
    assert texts(here, files="memory://corpus/b/2.jsonl") == [
        (f"memory:///corpus/b/2.jsonl:{i + 1}", text) for i, text in enumerate(expected)
    ]
    for part_bytes in (100, 5000):
        assert [t for _, t in texts(here, part_bytes, files="memory://corpus/b/2.jsonl")] == expected
    source = Source(files="memory://corpus/b/2.jsonl")
    assert len(parts_of(source, here, part_bytes=1000)) == -(-len(JSONL) // 1000)
    every = [t for _, t in texts(here, files="memory://corpus")]
    assert every == ["one\ntwo\n", *expected, *expected, *(f"row {i}" for i in range(30))]
    assert [t for _, t in texts(here, files="memory://corpus/*.txt")] == ["one\ntwo\n"]
    assert [w for w, _ in texts(here, 1, files="memory://corpus/c.parquet")][::10] == [
        f"memory:///corpus/c.parquet: row {n}" for n in (1, 11, 21)
    ]
    assert num_bytes(Source(files="memory://corpus/a.txt"), here) == 8


def test_a_line_in_a_later_part_of_a_remote_file_is_named_by_its_byte(here, memory):
    memory.pipe("/a.jsonl", JSONL + b'{"text": 1}\n')
    source = Source(files="memory://a.jsonl")
    last = parts_of(source, here, part_bytes=1000)[-1]
    with pytest.raises(
        DataError, match=r"memory:///a\.jsonl: line \d+ after byte 1\d,\d\d\d: column 'text' holds 1"
    ):
        list(read_part(last, source, tally=Tally()))


def test_nothing_there_and_unknown_kinds_of_url(here, memory):
    for name in ("memory://none.txt", "memory://none/*.txt"):
        with pytest.raises(DataError, match="memory://none"):
            texts(here, files=name)
    with pytest.raises(RecipeError, match=r"nonsense://x/y"):
        texts(here, files="nonsense://x/y")


@pytest.mark.parametrize(("url", "driver"), [("s3://bucket/a.txt", "s3fs"), ("gs://bucket/*.txt", "gcsfs")])
def test_a_driver_that_is_missing_is_named(here, url, driver, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, driver, None)
    with pytest.raises(MissingError) as caught:
        texts(here, files=url)
    assert caught.value.hint == f"pip install {driver}"


def test_the_fingerprint_follows_the_content_in_memory(here, memory):
    memory.pipe("/a.txt", b"some text")
    source = Source(files="memory://a.txt")
    first = fingerprint(source, here)
    assert fingerprint(source, here) == first
    time.sleep(0.01)
    memory.pipe("/a.txt", b"some texT")
    assert fingerprint(source, here) != first
    second = parts_of(source, here, part_bytes=10**6)[0]
    time.sleep(0.01)
    memory.pipe("/a.txt", b"same size")
    with pytest.raises(DataError, match="changed while it was read"):
        list(read_part(second, source, tally=Tally()))


def test_file_urls_are_paths(here):
    (here / "d").mkdir()
    (here / "d/a b.txt").write_text("text")
    for url in (f"file://{here}/d/a%20b.txt", f"file://{here}/d/*.txt", f"file://localhost{here}/d"):
        assert texts(here, files=url) == [("d/a b.txt", "text")]
    local = fingerprint(Source(files="d/a b.txt"), here)
    assert fingerprint(Source(files=f"file://{here}/d/a b.txt"), here) == local
    os.utime(here / "d/a b.txt", ns=(0, 0))
    assert fingerprint(Source(files=f"file://{here}/d/a b.txt"), here) == local


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_with_and_without_ranges(here, web, ranges):
    web.ranges = ranges
    web.files = {
        "a.jsonl": (JSONL, 0),
        "b.jsonl.gz": (gzip.compress(JSONL), 0),
        "c.parquet": (parquet([f"row {i}" for i in range(30)]), 0),
        "empty.txt": (b"", 0),
    }
    expected = [f"text {i}" for i in range(500)]
    source = Source(files=web.url("a.jsonl"))
    assert len(parts_of(source, here, part_bytes=1000)) == (-(-len(JSONL) // 1000) if ranges else 1)
    assert [t for _, t in texts(here, 1000, files=web.url("a.jsonl"))] == expected
    assert any(asked[1] for asked in web.asked) == ranges
    assert [t for _, t in texts(here, files=web.url("b.jsonl.gz"))] == expected
    assert [t for _, t in texts(here, 1, files=web.url("c.parquet"))] == [f"row {i}" for i in range(30)]
    tally = Tally()
    assert texts(here, tally=tally, files=web.url("empty.txt")) == []
    assert tally.empty_files == 1
    assert source_name(source, here) == "a"


@pytest.mark.parametrize("ranges", [True, False])
def test_reading_that_breaks_off_goes_on_where_it_was(here, web, ranges):
    web.ranges = ranges
    web.files = {"a.jsonl": (JSONL, 0)}
    web.faults = [503, None, "cut", 500, "cut", "cut"]
    got = [t for _, t in texts(here, files=web.url("a.jsonl"))] if ranges else None
    if ranges:
        assert got == [f"text {i}" for i in range(500)]
        assert [asked[1] for asked in web.asked if asked[0] == "GET"][1:] == [
            "bytes=700-",
            "bytes=700-",
            "bytes=1400-",
            "bytes=2100-",
        ]
    else:
        web.faults = [503, None, "cut"]
        assert [t for _, t in texts(here, files=web.url("a.jsonl"))] == [f"text {i}" for i in range(500)]


def test_a_server_that_stays_away_is_asked_a_few_times(here, web):
    web.files = {"a.jsonl": (JSONL, 0)}
    web.faults = [503] * 99
    with pytest.raises(
        MissingError, match=r"http://127\.0\.0\.1:\d+/a\.jsonl cannot be reached, tried 4 times \(503"
    ):
        texts(here, files=web.url("a.jsonl"), on_error="skip")
    assert len(web.asked) == 4
    web.faults = [None, *["cut"] * 99]
    web.ranges = False
    with pytest.raises(MissingError, match=r"cannot be reached, tried 4 times \(it ended at byte"):
        texts(here, files=web.url("a.jsonl"), on_error="skip")


def test_what_is_not_there_is_asked_for_once(here, web):
    for fault in (404, 401):
        web.faults, web.asked = [fault], []
        with pytest.raises(DataError, match=f"a.jsonl: cannot be read \\({fault}"):
            texts(here, files=web.url("a.jsonl"))
        assert len(web.asked) == 1
    with pytest.raises(DataError, match="does not list its files"):
        texts(here, files=web.url("*.jsonl"))


def test_a_server_that_answers_get_alone(here, web):
    web.files = {"a.jsonl": (JSONL, 0)}
    for fault in (403, 405, 501):
        web.faults = [fault]
        assert len(texts(here, files=web.url("a.jsonl"))) == 500
    web.faults = [403, 403]
    with pytest.raises(DataError, match="403"):
        texts(here, files=web.url("a.jsonl"))


@pytest.mark.parametrize("told", ["etag", "date", "nothing", "fresh date"])
def test_the_fingerprint_follows_the_content_on_the_web(here, web, told):
    web.etags, web.dates = told == "etag", told in ("date", "fresh date")
    now = time.time()
    old, new = (now, now) if told == "fresh date" else (1000, 2000 if told == "date" else 1000)
    source = Source(files=web.url("a.txt"))
    web.files = {"a.txt": (b"some text", old)}
    first = fingerprint(source, here)
    assert fingerprint(source, here) == first
    web.files = {"a.txt": (b"some texT", new)}
    assert fingerprint(source, here) != first
    # Where the server tells nothing that can be relied on, the bytes themselves are read.
    assert any(asked[0] == "GET" for asked in web.asked) == (told in ("nothing", "fresh date"))


def test_a_page_that_changes_between_listing_and_reading_is_an_error(here, web):
    web.files = {"a.txt": (b"some text", 0)}
    source = Source(files=web.url("a.txt"))
    [part] = parts_of(source, here, part_bytes=10**6)
    web.files = {"a.txt": (b"some texT", 0)}
    with pytest.raises(DataError, match="changed while it was read"):
        list(read_part(part, source, tally=Tally()))


def test_secrets_in_urls_show_nowhere(here, web):
    web.files = {"a.jsonl": (b'{"text": "x"}\n{"text": 1}\n', 0)}
    url = web.url("a.jsonl", user="me:hunter2@") + "?X-Amz-Signature=abcdef#frag"
    source = Source(files=url)
    [part] = parts_of(source, here, part_bytes=10**6)
    seen = [repr(part), json.dumps(part.as_json()), part.name, source_name(source, here)]
    tally = Tally()
    found = list(read_part(part, Source(files=url, on_error="skip"), tally=tally))
    seen += [document.where for document in found] + [json.dumps(tally.as_json()), json.dumps(tally.shown())]
    with pytest.raises(DataError) as caught:
        list(read_part(part, source, tally=Tally()))
    seen.append(str(caught.value))
    web.faults = [503] * 9
    with pytest.raises(MissingError) as missing:
        texts(here, files=url)
    seen.append(str(missing.value))
    assert not any(
        secret in text for text in seen for secret in ("hunter2", "me:", "abcdef", "Signature", "frag")
    )
    assert "a.jsonl:2" in seen[-2]
    assert web.asked[0][2] == "Basic bWU6aHVudGVyMg=="


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:pw@host/a?sig=1#x", "s3://host/a"),
        ("cannot open 'https://u:p@h/x?y=1' (403)", "cannot open 'https://h/x' (403)"),
        ("plain text? a@b", "plain text? a@b"),
        ("http://h/" + "a" * 10**6, "http://h/" + "a" * 10**6),
    ],
)
def test_secrets_are_taken_out_of_messages(text, clean):
    assert remote.without_secrets(text) == clean


def test_documents_of_a_remote_source_are_read_like_local_ones(here, memory):
    (here / "a.txt").write_bytes(b"one\r\n\r\ntwo\n" * 50)
    memory.pipe("/a.txt", b"one\r\n\r\ntwo\n" * 50)
    local = read_documents(Source(files="a.txt", documents="paragraph"), base=here)
    away = read_documents(Source(files="memory://a.txt", documents="paragraph"), base=here)
    assert [d.text for d in local] == [d.text for d in away]
