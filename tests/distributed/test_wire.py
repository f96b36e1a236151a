"""The bytes of a step on a real interface, between two network namespaces: what the plan says, and nothing hidden."""

import pytest

from benchmarks import communication
from benchmarks.communication import CONTENDERS, Work, lacking, measure

CONTROL_BYTES = 4000
"""What a step sends beside gradients or weights, with everything that TCP puts around it, at most."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_goes_over_the_wire_is_what_the_plan_says():
    missing = lacking()
    if missing:
        pytest.skip(missing)
    work = Work(preset="gpt-tiny", vocab_size=512, context=32)
    [found] = measure(work, None, 1)
    plain = found["plain"]["planned"]
    for name, row in found.items():
        assert 0.98 * row["planned"] < row["bytes"] < 1.05 * row["planned"] + CONTROL_BYTES, (name, row)
    assert set(found) == set(CONTENDERS)
    shares = {name: row["planned"] / plain for name, row in found.items()}
    assert shares["fp16"] == 0.5
    assert shares["accumulate 4"] == shares["local steps 4"] == 0.25
    assert shares["powersgd rank 4"] < 0.25


def test_without_the_tools_the_benchmark_says_what_gets_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks.communication"])
    monkeypatch.setattr(communication.signal, "signal", lambda *_: None)
    monkeypatch.setattr(communication.shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert communication.main() == 3
    assert "no tc here: apt-get install iproute2" in capsys.readouterr().err


def test_without_the_right_to_make_namespaces_the_benchmark_says_whose_words_those_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks.communication"])
    monkeypatch.setattr(communication.signal, "signal", lambda *_: None)
    monkeypatch.setattr(communication.shutil, "which", lambda tool: f"/sbin/{tool}")
    refused = communication.subprocess.CompletedProcess([], 1, "", "mount --make-shared /run/netns failed")
    monkeypatch.setattr(communication.subprocess, "run", lambda *_, **__: refused)
    assert communication.main() == 3
    said = capsys.readouterr().err
    assert "make-shared /run/netns failed" in said
    assert "need root on Linux" in said
