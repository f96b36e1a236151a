"""The benchmark's own arithmetic, and that it notices works that differ."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pretrain import check_same_work, chosen, parse, summarise

ROOT = Path(__file__).parents[2]


def result(name, cpu_s=1.0, **changes):
    facts = {
        "contender": name,
        "cpu_s": cpu_s,
        "wall_s": cpu_s,
        "before_cpu_s": 9.0,
        "peak_bytes": 100,
        "first_loss": 9.7,
        "last_loss": 8.0,
        "tokens": 4096,
        "precision": "fp32",
        "compile": False,
    }
    return facts | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_loss": 9.75}, "first_loss of b is 9.7500, of a 9.7000"),
        ({"last_loss": 8.2}, "last_loss"),
        ({"tokens": 2048}, "not the same work"),
        ({"first_loss": 9.7, "last_loss": 8.0}, None),
        ({"last_loss": 8.1, "precision": "bf16"}, None),
    ],
)
def test_works_that_differ_are_noticed(changes, words):
    results = [result("a"), result("b", **changes)]
    if words is None:
        check_same_work(results)
        return
    with pytest.raises(SystemExit, match=words):
        check_same_work(results)


def test_one_that_does_not_learn_is_noticed():
    with pytest.raises(SystemExit, match="did not learn"):
        check_same_work([result("a", last_loss=9.7), result("b", last_loss=9.7)])


def test_ratios_are_taken_within_a_round():
    # The machine was three times slower in the second round: each round says 2, so the result says 2.
    rounds = [
        {"trainer": result("trainer", 2.0), "llmkit": result("llmkit", 1.0, peak_bytes=50)},
        {"trainer": result("trainer", 6.0), "llmkit": result("llmkit", 3.0, peak_bytes=50)},
    ]
    row = summarise(rounds)["llmkit"]
    assert row["speed_vs_trainer"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert row["peak_vs_trainer"]["median"] == 0.5
    assert row["cpu_s"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert row["tokens_per_cpu_s"] == 2048


def test_contenders():
    assert "llmkit-fp32" in chosen("", bf16=True)
    assert "llmkit-fp32" not in chosen("", bf16=False)
    assert chosen("trainer,llmkit", bf16=False) == ["trainer", "llmkit"]
    with pytest.raises(SystemExit, match="no contender lit-gpt"):
        chosen("lit-gpt", bf16=False)


def test_the_defaults():
    asked = parse([])
    assert isinstance(asked, argparse.Namespace)
    assert (asked.rounds, asked.steps, asked.threads) == (5, 10, 1)


@pytest.mark.slow
def test_the_smoke_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.pretrain", "--smoke", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)["contenders"]
    assert set(table) == {"trainer", "llmkit-not-compiled"}
    assert table["trainer"]["last_loss"] == pytest.approx(table["llmkit-not-compiled"]["last_loss"], rel=0.01)
