"""The page of `llmkit tokenize`: what preparation left, what it dropped, and how good the tokenizer is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report_page import EVIL, Page
from tokenizing import train_tokenizer

from llmkit.recipe.schema import Tokenize
from llmkit.report.report import collect, write_report
from llmkit.report.svg import bar

SKIPPED = {
    "empty_files": 2,
    "empty_documents": 17,
    "rows": {"not JSON": 5, "no text": 31},
    "files": {"damaged": 1},
    "examples": [{"where": "web.jsonl:17", "reason": "not JSON", "what": "column 3", "value": EVIL}],
}


def step(name: str, came: int, left: int, **more: Any) -> dict[str, Any]:
    counts = {"documents_in": came, "documents_out": left, "bytes_in": came * 1000, "bytes_out": left * 1000}
    return {"name": name, **counts, "changed": 0, "dropped": {}, "replaced": {}, **more}


STEPS = [
    step("normalise", 10_000, 9_990, changed=7312, dropped={"blank": 10}),
    step("filter", 9_990, 8_000, dropped={"too short": 990, EVIL: 999, "never": 0, "c4: lines": 1}),
    step("personal_data", 8_000, 8_000, changed=431, replaced={"mail": 700, "phone": 31}),
    step("lines", 8_000, 8_000, changed=12, replaced={"line": 120}),
    step("near", 8_000, 7_000, dropped={"near copy": 1000}),
]
TOKENIZER: dict[str, Any] = {
    "algorithm": "bpe", "documents": 152, "bytes": 832_654, "chars": 700_000, "asked_vocab_size": 5000,
    "vocab_size": 4000, "note": "fewer than the 5,000 asked for", "measured_on": "held-out documents",
    "bytes_per_token": 3.266, "chars_per_token": 3.0134, "han_documents": 12, "han_chars_per_token": 0.85,
    "han_bytes_per_token": 2.45, "latin_documents": 7, "latin_chars_per_token": 3.4, "latin_bytes_per_token": 3.5,
    "round_trip": False, "round_trip_of": "normalised text", "round_trip_documents": 19, "round_trip_failures": 2,
    "round_trip_first_failure": f"document 3, character 7: {EVIL}", "unknown_ratio": 0.00012, "used_ratio": 0.64,
    "wasteful_tokens": ["   ", EVIL], "splits": [["愿", r"\xe6\xb3", r"\xb0", " 华", "a\tb\n"], [EVIL]],
    "seconds": 0.5,
}  # fmt: skip
DATA = {
    "num_documents": 6930, "num_tokens": 9_000_000, "num_bytes": 31_500_000, "num_held_out_documents": 70,
    "lengths": [{"up_to": 64, "documents": 30}, {"up_to": 128, "documents": 10}],
    "sources": [
        {"name": "web", "num_documents": 6000, "num_tokens": 8_000_000, "address": "0123abc", "skipped": SKIPPED,
         "encoder": {"encoder": "gigatoken", "version": "0.10.1", "reason": "", "compared_documents": 1412,
                     "compared_bytes": 1_000_000}},
        {"name": EVIL, "num_documents": 930, "num_tokens": 1_000_000,
         "encoder": {"encoder": "tokenizers", "version": "0.23", "reason": "gigatoken is not installed",
                     "compared_documents": 0, "compared_bytes": 0}},
    ],
}  # fmt: skip
DROPPED = [
    {"step": s, "reason": r, "where": w, "text": f"{i} {EVIL} \x00\u202e"}
    for s, r, w in (("filter", "too short", "web.jsonl:3"), ("filter", EVIL, EVIL), ("near", "near copy", ""))
    for i in range(20)
]
FACTS = {
    "name": "mixed", "kind": "tokenize", "status": "done", "command": "llmkit tokenize mixed.yaml",
    "tokenizer": TOKENIZER, "dropped_examples": DROPPED, "timings": {"prepare": 12.0, "encode": 3.0},
    "preparation": {
        "read": {"documents": 10_000, "bytes": 45_000_000}, "kept": {"documents": 7_000, "bytes": 7_000_000},
        "steps": STEPS, "skipped": {**SKIPPED, "rows": {"not JSON": 2}},
    },
}  # fmt: skip


def render(folder: Path, facts: dict[str, Any], data: dict[str, Any]) -> tuple[str, Page]:
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(data))
    write_report(folder, facts)
    html = (folder / "report.html").read_text()
    return html, Page(html)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(tmp_path_factory.mktemp("run"), FACTS, DATA)[0]


def rows_under(html: str, heading: str) -> list[list[str]]:
    """The cells, as text, of the first table after a heading."""
    after = html[html.index(f">{heading}</h") :]
    table = after[after.index("<table>") : after.index("</table>")]
    return [
        [Page(cell).text for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in table.split("<tr>")[2:]
    ]


def test_the_headline_counts_what_was_kept(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    top = collect(tmp_path, FACTS)["headline"]
    assert top == {
        "seconds": 15.0, "data_tokens": 9_000_000, "data_documents": 6930, "data_bytes": 31_500_000,
        "bytes_per_token": 3.5, "vocab_size": 4000, "kept_ratio": 0.7,
    }  # fmt: skip
    text = render(tmp_path, FACTS, DATA)[1].text
    assert "6,930 documents, 31.5 MB of text, became 9M tokens in 15s" in text
    assert "kept70%of 10,000 documents read" in text
    assert "documents6.9kand 70 held out" in text


def test_the_waterfall_has_a_row_a_step(html: str) -> None:
    assert rows_under(html, "What preparation left") == [
        ["read", "", "10,000", "45 MB", ""],
        ["normalise", "", "9,990", "10 MB", "changed 7,312 · dropped 10"],
        ["filter", "", "8,000", "8 MB", "dropped 1,990"],
        ["personal data", "", "8,000", "8 MB", "changed 431 · replaced 731 places"],
        ["repeated lines", "", "8,000", "8 MB", "changed 12 · took out 120 lines"],
        ["near copies", "", "7,000", "7 MB", "dropped 1,000"],
    ]
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="0" width="([\d.]+)"', html)
    assert bars[:5] == [
        ("f1", "0.0", "1000.0"),
        ("f1", "0.0", "999.0"), ("lost", "999.0", "1.0"),
        ("f1", "0.0", "800.0"), ("lost", "800.0", "199.0"),
    ]  # fmt: skip
    assert "Of 10,000 documents (45 MB), 7,000 documents (7 MB) were kept." in html


def test_reasons_come_by_step_and_size_and_nought_is_left_out(html: str) -> None:
    rows = rows_under(html, "What was dropped, and why")
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("normalise", "10", "0.1%"), ("filter", "999", "10%"), ("filter", "990", "9.9%"), ("filter", "1", "0.01%"),
        ("near copies", "1,000", "10%"),
    ]  # fmt: skip
    assert rows[1][1] == EVIL.replace("\x1b", "\\x1b")
    assert rows[2][1] == "too short"


def test_personal_data_is_reduced_and_nothing_more_is_claimed(html: str) -> None:
    text = Page(html).text
    assert "this reduces personal data" in text
    assert "anonym" not in text.lower()
    assert "mail700phone31" in text
    assert "line120" not in text


def test_dropped_texts_are_shown_by_reason_and_harmless(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert not {"\x00", "\x1b", "\u202e"} & set(html)
    assert "\\x00\\u202e" in page.text
    assert page.tags.count("figure") == 3 + 3 * 6, "one of each reason in view, six below"
    assert "filter · too short web.jsonl:3" in page.text
    assert all(not name.startswith("on") for name, _ in page.attributes)
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html


def test_secrets_in_dropped_texts_are_masked(tmp_path: Path) -> None:
    example = {"step": "filter", "reason": "r", "where": "", "text": "key hf_abcdefgh12345 end"}
    html = render(tmp_path, {"dropped_examples": [example]}, {})[0]
    assert "key *** end" in html
    assert "hf_abcdefgh" not in (tmp_path / "report.json").read_text()


def test_what_was_passed_over_is_added_up(html: str) -> None:
    assert rows_under(html, "Passed over while reading") == [
        ["rows", "no text", "31"],
        ["rows", "not JSON", "7"],
        ["files", "damaged", "2"],
        ["empty files", "nothing in them", "4"],
        ["blank documents", "nothing in them", "34"],
    ]
    assert "web.jsonl:17" in html


def test_data_encoders_and_lengths(html: str) -> None:
    text = Page(html).text
    assert (
        "web: gigatoken 0.10.1; it gave the same ids as tokenizers on 1,412 documents (1 MB) of this text"
        in text
    )
    assert "tokenizers 0.23 (gigatoken is not installed)" in text
    assert rows_under(html, "Length of documents") == [["64", "", "30", "75%"], ["128", "", "10", "25%"]]
    assert rows_under(html, "The data")[0] == ["web", "6,000", "8,000,000"], "the address has its own place"
    assert "0123abc" in text


def test_the_figures_of_the_tokenizer(html: str) -> None:
    listed = html[html.index(">The tokenizer</h2>") :]
    pairs = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", listed[: listed.index("</dl>")])
    assert pairs == [
        ("algorithm", "bpe"), ("vocabulary", "4,000"), ("asked for", "5,000"), ("bytes per token", "3.266"),
        ("characters per token", "3.013"), ("round trip", "not exact (normalised text)"),
        ("unknown tokens", "0.012%"), ("entries that occur", "64%"), ("measured on", "held-out documents"),
        ("learnt from", "152 documents, 833 kB"), ("time to learn", "500ms"),
    ]  # fmt: skip
    assert "2 of 19 documents did not come back as they were. document 3, character 7" in html
    assert "fewer than the 5,000 asked for" in html
    assert rows_under(html, "Length of a token by script") == [
        ["Han", "", "0.85", "2.45", "12"],
        ["Latin", "", "3.4", "3.5", "7"],
    ]
    assert "␣␣␣" in html


def test_pieces_alternate_and_bytes_are_marked(html: str) -> None:
    first = html[html.index('<p class="pieces"') :]
    spans = re.findall(r'<span class="([^"]*)">([^<]*)</span>', first[: first.index("</p>")])
    assert spans == [
        ("t1", "愿"), ("t2 byte", "&lt;E6&gt;&lt;B3&gt;"), ("t3 byte", "&lt;B0&gt;"), ("t4", " 华"), ("t1", "a⇥b⏎"),
    ]  # fmt: skip


@pytest.mark.parametrize("missing", [None, {}, {"steps": None, "read": None, "skipped": None}])
def test_what_is_missing_is_left_out(tmp_path: Path, missing: Any) -> None:
    facts = {"kind": "tokenize", "preparation": missing, "dropped_examples": [], "tokenizer": {}}
    text = render(tmp_path, facts, {"num_documents": 3})[1].text
    for words in (
        "preparation left",
        "dropped",
        "Passed over",
        "The tokenizer",
        "What made the ids",
        "None",
        "nan",
    ):
        assert words not in text
    assert "3 documents" in text


def test_bars_keep_within_their_width() -> None:
    assert bar([("f1", 0.75), ("lost", 0.5)]).count("<rect") == 2
    assert 'x="750.0" y="0" width="250.0"' in bar([("f1", 0.75), ("lost", 0.5)])
    assert "<rect" not in bar([("f1", 0.0), ("lost", -1.0), ("f2", float("nan"))])


def test_the_figures_of_a_real_tokenizer_have_their_places(tmp_path: Path) -> None:
    texts = [f"The cat number {i} sat on the mat, and 从前有座山 {i * 7}." for i in range(60)]
    figures = train_tokenizer(texts, Tokenize(vocab_size=300), folder=tmp_path)
    html, page = render(tmp_path / "run", {"kind": "tokenize", "tokenizer": figures}, {})
    assert "round tripexact" in page.text
    assert html.count('<p class="pieces"') == len(figures["splits"]) >= 1
    joined = "".join(figures["splits"][0])
    assert re.sub("<[^>]*>", "", html.split('<p class="pieces" dir="auto">')[1].split("</p>")[0]) == joined
    left = html[html.index(">The tokenizer</h2>") :].split("</section>")[0]
    assert left.count('<dl class="pairs">') == 1, "no figure is without a name of its own"
