import gzip
import sys

import pytest
import zstandard

from llmkit.data.parts import parts_of, read_part
from llmkit.data.places import Tally
from llmkit.data.sources import read_documents
from llmkit.errors import DataError, MissingError
from llmkit.recipe.schema import Source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(kind, url, body, headers="Content-Type: text/html", status="200 OK"):
    http = f"HTTP/1.1 {status}\r\n{headers}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{abs(hash(url)):032x}>\r\n"
        f"Content-Type: application/http; msgtype={kind}\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return head.encode() + http + b"\r\n\r\n"


HTML = "<html><body>caf\u00e9 中文</body></html>"
RECORDS = [
    record("request", "http://a/0", b"not a page"),
    record("response", "http://a/1?session=secret#x", HTML.encode()),
    record("response", "http://a/2", "从前".encode("gb18030"), "Content-Type: text/plain; charset=gb18030"),
    record("response", "http://a/3", b"\x89PNG", "Content-Type: image/png"),
    record("response", "http://a/4", b"gone", status="404 Not Found"),
    record("response", "http://u:p@a/5", b"caf\xe9"),
    record("response", "http://a/6", b"x", "Content-Type: text/html; charset=klingon"),
    record(
        "response",
        "http://a/7",
        gzip.compress(b"packed\r\npage"),
        "Content-Type: text/html\r\nContent-Encoding: gzip",
    ),
    record("response", "http://a/8", b" \n"),
    record("response", "http://a/9", b"not packed", "Content-Type: text/html\r\nContent-Encoding: gzip"),
    record("response", "http://a/10", b"no chunk", "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
    record("response", "http://a/11", b"last", "Content-Type: text/plain"),
]
EXPECTED = [
    ("http://a/1", HTML),
    ("http://a/2", "从前"),
    ("http://a/7", "packed\npage"),
    ("http://a/11", "last"),
]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_pages_of_a_web_archive(here, ending, policy):
    packed = {
        "": b"".join(RECORDS),
        ".gz": b"".join(gzip.compress(each) for each in RECORDS),
        ".zst": zstandard.compress(b"".join(RECORDS)),
    }[ending]
    (here / f"a.warc{ending}").write_bytes(packed)
    tally = Tally()
    found = read_documents(Source(files=f"a.warc{ending}", on_error=policy), base=here, tally=tally)
    assert [(document.where, document.text) for document in found] == EXPECTED
    assert tally.skipped_rows == {"page not in its charset": 2, "damaged page": 2}
    assert tally.empty_documents == 1
    first, second, *_ = tally.shown()["examples"]
    assert (first["where"], first["value"]) == (f"a.warc{ending}: answer 5", "http://a/5")
    assert "klingon" in second["what"]
    assert len(parts_of(Source(files=f"a.warc{ending}"), here, part_bytes=10)) == 1


def test_damaged_archives(here):
    packed = b"".join(gzip.compress(each) for each in RECORDS)
    (here / "a.warc.gz").write_bytes(packed[:-150])
    (here / "b.warc").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.warc\.gz: damaged \.gz data"):
        list(read_documents(Source(files="a.warc.gz"), base=here))
    with pytest.raises(
        DataError, match=r"b\.warc: not a readable web archive \(it does not begin with WARC/\)"
    ):
        list(read_documents(Source(files="b.warc"), base=here))
    tally = Tally()
    source = Source(files="*.warc*", on_error="skip")
    found = [
        d.text for part in parts_of(source, here, part_bytes=1) for d in read_part(part, source, tally=tally)
    ]
    assert found == [text for _, text in EXPECTED][: len(found)]
    assert tally.skipped_files == {"damaged .gz data": 1, "not a readable web archive": 1}


def test_fastwarc_missing_says_how_to_get_it(here, monkeypatch):
    (here / "a.warc").write_bytes(RECORDS[1])
    monkeypatch.setitem(sys.modules, "fastwarc.warc", None)
    with pytest.raises(MissingError) as caught:
        list(read_documents(Source(files="a.warc"), base=here))
    assert caught.value.hint == "pip install 'llmkit[warc]'"


def test_a_large_page_is_cut_and_a_huge_one_left_out(here, monkeypatch):
    from llmkit.data import warc

    monkeypatch.setattr(warc, "LARGEST_PAGE", 3_000_000)
    pages = [
        record("response", "http://a/1", b"x" * 2_000_000),
        record("response", "http://a/2", b"y" * 3_000_001),
    ]
    (here / "a.warc").write_bytes(b"".join(pages))
    tally = Tally()
    found = list(read_documents(Source(files="a.warc"), base=here, tally=tally))
    assert sum(len(document.text) for document in found) == 2_000_000
    assert {document.where for document in found} == {"http://a/1"}
    assert tally.skipped_rows == {"page too large": 1}
