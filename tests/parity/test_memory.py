"""Memory stays bounded on a corpus far larger than it: five gigabytes by default, minutes of work."""

import os
import sys

import pytest

from benchmarks import memory


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
