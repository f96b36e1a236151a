"""report.json, report.html, the charts in it, environment.json and the model card."""

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llmkit.report.card import write_model_card
from llmkit.report.environment import describe_environment, mask_command, mask_text, write_environment
from llmkit.report.report import collect, write_report
from llmkit.report.svg import Reference, Series, chart, smooth, stacked_bar, thin, ticks

EVIL = "<script>alert(1)</script>\"'&\x1b[31m"
VOID = {"meta", "link", "line", "rect", "path", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(folder: Path) -> Path:
    """A run folder as pre-training leaves it, with hostile text wherever text can be."""
    folder.mkdir(parents=True)
    metrics: list[dict[str, Any]] = []
    for step in range(1, 41):
        loss = None if step == 20 else 3 + 6 / step
        metrics.append({
            "step": step, "tokens": step * 100, "elapsed_s": step * 0.5, "train/loss": loss, "train/lr": 1e-3 / step,
            "train/grad_norm": 1.0, "tokens_per_s": 10.0 if step == 1 else 200.0,
            "mfu": 0.4, "memory_bytes": 10**9 + step,
        })  # fmt: skip
        if step % 10 == 0:
            loss = 3 + 7 / step
            metrics.append(
                {
                    "step": step,
                    "eval/loss": loss,
                    "eval/perplexity": math.exp(loss),
                    "eval/bits_per_byte": 1.5,
                }
            )
    samples = [{"step": s, "prompt": EVIL, "text": f"text {s} {EVIL}"} for s in (10, 20, 30, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + '{"step": 4')
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    plan = {
        "vocab_size": 1000, "num_parameters": 1_234_567, "context": 64, "device": "cpu", "tokens_per_step": 100,
        "memory": {"weights": 100, "logits": 50, "total": 150}, "choices": {"machine.precision": ["bf16", EVIL]},
        "notes": [EVIL],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    source = {"name": EVIL, "num_documents": 10, "num_tokens": 1000, "num_bytes": 3500}
    data = {
        "num_tokens": 1000,
        "num_documents": 10,
        "num_bytes": 3500,
        "num_held_out_tokens": 50,
        "sources": [source],
    }
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "resolved.yaml").write_text(f"name: x # {EVIL}\ntoken: hf_abcdefgh12345678\n")
    write_environment(folder, {"note": EVIL})
    return folder


FACTS = {
    "name": EVIL, "kind": "pretrain", "status": "done", "command": ["llmkit", "run", "x.yaml", "--token", "sesame"],
    "next_command": f"llmkit generate '{EVIL}'", "tokenizer": {"algorithm": EVIL, "example": [EVIL]},
    "timings": {"train": 20.0, EVIL: 3.0}, "references": {EVIL: 5.0},
}  # fmt: skip


def test_numbers_of_the_report(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "r" / "pretrain"), FACTS)
    assert json.loads((tmp_path / "r" / "pretrain" / "report.json").read_text()) == report
    assert report["schema"] == 1
    assert report["headline"] == {
        "eval_loss": pytest.approx(3.175), "eval_loss_first": pytest.approx(3.7), "perplexity": math.exp(3.175),
        "bits_per_byte": 1.5, "train_loss": pytest.approx(3.15), "num_steps": 40, "num_tokens": 4000, "seconds": 20.0,
        "tokens_per_s": 200.0, "mfu": 0.4, "peak_memory_bytes": 10**9 + 40, "data_tokens": 1000, "data_documents": 10,
        "data_bytes": 3500, "bytes_per_token": 3.5,
    }  # fmt: skip
    assert report["references"] == {"guessing at random": pytest.approx(math.log(1000)), EVIL: 5.0}
    assert len(report["metrics"]) == 44
    assert len(report["samples"]) == 4
    assert "sesame" not in json.dumps(report)
    assert "hf_abcdefgh" not in json.dumps(report)


def test_every_text_in_the_page_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder, {**FACTS, "error": EVIL, "status": EVIL, "kind": EVIL})
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "\x1b" not in html
    assert page.text.count("<script>alert(1)</script>") >= 15, "all of them are shown as text"
    assert all(name != "onload" and not name.startswith("on") for name, _ in page.attributes)


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder, FACTS)
    html = (folder / "report.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    fetching = [v for n, v in Page(html).attributes if n in ("src", "href", "data", "action", "xlink:href")]
    assert fetching == ["data:,"]
    assert "default-src 'none'" in html


def test_the_page_shows_what_a_reader_looks_for(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder, FACTS)
    text = Page((folder / "report.html").read_text()).text
    for words in ("How it learned", "What it wrote", "The data", "The plan", "The recipe", "The environment"):
        assert words in text
    for value in (
        "3.175",
        "200 tok/s",
        "40%",
        "1.2M parameters",
        "guessing at random",
        "machine.precision",
        "step 20",
    ):
        assert value in text
    assert "step 30" in text, "the middle sample of four"
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text.lower())


def test_an_empty_folder_and_a_run_killed_early_have_a_report(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    report = write_report(tmp_path / "eval", {"final": {"eval/loss": 2.5, "eval/perplexity": 12.18}})
    assert report["headline"] == {"eval_loss": 2.5, "perplexity": 12.18}
    assert (report["kind"], report["status"]) == ("eval", "unknown")
    assert "2.5" in Page((tmp_path / "eval" / "report.html").read_text()).text
    (tmp_path / "eval" / "metrics.jsonl").write_text('{"step": 1, "train/loss": null}\n{"step"')
    (tmp_path / "eval" / "plan.json").write_text("{broken")
    report = write_report(tmp_path / "eval", {})
    assert report["headline"] == {"num_steps": 1}
    assert "plan.json: not JSON" in report["damaged"][0]
    assert "plan.json: not JSON" in Page((tmp_path / "eval" / "report.html").read_text()).text


def test_a_run_that_diverged_does_not_show_its_last_good_loss(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "eval/loss": 3.0, "train/loss": 3.0},
        {"step": 2, "eval/loss": None, "train/loss": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    top = collect(tmp_path, {})["headline"]
    assert "eval_loss" not in top
    assert "train_loss" not in top


def test_a_chart_draws_points_gaps_and_references() -> None:
    points = [(1.0, 2.0), (2.0, None), (3.0, 4.0), (4.0, math.nan), (5.0, 6.0), (6.0, 4.0)]
    html = chart("T", [Series("a", points)], references=[Reference("r", 6.0), Reference("bad", math.nan)])
    Page(html)
    (path,) = re.findall(r'class="line s1" d="([^"]+)"', html)
    assert path.count("M") == 3, "two gaps make three pieces"
    assert re.findall(r"[ML]([\d.]+) ", path) == ["0.0", "400.0", "800.0", "1000.0"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert heights == pytest.approx([946.4, 500.0, 53.6, 500.0], abs=0.1)
    assert html.count('class="ref"') == 1
    assert "nan" not in html.lower()
    assert "<title>step 3\na: 4</title>" in html


def test_a_chart_without_a_finite_point_is_empty() -> None:
    assert chart("T", [Series("a", []), Series("b", [(1.0, math.nan), (2.0, None)])]) == ""
    assert 'class="dots' in chart("T", [Series("a", [(1.0, 2.0)])]), "one point is a dot"


def test_long_series_keep_their_spikes_and_stay_small() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thin(points, 600)
    assert len(kept) <= 602
    assert (54_321.0, 99.0) in kept
    assert len(chart("T", [Series("a", points)])) < 60_000


def test_smoothing_is_centred_and_skips_gaps() -> None:
    line = [(float(i), float(i)) for i in range(500)]
    assert [y for _, y in smooth(line)] == pytest.approx([float(i) for i in range(500)]), "no lag on a line"
    noisy = [(float(i), float(i % 2)) for i in range(500)]
    assert smooth(noisy)[250][1] == pytest.approx(0.5, abs=0.06)
    assert smooth([(0.0, 1.0), (1.0, None), (2.0, 3.0)]) == [(0.0, 1.0), (1.0, None), (2.0, 3.0)]


def test_ticks_are_round() -> None:
    assert ticks(0, 600, 6) == [0, 100, 200, 300, 400, 500, 600]
    assert ticks(2.8, 9.3, 5) == [4, 6, 8]
    assert ticks(5, 5, 4) == [5]
    assert ticks(0, 6e-4, 4) == pytest.approx([0, 2e-4, 4e-4, 6e-4])


def test_a_stacked_bar_leaves_out_what_is_not_positive() -> None:
    html = stacked_bar([("a", 1.0), ("b", 3.0), ("zero", 0.0), ("nan", math.nan)], str)
    assert re.findall(r"flex:([\d.]+)", html) == ["0.2500", "0.7500"]
    assert stacked_bar([("a", 0.0)], str) == ""


@pytest.mark.parametrize(
    ("words", "masked"),
    [
        (["--token", "abc", "-q"], ["--token", "***", "-q"]),
        (["--hf-token=abc"], ["--hf-token=***"]),
        (["HF_TOKEN=abc", "llmkit"], ["HF_TOKEN=***", "llmkit"]),
        (["x.wandbApiKey=abc", "AWS_SECRET_ACCESS_KEY=a", "db_password=b"],
         ["x.wandbApiKey=***", "AWS_SECRET_ACCESS_KEY=***", "db_password=***"]),
        (["name=hf_abcdefgh12345"], ["name=***"]),
        (["https://me:pass@host/x"], ["https://***@host/x"]),
        (["pretrain.sampling.max_new_tokens=64", "tokenize.vocab_size=8k", "--eos-token", "x", "monkey=1"],
         ["pretrain.sampling.max_new_tokens=64", "tokenize.vocab_size=8k", "--eos-token", "x", "monkey=1"]),
    ],
)  # fmt: skip
def test_secrets_in_commands_are_masked(words: list[str], masked: list[str]) -> None:
    got = mask_command(words)
    assert got == masked
    assert mask_text("key hf_abcdefgh12345 end") == "key *** end"


def test_environment_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llmkit", "run", "--token", "sesame"])
    written = write_environment(
        tmp_path, {"api_key": "sesame", "deep": {"HF_TOKEN": "sesame", "url": "hf_abcdefgh1234"}}
    )
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text) == written
    assert "sesame" not in text
    assert "hf_abcdefgh" not in text
    assert written["command"] == ["llmkit", "run", "--token", "***"]
    assert written["cores"] >= 1
    assert written["memory_bytes"] > 10**8
    assert written["packages"]["numpy"].count(".") >= 1
    assert "torch" not in describe_environment.__globals__


def test_the_model_card_has_valid_front_matter(tmp_path: Path) -> None:
    report = collect(make_run(tmp_path / "run"), FACTS)
    card = write_model_card(
        tmp_path, {**report, "language": "zh-Hans", "run": "runs/x y", "license": "unknown"}
    )
    assert (tmp_path / "README.md").read_text() == card
    _, head, body = card.split("---\n", 2)
    assert YAML(typ="safe").load(io.StringIO(head)) == {
        "language": ["zh"], "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llmkit"],
    }  # fmt: skip
    for words in (
        "1.2M parameters",
        "| perplexity (per token) | 23.93 |",
        "'runs/x y'",
        "from_pretrained",
        "## Limits",
    ):
        assert words in body
    outside = re.sub(r"(`{3,})\w+\n.*?\n\1", "", body, flags=re.S)
    assert "<script" not in outside.replace("\\<", "")
    assert "\x1b" not in body


def test_the_card_quotes_norwegian_and_says_nothing_it_does_not_know(tmp_path: Path) -> None:
    card = write_model_card(tmp_path, {"name": "x", "language": "no", "license": "mit", "base_model": "a/b"})
    assert 'language:\n- "no"\nlicense: "mit"\n' in card
    assert 'base_model: "a/b"' in card
    assert "Evaluation" not in card
    assert "Training data" not in card
    assert "None" not in card


def test_a_sample_cannot_break_out_of_its_code_block(tmp_path: Path) -> None:
    sample = {"step": 1, "prompt": "a", "text": "```\n# heading\n````"}
    card = write_model_card(tmp_path, {"name": "x", "samples": [sample]})
    assert "`````text\na```\n# heading\n````\n`````" in card


@pytest.mark.parametrize("model_type", ["llmkit-recurrent", "llmkit-cnn", "llmkit-ngram", "llama"])
def test_the_cards_example_imports_llmkit_for_its_own_architectures_alone(
    tmp_path: Path, model_type: str
) -> None:
    card = write_model_card(tmp_path, {"name": "x", "model": {"model_type": model_type, "num_parameters": 9}})
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    own = model_type != "llama"
    assert code.startswith("import llmkit") == own
    assert ("only programs that import llmkit can read it" in card) == own
    assert f'library_name: "{"llmkit" if own else "transformers"}"' in card
    compile(code, "card", "exec")
