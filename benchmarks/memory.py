"""The most memory that `llmkit tokenize` ever holds on a large corpus, all its processes together.

    python -m benchmarks.memory [--size 5GB] [--limit 2GB] [--workers 2] [--prepare] [--keep FOLDER]

Makes a corpus of that size (`benchmarks.corpus`), learns a tokenizer of 8,000 entries from a sample of it and
encodes all of it; with `--prepare` it normalises, marks personal data and takes out lines, copies and near copies
first. Ten times a second the proportional set sizes (PSS, Linux) of the command and its workers are added up. Prints
one JSON line and fails when the peak passes the limit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.corpus import bytes_of, write_corpus

PREPARE = {"normalise": {}, "personal_data": {}, "duplicates": {"lines": 1000, "near": {}}}


def main(arguments: list[str] | None = None) -> int:
    """Measure; 0 when the peak stayed under the limit."""
    parser = argparse.ArgumentParser(description="Peak memory of llmkit tokenize.")
    parser.add_argument("--size", default="5GB")
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--keep", type=Path, help="make and keep the corpus here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        corpus = folder / f"corpus-{given.size}.jsonl"
        if not corpus.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_corpus(corpus, bytes_of(given.size))
        figures = measure(corpus, Path(temporary), workers=given.workers, prepare=given.prepare)
    limit = bytes_of(given.limit)
    print(json.dumps({"size": given.size, **figures, "limit_bytes": limit}))
    return int(figures["exit_code"] != 0 or figures["peak_bytes"] > limit)


def measure(corpus: Path, folder: Path, *, workers: int, prepare: bool) -> dict[str, float]:
    """Run the command on the corpus and watch its memory."""
    section = {"vocab_size": 8000, "data": {"files": str(corpus)}, "prepare": PREPARE if prepare else {}}
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({"llmkit": 1, "name": "memory", "tokenize": section}))
    words = ["tokenize", str(recipe), "--runs", str(folder / "runs"), "-q", "--workers", str(workers)]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "llmkit", *words], stdout=sys.stderr)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_held_bytes, _tree(process.pid))))
        time.sleep(0.1)
    return {
        "exit_code": process.returncode,
        "peak_bytes": peak,
        "corpus_bytes": corpus.stat().st_size,
        "seconds": round(time.monotonic() - started, 1),
        "workers": workers,
    }


def _tree(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                found += _tree(int(child))
        except OSError:  # it has just ended
            continue
    return found


def _held_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    sys.exit(main())
