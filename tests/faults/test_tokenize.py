"""`llmkit tokenize` killed at any moment and run again gives byte for byte what an uninterrupted run gives."""

import glob
import hashlib
import json
import random
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import pytest
from training import start

KILLS = 5
PART_BYTES = 400_000
STAGES = (".clean", ".lines", ".stripped", ".signed", "samples", ".parts")
"""What each part goes through, by what its place in the cache is called; some of it is taken away afterwards."""


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


IN_SMALL_PARTS = """
import sys
from llmkit.data import texts
from llmkit.data.pipeline import Stage

texts.SMALLEST_PART = {part_bytes}
make = Stage.__init__

def at_once(self, work, store, sizes, worth_bytes=0):
    make(self, work, store, sizes, 0)  # processes are started however little there is to do

Stage.__init__ = at_once
if __name__ == "__main__":
    from llmkit.cli import main
    sys.exit(main())
"""


def in_small_parts(folder, words):
    """The same command with parts so small that this text has a dozen of them, and workers in every stage."""
    script = folder / "small_parts.py"
    script.write_text(IN_SMALL_PARTS.format(part_bytes=PART_BYTES))
    assert words[1:3] == ["-m", "llmkit"]
    return [sys.executable, str(script), *words[3:]]


def published(cache):
    """The folders of parts, and of each the file that was written last, as the disk knows it."""
    found = {}
    for manifest in map(Path, glob.glob(f"{cache}/*/*/part-*/manifest.json")):
        with suppress(FileNotFoundError):  # a stage that is over takes its parts away
            status = manifest.stat()
            found[manifest.parent] = (status.st_ino, status.st_mtime_ns)
    return found


def is_whole(part):
    """Whether all its files are there: a kill may strike while a stage takes its parts away."""
    files = json.loads((part / "manifest.json").read_bytes())["files"]
    return all((part / name).is_file() for name in files)


class Watch:
    """Follows the parts of a cache over several runs; each is counted once, however often it is made.

    Attributes:
        seen: Every part that was ever seen, each making of it once.
        kept: What was there when the last run was killed.
    """

    def __init__(self, cache):
        self.cache = cache
        self.seen = set()
        self.kept = {}

    def look(self):
        """No part that was finished before a kill may be made again."""
        now = published(self.cache)
        again = [part for part, made in now.items() if self.kept.get(part, made) != made]
        assert not again, f"made again: {again}"
        self.seen |= now.items()

    def until(self, process, count):
        """Wait until so many parts have been seen; False if the run ended first."""
        deadline = time.monotonic() + 120
        while len({part for part, _ in self.seen}) < count:
            assert time.monotonic() < deadline
            if process.poll() is not None:
                return False
            time.sleep(0.002)
            self.look()
        return True

    def stages(self, before):
        """The stages of which parts were finished since."""
        return {part.parent.suffix or part.parent.parent.name for part, _ in self.seen - before}


@pytest.mark.slow
def test_killed_five_times_then_finished_equals_uninterrupted(tmp_path):
    path = recipe(tmp_path)
    small = in_small_parts(tmp_path, command(path, tmp_path / "whole", 2))
    whole = Watch(tmp_path / "whole/.cache")
    process = start(small)
    assert whole.until(process, 10**9) is False
    assert process.communicate() is not None
    assert process.returncode == 0
    expected = content(tmp_path / "whole")
    parts = -(-(tmp_path / "text.jsonl").stat().st_size // PART_BYTES)
    assert parts >= 10
    assert len([*(tmp_path / "whole/.cache/text").glob("*.clean/part-*")]) == parts

    watch = Watch(tmp_path / "killed/.cache")
    words = in_small_parts(tmp_path, command(path, tmp_path / "killed", 2))
    draw = random.Random(3)
    # Each kill in the midst of another stage, at a number of finished parts that no clock decides.
    stages = sorted(draw.sample(range(len(STAGES)), KILLS))
    struck = set()
    for stage in stages:
        place = stage * parts + draw.randrange(2, parts // 2)
        process = start(words)
        before = {*watch.seen}
        assert watch.until(process, place), (
            f"it ended before {place} parts were seen: {process.communicate()}"
        )
        workers = _children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        while any(map(_is_alive, workers)):
            time.sleep(0.01)
        watch.look()
        watch.kept = {part: made for part, made in published(watch.cache).items() if is_whole(part)}
        assert len(watch.kept) > 0
        struck |= watch.stages(before)
    assert struck >= {STAGES[stage] for stage in stages}
    assert struck <= {*STAGES}
    process = start(words)
    watch.until(process, 10**9)
    said = process.communicate()
    assert process.returncode == 0, said
    watch.look()
    assert content(tmp_path / "killed") == expected


@pytest.mark.slow
def test_neither_workers_nor_parts_show_in_the_result(tmp_path):
    path = recipe(tmp_path)
    words = in_small_parts(tmp_path, command(path, tmp_path / "parts", 2))
    assert subprocess.run(words, check=False).returncode == 0
    assert subprocess.run(command(path, tmp_path / "alone", 1), check=False).returncode == 0
    assert content(tmp_path / "parts") == content(tmp_path / "alone")


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


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
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
