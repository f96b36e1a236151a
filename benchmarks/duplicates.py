"""Near-duplicate removal on planted copies: recall and precision against datasketch, time and memory of deciding.

    python -m benchmarks.duplicates [--documents 400] [--english FILE ...] [--chinese FILE ...] [--json]
    python -m benchmarks.duplicates --signatures 1000000

The first form takes documents of 200 words from English text (by default the docstrings of Python's standard library)
and, if files are named, of 300 characters from Chinese text. Of each it makes copies in which a share of the words was
replaced, inserted or deleted, and lets llmkit and datasketch find them, each by its own words and hashes but with the
same shingles, permutations and threshold. A pair counts as a true near copy when the exact Jaccard similarity of its
shingles reaches the threshold. datasketch answers with the candidates of its LSH index, which it does not check;
"checked" is the same with the signatures of the candidates compared.

The second form makes random signatures, 30 % of them near copies of others, writes them to a temporary file, and
reports the seconds and the memory that deciding takes.
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.duplicates.exact import document_keys
from llmkit.data.duplicates.near import Signer, near_copies
from llmkit.data.words import word_tokens
from llmkit.recipe.preparation import NearDuplicates

EDITS = (0.01, 0.05, 0.1, 0.2, 0.4)
Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class Planted:
    """Texts, of which number 2i+1 is an edited copy of number 2i."""

    language: str
    edited: float
    texts: list[str]


def plant(language: str, words: Sequence[str], edited: float, *, documents: int, seed: int = 0) -> Planted:
    """Documents cut one after another from the words, and an edited copy of each."""
    rng = random.Random(f"{seed} {language} {edited}")
    size, joint = (200, " ") if language == "English" else (300, "")
    texts = []
    for start in range(0, min(len(words) - size + 1, documents * size), size):
        original = list(words[start : start + size])
        texts += [joint.join(original), joint.join(edit(original, edited, words, rng))]
    return Planted(language, edited, texts)


def edit(words: Sequence[str], share: float, others: Sequence[str], rng: random.Random) -> list[str]:
    """A copy of the words in which about that share was replaced (half), deleted or inserted (a quarter each)."""
    copy: list[str] = []
    for word in words:
        if rng.random() >= share:
            copy.append(word)
            continue
        kind = rng.randrange(4)
        copy += {0: [], 1: [word, rng.choice(others)]}.get(kind, [rng.choice(others)])
    return copy


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    """Every run of so many words, or all words of a shorter text."""
    words = word_tokens(text)
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    """The share of what two sets have in common."""
    return len(left & right) / len(left | right)


def true_pairs(planted: Planted, spec: NearDuplicates) -> Pairs:
    """The pairs of all documents whose exact similarity reaches the threshold, found over common shingles."""
    sets = [shingles(text, spec.ngram) for text in planted.texts]
    places: dict[tuple[str, ...], list[int]] = {}
    for number, found in enumerate(sets):
        for shingle in found:
            places.setdefault(shingle, []).append(number)
    meeting = {(a, b) for where in places.values() if len(where) < 100 for a in where for b in where if a < b}
    return {(a, b) for a, b in meeting if jaccard(sets[a], sets[b]) >= spec.threshold}


def by_llmkit(planted: Planted, spec: NearDuplicates) -> tuple[Pairs, float]:
    """The planted pairs that llmkit takes for near copies when it sees all documents; and the seconds."""
    start = time.perf_counter()
    texts = planted.texts
    signatures, keys = Signer(spec).sign(texts), document_keys(texts)
    lengths = np.array([len(text) for text in texts])
    everything = near_copies([signatures], [lengths], [keys], [np.ones(len(texts), bool)], spec)[0]
    seconds = time.perf_counter() - start
    found = set()
    for number in np.flatnonzero(~everything).tolist():
        two = [number & ~1, number | 1]
        alone = near_copies([signatures[two]], [lengths[two]], [keys[two]], [np.ones(2, bool)], spec)[0]
        if not alone.all():
            found.add((two[0], two[1]))
    return found, seconds


def by_datasketch(planted: Planted, spec: NearDuplicates, *, checked: bool) -> tuple[Pairs, float]:
    """The same by datasketch's MinHash and MinHashLSH."""
    from datasketch import MinHash, MinHashLSH

    start = time.perf_counter()
    index = MinHashLSH(threshold=spec.threshold, num_perm=spec.permutations)
    sketches = []
    found: Pairs = set()
    for number, text in enumerate(planted.texts):
        sketch = MinHash(num_perm=spec.permutations)
        sketch.update_batch([" ".join(shingle).encode() for shingle in shingles(text, spec.ngram)])
        for other in index.query(sketch):
            if not checked or sketch.jaccard(sketches[other]) >= spec.threshold:
                found.add((other, number))
        index.insert(number, sketch)
        sketches.append(sketch)
    return found, time.perf_counter() - start


def scores(found: Pairs, true: Pairs) -> tuple[float, float]:
    """Recall and precision; 1 where there is nothing to find, or nothing found."""
    hits = len(found & true)
    return hits / len(true) if true else 1.0, hits / len(found) if found else 1.0


def docstring_words() -> list[str]:
    """The words of the docstrings of Python's standard library, none of them twice."""
    texts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.setdefault(ast.get_docstring(node) or "")
    return " ".join(texts).split()


def table(planted: Sequence[Planted], spec: NearDuplicates) -> Iterator[dict[str, object]]:
    """One row for each set of planted copies."""
    for one in planted:
        true = true_pairs(one, spec)
        own = {(2 * i, 2 * i + 1) for i in range(len(one.texts) // 2)}
        similar = [jaccard(*(shingles(one.texts[i], spec.ngram) for i in pair)) for pair in sorted(own)]
        row: dict[str, object] = {
            "text": one.language,
            "edited": one.edited,
            "pairs": len(own),
            "mean_jaccard": round(float(np.mean(similar)), 3),
            "true": len(true & own),
        }
        ways: dict[str, Callable[[], tuple[Pairs, float]]] = {
            "llmkit": lambda one=one: by_llmkit(one, spec),
            "datasketch": lambda one=one: by_datasketch(one, spec, checked=False),
            "datasketch_checked": lambda one=one: by_datasketch(one, spec, checked=True),
        }
        for name, way in ways.items():
            found, seconds = way()
            recall, precision = scores(found & own, true & own)
            row[name] = {
                "recall": round(recall, 3),
                "precision": round(precision, 3),
                "found": len(found & own),
                "seconds": round(seconds, 3),
            }
        yield row


def decide_many(number: int, spec: NearDuplicates) -> dict[str, object]:
    """Seconds and peak memory of deciding over random signatures in a memory-mapped file, 30 % near copies."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        shape, step = (number, spec.permutations), 50_000
        made = np.memmap(Path(folder, "signatures"), np.uint32, "w+", shape=shape)
        for start in range(0, number, step):
            made[start : start + step] = rng.integers(0, 2**32, made[start : start + step].shape, np.uint32)
        copies = int(number * 0.3)
        for start in range(0, copies, step):
            rows = np.array(made[number - copies + start : number - copies + min(start + step, copies)])
            changed = rng.random(rows.shape) < 0.1
            rows[changed] = rng.integers(0, 2**32, int(changed.sum()), np.uint32)
            made[start : start + len(rows)] = rows
        made.flush()
        stored = np.memmap(Path(folder, "signatures"), np.uint32, "r", shape=shape)
        parts = [stored[start : start + step] for start in range(0, number, step)]
        lengths = [rng.integers(100, 5000, len(part)) for part in parts]
        keys = [rng.integers(0, 2**64, (len(part), 2), np.uint64) for part in parts]
        keep = [np.ones(len(part), bool) for part in parts]
        with Peak() as peak:
            start_s = time.perf_counter()
            kept = near_copies(parts, lengths, keys, keep, spec)
            seconds = time.perf_counter() - start_s
    return {
        "signatures": number,
        "seconds": round(seconds, 2),
        "peak_bytes": peak.bytes,
        "bytes_a_document": round(peak.bytes / number, 1),
        "kept_ratio": round(sum(int(mask.sum()) for mask in kept) / number, 4),
    }


class Peak:
    """The memory that the process takes in addition, without pages of mapped files (Linux)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = 0

    def __enter__(self) -> "Peak":
        self._before = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, self._now() - self._before)

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--permutations", type=int, default=128)
    parser.add_argument("--english", type=Path, nargs="+")
    parser.add_argument("--chinese", type=Path, nargs="+")
    parser.add_argument("--signatures", type=int, help="only decide over so many random signatures")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    spec = NearDuplicates(threshold=asked.threshold, permutations=asked.permutations)
    if asked.signatures:
        print(json.dumps(decide_many(asked.signatures, spec)))
        return
    words = {"English": docstring_words()}
    if asked.english:
        words["English"] = " ".join(path.read_text("utf-8") for path in asked.english).split()
    if asked.chinese:
        text = "".join(path.read_text("utf-8") for path in asked.chinese)
        words["Chinese"] = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    planted = [
        plant(language, found, edited, documents=asked.documents)
        for language, found in words.items()
        for edited in EDITS
    ]
    rows = list(table(planted, spec))
    if asked.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    show(rows)


def show(rows: Sequence[dict[str, object]]) -> None:
    """The rows as a Markdown table."""
    names = ("llmkit", "datasketch", "datasketch_checked")
    print("| text | words edited | mean Jaccard | copies above threshold |", " | ".join(names), "| speed |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        cells = [_cell(row[name], row["true"]) for name in names]
        speed = row["datasketch"]["seconds"] / row["llmkit"]["seconds"]  # type: ignore[index]
        print(
            f"| {row['text']} | {row['edited']:.0%} | {row['mean_jaccard']} | {row['true']} of {row['pairs']} |",
            " | ".join(cells),
            f"| {speed:.0f} x |",
        )


def _cell(result: Any, true: object) -> str:
    if not true:  # neither recall nor precision means anything
        return f"{result['found']} found"
    return f"{result['recall']:.3f} / {result['precision']:.3f}"


if __name__ == "__main__":
    main()
