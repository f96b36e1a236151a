"""The page, the terminal's table and the card of a model that was made smaller."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llmkit.report.compressed_card import compressed_card
from llmkit.report.compression import compression, deed, sentence, table_of
from llmkit.report.formatting import format_number
from llmkit.report.report import write_report
from llmkit.report.scatter import Dot, frontier, scatter

EVIL = "<script>alert(1)</script>"


def speed(precision: str, times: float, latency: float = 10.0) -> dict[str, Any]:
    return {
        "precision": precision,
        "model": "m",
        "batch": 1,
        "length": 64,
        "new_tokens": 16,
        "latency_ms_p50": latency,
        "latency_ms_p95": latency * 1.2,
        "tokens_per_s": 6400.0,
        "decode_tokens_per_s": 30.0,
        "memory_bytes": 500_000_000,
        "times_as_fast": times,
        "times_low": times - 0.1,
        "times_high": times + 0.1,
    }


def model(name: str, file_bytes: int, perplexity: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": None,
        "settings": {},
        "facts": {},
        "standard": True,
        "file_bytes": file_bytes,
        "num_parameters": 134_500_000,
        "figures": {"perplexity": perplexity, "loss": 2.5, "num_tokens": 7},
        "differences": [],
        "paired": {},
        "speed": [],
        **more,
    }


def facts(**more: Any) -> dict[str, Any]:
    """What `llmkit compress` leaves of a chain of two steps."""
    first = model(EVIL, 540_000_000, 12.0, speed=[speed("fp32", 1.6), speed("bf16", 1.0)])
    second = model(
        "1-prune",
        270_000_000,
        13.0,
        method="prune",
        settings={"what": "channels", "share": 0.25, "by": "activation"},
        differences=[{"metric": "perplexity", "difference": 1.0, "low": 0.8, "high": 1.2}],
        paired={
            "nll_difference": 0.0812,
            "error": 0.0031,
            "kl": 0.0512,
            "agreement": 0.8765,
            "num_targets": 999,
        },
        speed=[speed("bf16", 1.5)],
    )
    third = model(
        "2-quantize",
        140_000_000,
        14.5,
        method="quantize",
        settings={"format": "int4", "solver": "gptq", "group": "auto", "recover": {}},
        facts={"solver": "gptq", "group": 64, "note": EVIL, "layers": [EVIL], "recovered": True},
        standard=False,
        differences=[{"metric": "perplexity", "difference": 2.5, "low": 2.0, "high": 3.0}],
        paired={"why": f"no {EVIL}"},
    )
    return {
        "name": "small",
        "kind": "compress",
        "status": "failed",
        "task": "text",
        "best": "perplexity",
        "chain": [first, second, third],
        "gates": [
            {
                "metric": "perplexity",
                "value": 14.5,
                "before": 12.0,
                "limit": 12.12,
                "held": False,
                "said": "at worst 12.12, chance allowed for",
            }
        ],
        "warnings": [f"2-quantize: {EVIL}"],
        **more,
    }


TRIED = [
    {"name": "int8", "file_bytes": 180e6, "size_ratio": 0.66, "latency_ratio": 1.1, "figure": 12.1, "difference": 0.1,
     "held": True, "reached": False, "chosen": False},
    {"name": "int4", "file_bytes": 120e6, "size_ratio": 0.44, "latency_ratio": 1.2, "figure": 12.6, "difference": 0.6,
     "held": True, "reached": True, "chosen": True},
    {"name": EVIL, "file_bytes": 100e6, "size_ratio": 0.37, "latency_ratio": 0.8, "figure": 19.0, "difference": 7.0,
     "held": False, "reached": True, "chosen": False},
    {"name": "mixed", "error": f"no such {EVIL}"},
]  # fmt: skip


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "|", page))


def page_of(folder: Path, **more: Any) -> str:
    write_report(folder, facts(**more))
    return (folder / "report.html").read_text()


def test_the_page_says_what_was_done_and_what_it_cost(tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path))
    for words in (
        "26% of its size",  # of the last model: 140 of 540 MB
        "270 MB",
        "50%",
        "25% of the channels taken out (activation)",
        "weights of 4 bits (gptq, groups of 64), then trained",
        "+1|(0.8 to 1.2)",
        "+0.0812|± 0.0031",
        "87.6%",  # both say the same; 87.65 to even
        "failed",
        "at worst 12.12",
        "1.50× (1.40 to 1.60)",
        "fp32",
        "needs llmkit",
        "30 tok/s",
        "only programs that import llmkit can read it",
        "was not compared target by target",
    ):
        assert words in text, words
    assert "What was tried" not in text


def test_texts_of_others_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(tmp_path, tried=TRIED)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert "http" not in page.replace("http-equiv", "")


def test_what_was_tried_is_drawn_with_the_chosen_one_marked() -> None:
    page = compression(facts(tried=TRIED))
    assert page.count('class="ring') == 2  # by size and by time
    drawn = re.findall(r'<text class="named"[^>]*>([^<]+)</text>', page)
    assert drawn == ["int4", "int4"]
    text = text_of(page)
    assert "passed over: no such" in text
    assert "not small or fast enough" in text
    assert "loses too much" in text


def test_other_reports_have_no_such_section(tmp_path: Path) -> None:
    assert compression({"kind": "eval", "chain": [{}]}) == ""
    assert compression({"kind": "compress", "chain": []}) == ""
    write_report(tmp_path, {"kind": "compress", "status": "failed", "error": "killed"})
    assert "Step by step" not in (tmp_path / "report.html").read_text()


def test_a_model_that_another_runtime_runs_has_what_is_known_of_it(tmp_path: Path) -> None:
    exported = model(
        "1-export", 100, 0.0, method="export", settings={"to": "gguf"}, figures={}, standard=False
    )
    text = text_of(page_of(tmp_path, chain=[facts()["chain"][0], exported], gates=[]))
    assert "GGUF for llama.cpp" in text
    assert "The gate" not in text


def test_tiny_differences_are_no_noughts() -> None:
    chain = facts()["chain"]
    chain[1]["paired"] = {"nll_difference": -2.1e-5, "error": 4e-6}
    assert table_of({"chain": chain, "best": "perplexity"})[2][4] == "-2.1e-05 ± 4.0e-06"


def test_the_terminals_table_is_short_and_square() -> None:
    lines = table_of(facts())
    assert lines[0] == (
        "model",
        "size",
        "perplexity",
        "difference",
        "NLL",
        "KL",
        "agreement",
        "times as fast",
    )
    assert {len(line) for line in lines} == {8}
    assert lines[1][1:] == ("540 MB", "12", "", "", "", "", "1.00× (0.90 to 1.10)")
    assert lines[2][1:4] == ("270 MB (50%)", "13", "+1 (0.8 to 1.2)")
    assert lines[3][-1] == "–"
    untimed = facts()
    for one in untimed["chain"]:
        one |= {"speed": [], "paired": {}}
    assert table_of(untimed)[0] == ("model", "size", "perplexity", "difference")
    assert table_of({}) == []


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("quantize", {"format": "mixed", "bits": 5.0, "solver": "auto"}, "weights of 4 or 8 bits, 5 in the mean"),
        ("quantize", {"format": "int8", "solver": "rtn", "group": "row"}, "weights of 8 bits (rtn, a scale a row)"),
        ("prune", {"share": 0.5, "pattern": "2:4", "by": "sparsegpt"},
         "50% of the weights set to zero (sparsegpt, 2:4)"),
        ("distil", {"layers": 6, "channels": 0.5, "recover": {}}, "a student with 6 layers and 50% of the channels"),
        ("factorize", {"share": 0.2}, "linear layers as products, 20% of their parameters gone"),
        ("export", {"to": "onnx", "type": "int8"}, "ONNX for onnxruntime, int8"),
        (None, {}, "as it was"),
    ],
)  # fmt: skip
def test_deeds_in_words(method: str, settings: dict[str, Any], said: str) -> None:
    assert deed({"method": method, "settings": settings, "facts": {}}) == said


def test_the_sentence_names_the_chain() -> None:
    told = sentence(facts())
    assert told.startswith(
        f"{EVIL}, 26% of its size: 25% of the channels taken out (activation); weights of 4 bits"
    )


def test_the_frontier_holds_what_nothing_beats() -> None:
    dots = [Dot("a", 1, 5), Dot("b", 2, 4), Dot("c", 3, 6), Dot("d", 1, 4), Dot("e", 4, 6)]
    assert [dot.name for dot in frontier(dots, lower=False)] == ["a", "c"]
    assert [dot.name for dot in frontier(dots, lower=True)] == ["d"]


def test_points_lie_where_their_numbers_say() -> None:
    drawn = scatter("t", [Dot("a", 0, 0), Dot("b", 10, 10, chosen=True)], format_x=str, format_y=str)
    circles = re.findall(r'<circle class="f1" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    (bx, by), (ax, ay) = [(float(x), float(y)) for x, y in circles]  # the chosen one is drawn first
    assert bx > ax
    assert by < ay
    assert drawn.count('class="ring') == 1
    assert scatter("t", [Dot("a", 0, 0)], format_x=str, format_y=str) == ""


@pytest.mark.parametrize(
    ("what", "facts", "said"),
    [
        ("layers", {"kept": [[0, 2], [0]], "gone": [[1], [1]]}, "2 of 5 layers taken out"),
        ("channels", {"channels": [256, 192]}, "64 of 256 channels taken out"),
        ("heads", {"groups": [3, 2]}, "1 of 3 groups of heads taken out"),
        ("weights", {}, "20% of the weights set to zero"),
    ],
)
def test_what_went_is_counted_where_a_share_was_rounded(what: str, facts: dict[str, Any], said: str) -> None:
    assert deed({"method": "prune", "settings": {"what": what, "share": 0.2}, "facts": facts}) == said


def card(parent: str | None = None, **more: Any) -> str:
    chain = facts()["chain"]
    given = {
        "parent": f"runs/{EVIL}",
        "chain": chain,
        "best": "perplexity",
        "gate": facts()["gates"][0],
        **more,
    }
    return compressed_card(parent, chain[-1], **given)


def test_the_card_says_what_was_done_and_that_the_gate_failed() -> None:
    text = card()
    assert "**Does not hold:** perplexity went from 12 to 14.5, at worst 12.12" in text
    assert "| 2-quantize | 140 MB (26%) | 14.5 |" in text
    assert "only programs that `import llmkit`" in text
    assert "25% of the channels taken out" in text
    assert "<script" not in text.replace("\\<script", "")
    assert "Does not hold" not in card(gate={**facts()["gates"][0], "held": True})
    assert "hold" not in card(gate=None)


def test_the_licence_travels_and_the_hub_reads_the_head() -> None:
    parent = (
        '---\nlicense: "apache-2.0"\nlanguage:\n- "no"\n- en\npipeline_tag: text-generation\ntags:\n- code\n'
    )
    parent += 'model-index: [{"name": "x", "results": []}]\n---\n# A parent\n\nIts own words.\n'
    text = card(parent, base_model="someone/model")
    data = ModelCard(text).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["no", "en"], "text-generation")
    assert data.tags == ["llmkit", "compressed", "code"]
    assert (data.base_model, data.library_name) == ("someone/model", "llmkit")
    assert "model-index" not in text  # those are the parent's figures
    assert "Its own words" not in text


@pytest.mark.parametrize("parent", [None, "", "no head", "---\n: [broken\n---\n", "---\n- a list\n---\n"])
def test_a_parent_without_a_head_leaves_a_card_all_the_same(parent: str | None) -> None:
    data = ModelCard(card(parent)).data
    assert data.license is None
    assert data.tags == ["llmkit", "compressed"]


def test_ticks_that_are_near_each_other_are_told_apart() -> None:
    drawn = scatter("t", [Dot("a", 0, 150.701), Dot("b", 1, 150.704)], format_x=str, format_y=format_number)
    labels = re.findall(r'text-anchor="end">([^<]+)<', drawn)
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)


def test_where_nothing_was_chosen_the_page_says_so() -> None:
    assert "none of them does what was asked for" in compression(facts(tried=[{**TRIED[0]}, {**TRIED[2]}]))
