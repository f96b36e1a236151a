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


def tokenize(path, runs, *words, **options):
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "tokenize", str(path), "--runs", str(runs), *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_named_and_when_there_is_room_the_work_goes_on(tmp_path, small_disk, workers):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text that fills the disk\n" for number in range(400_000)))
    path = tmp_path / "recipe.json"
    section = {"vocab_size": 300, "sample": "100KB", "data": {"files": str(text)}, "held_out": 0}
    path.write_text(json.dumps({"llmkit": 1, "name": "killed", "tokenize": section}))
    code, said = tokenize(path, small_disk, "--workers", workers)
    assert code == 1
    assert "no space left on the disk while writing" in said
    assert "in a worker process" not in said
    subprocess.run(["mount", "-o", "remount,size=256m", str(small_disk)], check=True)
    assert tokenize(path, small_disk, "--workers", workers)[0] == 0
    assert tokenize(path, tmp_path / "roomy")[0] == 0
    assert content(small_disk) == content(tmp_path / "roomy")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_asked_to_stop_it_stops_and_goes_on_later(tmp_path, number, code):
    path = recipe(tmp_path)
    process = start(command(path, tmp_path / "stopped", 2))
    store = tmp_path / "stopped/.cache/text"
    deadline = time.monotonic() + 60
    while not [*store.glob("*.clean")] and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = _children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
