"""metrics.jsonl and samples.jsonl: a resumed run leaves the records of an uninterrupted one."""

import json
import math
from pathlib import Path

import pytest

from llmkit.errors import CorruptError
from llmkit.report.run_log import RunLog, read_metrics, read_samples


def write_steps(folder: Path, start: int, stop: int) -> None:
    """What a run writes: a step's record when it is made, and what is due at a step on arriving there."""
    with RunLog(folder, start) as log:
        for step in range(start, stop + 1):
            if step > start:
                log.metrics({"step": step, "train/loss": 1 / step})
            if step % 5 == 0 and step:
                log.metrics({"step": step, "eval/loss": 2 / step})
                log.sample(step, "从前\u2028", f"text\n{step}")


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "metrics.jsonl").read_bytes(), (folder / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [b"", b'{"step": 13, "tr', b"\x00" * 40, '{"text": "从'.encode()[:-1]])
@pytest.mark.parametrize("killed_at", [10, 12, 15])
def test_resumed_equals_uninterrupted(tmp_path: Path, killed_at: int, torn: bytes) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_steps(whole, 0, 20)
    write_steps(parts, 0, killed_at)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (parts / name).open("ab") as file:
            file.write(torn)
    write_steps(parts, 10, 20)
    assert contents(parts) == contents(whole)


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    RunLog(tmp_path, 2).close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    assert path.read_bytes().endswith(b"\n")


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 5)
    RunLog(tmp_path, 0).close()
    assert contents(tmp_path) == (b"", b"")


def test_what_was_measured_at_the_resumed_step_is_measured_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 5)
    RunLog(tmp_path, 5).close()
    assert read_metrics(tmp_path)[-1] == {"step": 5, "train/loss": 0.2}
    assert read_samples(tmp_path) == []


def test_every_record_can_be_read_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics({"step": 1, "train/loss": math.nan, "grad": math.inf})
        log.sample(1, "p", "broken \ud800 text")
        log.sync()
        assert read_metrics(tmp_path) == [{"step": 1, "train/loss": None, "grad": None}]
        assert read_samples(tmp_path) == [{"step": 1, "prompt": "p", "text": "broken \ud800 text"}]


def test_records_are_strict_json(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics({"step": 1, "x": math.nan})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_reading_leaves_out_a_torn_last_line_and_names_a_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(CorruptError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(tmp_path)
    assert read_samples(tmp_path) == []


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match="needs a step"):
        log.metrics({"loss": 1.0})
