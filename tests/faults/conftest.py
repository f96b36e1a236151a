"""What tests of faults share."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """Four megabytes of real file system, full when they are."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def in_memory(tmp_path):
    """A folder in memory where the system has such a place: an fsync costs nothing there, and faults are the same."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="llmkit-test-") as folder:
        yield Path(folder)
