"""The benchmark for GPUs: its arithmetic, and all of it at toy size on a processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import CONTENDERS, JOBS, main, parse, print_table, summarise, toy

ROOT = Path(__file__).parents[2]


def result(wall_s, **changes):
    facts = {
        "wall_s": wall_s,
        "first_s": 9.0,
        "tokens": 1000,
        "peak_bytes": 120,
        "last_loss": 3.0,
        "micro_batch": 4,
        "compile": True,
        "planned_bytes": 100,
        "flops_per_token": 10,
    }
    return facts | changes


def test_ratios_are_taken_within_rounds():
    rounds = [
        {"trainer": result(4.0), "trainer-tuned": result(3.0), "llmkit": result(2.0)},
        {"trainer": result(8.0), "trainer-tuned": result(4.4), "llmkit": result(4.0)},
    ]
    ours = summarise(rounds, peak_flops=10_000.0)["llmkit"]
    assert ours["speed_vs_trainer"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ours["speed_vs_trainer-tuned"]["median"] == 1.3
    assert ours["tokens_per_s"] == 333
    assert ours["mfu"] == 0.333
    assert ours["peak_vs_plan"] == 1.2


def test_batches_are_shared_without_rest():
    for job in [*JOBS.values(), *map(toy, JOBS.values())]:
        batch = 32 if job.lora else job.work.rows
        assert batch % job.usual == batch % job.tuned == 0


def test_an_unknown_job_is_refused():
    with pytest.raises(SystemExit, match="no job 7b; there are 124m"):
        parse(["--jobs", "7b"])


def test_without_a_gpu_only_toys_run(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.gpu.find_machine", lambda: {"device": "cpu", "name": "a processor"})
    assert main(["--jobs", "124m"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "there is no GPU here (a processor): --toy shows that all of it runs\n"


def test_without_a_known_peak_there_is_no_mfu(monkeypatch, capsys):
    machine = {"device": "cpu", "name": "a processor", "peak_flops": None}
    monkeypatch.setattr("benchmarks.gpu.find_machine", lambda: machine)
    table = summarise([{name: result(2.0) for name in CONTENDERS}])
    assert table["llmkit"]["mfu"] is None
    print_table({"machine": machine, "rounds": 1, "steps": 2, "toy": True, "jobs": {"124m": table}})
    assert "1.00 x trainer (goal 1.4)" in capsys.readouterr().out


@pytest.mark.slow
def test_all_of_it_runs_at_toy_size(tmp_path):
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.gpu",
        "--toy",
        "--json",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*words, "--jobs", "124m,lora-8b"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["jobs"]) == ["124m", "lora-8b"]
    for table in summary["jobs"].values():
        assert set(table) == set(CONTENDERS)
        assert table["llmkit"]["speed_vs_trainer"]["median"] > 0
        assert table["llmkit"]["peak_vs_plan"] > 0
        assert table["llmkit"]["mfu"] is None
