"""`llmkit tokenize` killed at any moment and run again gives byte for byte what an uninterrupted run gives."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from training import start

KILLS = 5


def recipe(folder):
    """Real text with copies in it, prepared in every way that needs more than one pass."""
    library = Path(sysconfig.get_paths()["stdlib"])
    with (folder / "text.jsonl").open("w") as file:
        for number, path in enumerate(sorted(library.glob("*.py"))):
            text = path.read_text(encoding="utf-8")
            for begin in range(0, len(text), 3000):
                file.write(json.dumps({"text": text[begin : begin + 3000]}) + "\n")
            if number % 10 == 0:
                file.write(json.dumps({"text": text[:3000]}) + "\n")
    made = {
        "llmkit": 1,
        "name": "killed",
        "tokenize": {
            "vocab_size": 1000,
            "sample": "1MB",
            "data": {"files": str(folder / "text.jsonl")},
            "prepare": {
                "normalise": {},
                "filter": {"min_chars": 200},
                "personal_data": {},
                "duplicates": {"lines": 200, "near": {}},
            },
        },
    }
    (folder / "recipe.json").write_text(json.dumps(made))
    return folder / "recipe.json"


def command(path, runs, workers):
    return [
        sys.executable,
        "-m",
        "llmkit",
        "tokenize",
        str(path),
        "--runs",
        str(runs),
        "-q",
        "--workers",
        str(workers),
    ]


def content(runs):
    """The hash of every file that training reads, by its place."""
    cache = runs / ".cache"
    found = [*cache.glob("shards/*/*.npy"), *(runs / "killed/tokenize/tokenizer").glob("*.json")]
    found = [path for path in found if path.name != "manifest.json"]
    assert len(found) >= 4
    return {
        str(path.relative_to(runs)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)
    }


@pytest.mark.slow
def test_killed_at_random_then_finished_equals_uninterrupted(tmp_path):
    path = recipe(tmp_path)
    begun = time.monotonic()
    assert subprocess.run(command(path, tmp_path / "whole", 2), check=False).returncode == 0
    took = time.monotonic() - begun
    assert subprocess.run(command(path, tmp_path / "alone", 1), check=False).returncode == 0
    expected = content(tmp_path / "whole")
    assert content(tmp_path / "alone") == expected
    draw = random.Random(3)
    kills = 0
    for _ in range(KILLS):
        process = start(command(path, tmp_path / "killed", 2))
        try:
            process.wait(timeout=draw.uniform(0.2, 0.9) * took)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 3
    assert subprocess.run(command(path, tmp_path / "killed", 2), check=False).returncode == 0
    assert content(tmp_path / "killed") == expected
