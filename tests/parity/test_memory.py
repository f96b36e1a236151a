"""Memory: bounded on a corpus far larger than it (five gigabytes by default), and as planned while training."""

import os
import sys

import pytest

from benchmarks import memory, plan_memory


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_large_corpus_stays_under_two_gigabytes(tmp_path, capfd):
    """`LLMKIT_MEMORY_TEST=200MB python -m pytest -m slow tests/parity/test_memory.py` is a quicker one."""
    size = os.environ.get("LLMKIT_MEMORY_TEST", "5GB")
    assert memory.main(["--size", size, "--keep", str(tmp_path)]) == 0
    assert '"exit_code": 0' in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_check_can_fail(tmp_path):
    assert memory.main(["--size", "5MB", "--limit", "50MB", "--keep", str(tmp_path)]) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator's share is that of glibc")
@pytest.mark.parametrize("cell", list(plan_memory.CELLS))
def test_a_run_holds_what_its_plan_says(cell, tmp_path):
    row = plan_memory.measure(cell, plan_memory.CELLS[cell], tmp_path)
    assert plan_memory.is_as_planned(row), row


def test_a_plan_that_is_too_low_is_found():
    assert plan_memory.is_as_planned({"cell": "narrow-fp32", "off": 0.09})
    assert not plan_memory.is_as_planned({"cell": "narrow-fp32", "off": 0.11})
    assert plan_memory.is_as_planned({"cell": "tuned-cls", "off": 0.3})
    assert not plan_memory.is_as_planned({"cell": "tuned-cls", "off": -0.11})
