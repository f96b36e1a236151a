"""Runs side by side: the table, the order, the page."""

import json
import re
from pathlib import Path

import pytest

from llmkit.cli.commands import finish
from llmkit.cli.options import Settings
from llmkit.report.comparison import as_table, common_metric, in_order, render, row_of, write_comparison
from llmkit.run import Result

UNIGRAM = {"guessing by token frequency (unigram)": 5.5}


def report(bits, *, loss=3.0, evaluations=3, references=None, **more):
    metrics = [
        {"step": 10 * number, "eval/loss": loss + 2 - number, "eval/bits_per_byte": bits}
        for number in range(evaluations)
    ]
    return {
        "status": "done",
        "final": {"eval/loss": loss, "eval/perplexity": 20.0, "eval/bits_per_byte": bits},
        "headline": {"tokens_per_s": 12_345.0, "seconds": 61.0, "num_tokens": 640},
        "model": {"num_parameters": 1_234_567},
        "plan": {"num_parameters": 9, "tokens_per_step": 32},
        "references": UNIGRAM if references is None else references,
        "metrics": metrics,
        **more,
    }


def test_the_best_comes_first_and_what_was_not_measured_last():
    rows = [row_of(name, report(bits)) for name, bits in (("b", 1.5), ("a", 1.2), ("c", 2.0))]
    assert [row["variant"] for row in in_order(rows)] == ["a", "b", "c"]
    rows = [row_of("x", report(None, loss=2.0)), row_of("y", report(1.0, loss=1.0))]
    assert [row["variant"] for row in in_order(rows)] == ["y", "x"]
    failed = row_of("f", report(None, loss=None, evaluations=0))
    assert [row["variant"] for row in in_order([failed, *rows])] == ["y", "x", "f"]


def test_the_table_in_text():
    rows = in_order([row_of("net", report(1.25)), row_of("old", report(2.5, model={}))])
    assert as_table(rows) == [
        ("variant", "parameters", "loss", "perplexity", "bits per byte", "speed", "time"),
        ("net", "1.2M", "3", "20", "1.25", "12.3k tok/s", "1m01s"),
        ("old", "9", "3", "20", "2.5", "12.3k tok/s", "1m01s"),
    ]
    without = [{**row, "bits_per_byte": None} for row in rows]
    assert as_table(without)[0] == ("variant", "parameters", "loss", "perplexity", "speed", "time")
    assert as_table([rows[0], {**rows[1], "seconds": None}])[2][-1] == "-"


def test_losses_share_a_chart_only_where_the_tokens_are_the_same():
    assert common_metric([report(1.0), report(2.0)]) == "eval/loss"
    assert common_metric([report(1.0), report(2.0, references={"other": 4.0})]) == "eval/bits_per_byte"


def test_what_is_written(tmp_path):
    folder = tmp_path / "base<b>"
    folder.mkdir()
    made = write_comparison(
        folder,
        {"slow": report(2.0), "counted": report(1.5, loss=4.25, evaluations=1), "best": report(1.0)},
        command="llmkit run x.yaml --token=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    )
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(made))
    assert [row["variant"] for row in made["variants"]] == ["best", "counted", "slow"]
    assert made["curves"]["best"] == [[0.0, 5.0], [320.0, 4.0], [640.0, 3.0]]
    assert "abcdefgh" not in made["command"]
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 1
    assert "base&lt;b&gt;" in page
    assert "<b>" not in page.replace("<b>Held-out", "")
    # One that was measured once is a line across, as what to compare with is; the others have names in the key.
    assert set(re.findall(r'class="reflabel"[^>]*>([^<]+)<', page)) == {
        "counted 6.25",
        "guessing by token frequency (unigram) 5.5",
    }
    assert re.findall(r'<i class="c(\d)"></i>(\w+)', page) == [("1", "best"), ("2", "slow")]
    assert re.search(r"<tr><td>best</td><td class=\"n\">1.2M</td>", page)


@pytest.mark.parametrize("command", ["", "llmkit run x"])
def test_a_page_of_few(command):
    """One run alone, without a curve, is a page too."""
    row = row_of("only", report(1.0))
    page = render(
        {
            "name": "n",
            "made": "2026-01-01T00:00",
            "command": command,
            "metric": "eval/loss",
            "ranked": True,
            "references": {},
            "variants": [row],
            "curves": {"only": []},
        }
    )
    assert ("The command" in page) == bool(command)
    assert "How they learned" not in page


def test_the_table_is_the_result_of_the_command(capsys):
    """On stdout, but not where a program reads: there the path or the object."""
    table = as_table([row_of("net", report(1.25))])
    result = Result(Path("runs/x"), {"variants": []}, "llmkit generate runs/x/net Once", table=table)
    finish(result, Settings())
    assert capsys.readouterr().out.splitlines() == [
        "variant  parameters  loss  perplexity  bits per byte  speed        time",
        "net      1.2M        3     20          1.25           12.3k tok/s  1m01s",
    ]
    finish(result, Settings(quiet=True))
    assert capsys.readouterr().out == "runs/x\n"
    finish(result, Settings(as_json=True))
    assert json.loads(capsys.readouterr().out)["folder"] == "runs/x"


def test_different_objectives_are_not_ranked(tmp_path):
    made = write_comparison(tmp_path, {"slow": report(2.0), "best": report(1.0)}, ranked=False)
    assert [row["variant"] for row in made["variants"]] == ["slow", "best"]
    page = (tmp_path / "report.html").read_text()
    assert "of different objectives, whose losses do not compare" in page
    assert "best first" not in page
