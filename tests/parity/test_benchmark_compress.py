"""The benchmark of `llmkit compress`: its sums by hand, and that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compress
from benchmarks.compress import METHODS, Asked, contest, is_exported, parse, print_table, summarise
from llmkit.evaluate.speed import Call, Cell, Timed

ROOT = Path(__file__).parents[2]
CELL = Cell(1, 128, 32)


def timed(word: str, rounds: list[list[tuple[float, float | None]]], *, writes: bool = True) -> Timed:
    calls = [[Call(seconds, first) for seconds, first in one] for one in rounds]
    return Timed(word, {"writes": writes}, {CELL: calls})


def test_ratios_are_taken_within_rounds_of_the_calls_that_were_disturbed_least():
    base = timed("bf16", [[(9.0, 5.0), (6.0, 2.0)], [(12.0, 4.0)]])
    small = timed("gguf", [[(3.0, 2.0)], [(5.0, 1.0), (9.0, 7.0)]])
    facts = {"cpu_s": 7.0, "nats": 0.5, "nats_error": 0.1, "file_bytes": 30, "first_bytes": 120}
    table = summarise({"bf16": base, "gguf": small}, {"gguf": facts})
    assert table["bf16"]["read"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert table["gguf"]["read"] == {"median": 2.5, "low": 1.0, "high": 4.0}  # 2/2 and 4/1
    assert table["gguf"]["write"] == {
        "median": 4.0,
        "low": 4.0,
        "high": 4.0,
    }  # 4/1, and 8/2: the second call's
    assert table["gguf"]["size"] == 0.25
    assert (table["gguf"]["cpu_s"], table["gguf"]["nats"]) == (7.0, 0.5)


def test_what_does_not_write_is_read_only():
    base = timed("bf16", [[(3.0, None)]], writes=False)
    small = timed("onnx", [[(1.5, None)]], writes=False)
    table = summarise({"bf16": base, "onnx": small}, {})
    assert table["onnx"] == {"read": {"median": 2.0, "low": 2.0, "high": 2.0}}


def test_the_defaults():
    asked = parse([])
    assert (asked.rounds, asked.threads, asked.decoder, asked.encoder) == (5, 1, None, None)
    assert [method for method in METHODS["decoder"] if is_exported(method)] == [
        "gguf",
        "gguf,type=q4_0",
        "onnx",
    ]


def test_a_method_that_fails_leaves_the_others(monkeypatch, capsys):
    facts = {"cpu_s": 7.0, "nats": 0.5, "nats_error": 0.1, "file_bytes": 30, "first_bytes": 120}
    found = {"int8": facts, "onnx": {"failed": "decoder: onnx failed with exit code 1"}}
    calls = {word: timed(word, [[(3.0, 1.0)]]) for word in ("bf16", "int8")}
    monkeypatch.setattr(compress, "squeeze", lambda model, kind, method, folder, asked: found[method])
    monkeypatch.setattr(
        compress, "time_all", lambda made, kind, asked: calls if list(made) == ["int8"] else {}
    )
    table = contest("decoder", "folder", Asked(1, 1, smoke=True, methods=("int8", "onnx")))
    assert table["int8"]["size"] == 0.25
    print_table("decoder", table)
    said = capsys.readouterr()
    assert "failed: see above" in said.out
    assert "exit code 1" in said.err
    with pytest.raises(SystemExit, match="no method could be measured"):
        contest("decoder", "folder", Asked(1, 1, smoke=True, methods=("onnx",)))


@pytest.mark.slow
def test_the_smoke_run():
    command = [sys.executable, "-m", "benchmarks.compress", "--smoke", "--json", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)
    assert set(table["decoder"]) == {"bf16", "fp32", "int8", "prune,what=layers,share=25%"}
    assert set(table["encoder"]) == {"bf16", "fp32", "onnx"}
    assert table["decoder"]["int8"]["size"] < 0.8
    assert abs(table["encoder"]["onnx"]["nats"]) < 1e-5
    assert all(row["read"]["median"] > 0 for one in table.values() for row in one.values())
