"""A corpus of any size for benchmarks, from real text of this machine: one JSON line a document.

    python -m benchmarks.corpus OUT.jsonl --size 100MB [--text FOLDER] [--seed 0] [--planted]

The text comes from the Python standard library (its sources, and its docstrings as prose), or from the .txt, .md,
.rst, .py, .html and .json files of `--text`. It is cut into paragraphs, and each document takes up runs of
neighbouring paragraphs until it has its length: log-normal, median 2.1 KB, mean 2.9 KB.

When all paragraphs were used, they come again in another order, in other company: documents stay distinct (at 5 GB
all but 14 of 1.6 million are). But text that merely repeats would hold ever fewer words that are new, and an encoder
that remembers words would look faster than it is. In real text the number of different words grows with a power of
the length (Heaps' law). That power b is measured on the text itself, and in pass p the rarest `p^b - (p-1)^b` of its
words are spelt anew: the front of the word and the back of another one, the same all through a pass. So new words
come as often as in real text, and frequent words keep their frequency. (Lines and phrases do come again: measure the
search for copies elsewhere.)

The same arguments and the same Python give the same bytes. Memory depends on the base text (at most 64 MB of it are
taken), not on the size. `--planted` also strews in documents of `benchmarks.planted`: copies, near copies, personal
data and so on, one in ten, with their labels in the field `planted`.
"""

import argparse
import ast
import hashlib
import html
import json
import math
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BASE_BYTES = 64_000_000
ENDINGS = (".txt", ".md", ".rst", ".py", ".html", ".json")
MEDIAN_CHARS, SIGMA, LONGEST = 1_500, 0.95, 200_000
MAX_RUN = 4  # neighbouring paragraphs that stay together
SHARE_PLANTED = 0.1
_WORD = re.compile(r"[^\W\d_]+")
_MARKUP = re.compile(r"<(?:script|style)\b.{0,100000}?</(?:script|style)>|<[^<>]{0,2000}>", re.DOTALL | re.I)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Paragraph:
    """A piece of text and where its rarer words stand: (start, end, rank), rank 0 is the rarest word of all."""

    text: str
    rare: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Base:
    """The text that documents are made of.

    Attributes:
        paragraphs: In the order of the files.
        words: The words that may be spelt anew, rarest first; `Paragraph.rare` holds places in this list.
        num_words: All different words.
        exponent: Heaps' exponent, as measured on this text.
    """

    paragraphs: list[Paragraph]
    words: list[str]
    num_words: int
    exponent: float

    def num_new(self, number: int) -> int:
        """How many words pass `number` (from 1) brings in by Heaps' law, beyond what was there."""
        if number == 1:
            return 0
        share = number**self.exponent - (number - 1) ** self.exponent
        return min(len(self.words), round(share * self.num_words))


# --- the base text ---------------------------------------------------------------------------------------------------


def base_texts(folder: Path | None, seed: int) -> Iterator[str]:
    """Texts of the files, in an order that depends on their names and the seed only, up to 64 MB."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    endings = ENDINGS if folder else (".py",)
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    names = [
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix in endings and not skipped.intersection(path.parts) and path.is_file()
    ]
    total = 0
    for name in sorted(names, key=lambda n: _digest(seed, n.as_posix())):
        for text in _texts_of(root / name):
            yield text
            total += len(text.encode())
        if total >= MAX_BASE_BYTES:
            return
    if not names:
        raise SystemExit(f"{root}: no files ending in {', '.join(endings)}")


def _texts_of(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # the library's tests have files that are meant to be broken
        return
    if path.suffix == ".py":
        yield text
        yield _docstrings(text)
    elif path.suffix == ".html":
        yield html.unescape(_MARKUP.sub(" ", text))
    elif path.suffix == ".json":
        yield "\n\n".join(_strings(json.loads(text)))
    else:
        yield text


def _docstrings(source: str) -> str:
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def _strings(value: Any) -> Iterator[str]:
    """All text in a JSON value; the lines of a list of text stay together."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(v, str) for v in value):
        yield "\n".join(value)
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _paragraphs(text: str) -> Iterator[str]:
    """Pieces between blank lines, long ones cut at line ends, short ones joined to what follows."""
    held = ""
    for piece in re.split(r"\n[ \t]*\n+", text):
        for start in range(0, len(piece), 3_000):
            held = f"{held}\n\n{piece[start : start + 3_000]}" if held else piece[start : start + 3_000]
            if len(held) >= 200:
                yield held.strip("\n")
                held = ""
    if held.strip():
        yield held.strip("\n")


def make_base(folder: Path | None = None, seed: int = 0) -> Base:
    """Read the base text and count its words."""
    texts = list(
        dict.fromkeys(p for text in base_texts(folder, seed) for p in _paragraphs(text) if p.strip())
    )
    counts, half = _count(texts, seed)
    exponent = math.log2(len(counts) / half)
    # Ties are broken by a hash, so that a word's spelling has no say in whether it stays.
    ranked = sorted(counts, key=lambda w: (counts[w], _digest(seed, w)))
    words = [w for w in ranked[: round(len(ranked) * 0.9)] if len(w) >= 4]
    ranks = {word: rank for rank, word in enumerate(words)}
    paragraphs = [
        Paragraph(
            text, tuple((m.start(), m.end(), ranks[m[0]]) for m in _WORD.finditer(text) if m[0] in ranks)
        )
        for text in texts
    ]
    return Base(paragraphs, words, len(counts), exponent)


def _count(texts: Sequence[str], seed: int) -> tuple[Counter[str], int]:
    """How often each word stands in all texts, and the different words in a random half of them."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    total, half = sum(map(len, shuffled)), 0
    counts: Counter[str] = Counter()
    done = 0
    for text in shuffled:
        if not half and done >= total / 2:
            half = len(counts)
        counts.update(_WORD.findall(text))
        done += len(text)
    return counts, half or len(counts)


# --- the corpus ------------------------------------------------------------------------------------------------------


def documents(base: Base, seed: int = 0) -> Iterator[str]:
    """Documents without end."""
    rng = random.Random(f"documents {seed}")
    wanted, parts, size, runs = _length(rng), list[str](), 0, 0
    for text, begins in _stream(base, rng, seed):
        parts.append(text)
        size += len(text) + 2
        runs += begins and len(parts) > 1
        # Paragraphs from two places: neighbours alone might make up a document in another pass too.
        if size >= wanted and runs:
            yield "\n\n".join(parts)
            wanted, parts, size, runs = _length(rng), [], 0, 0


def _length(rng: random.Random) -> int:
    return min(LONGEST, max(200, round(rng.lognormvariate(math.log(MEDIAN_CHARS), SIGMA))))


def _stream(base: Base, rng: random.Random, seed: int) -> Iterator[tuple[str, bool]]:
    """Paragraphs and whether one begins a run: pass after pass, in runs of neighbours, in another order each time."""
    number = 0
    while True:
        number += 1
        spelling = _spelling(base, seed, number)
        starts = list(_runs(len(base.paragraphs), rng))
        rng.shuffle(starts)
        for start, stop in starts:
            for place in range(start, stop):
                yield _spelt(base.paragraphs[place], spelling), place == start


def _runs(count: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    start = 0
    while start < count:
        stop = min(count, start + rng.randint(1, MAX_RUN))
        yield start, stop
        start = stop


def _spelling(base: Base, seed: int, number: int) -> list[str]:
    """The new words of a pass, by rank."""
    rng = random.Random(f"spelling {seed} {number}")
    # A back is taken from a word of the same sort: Latin letters do not end in Han ones.
    backs: dict[bool, list[str]] = {True: [], False: []}
    for word in base.words:
        backs[word.isascii()].append(word)
    new = []
    for word in base.words[: base.num_new(number)]:
        other = rng.choice(backs[word.isascii()])
        joined = word[: rng.randint(2, len(word) - 1)] + other[len(other) // 2 :].lower()
        new.append(joined if joined != word else joined + other[-1].lower())
    return new


def _spelt(paragraph: Paragraph, spelling: list[str]) -> str:
    if not spelling:
        return paragraph.text
    pieces, done = list[str](), 0
    for start, end, rank in paragraph.rare:
        if rank < len(spelling):
            pieces += (paragraph.text[done:start], spelling[rank])
            done = end
    return "".join((*pieces, paragraph.text[done:]))


def rows(base: Base, seed: int = 0, *, planted: bool = False) -> Iterator[dict[str, Any]]:
    """JSON rows without end: `text`, and `planted` where a document was planted."""
    stream = documents(base, seed)
    if not planted:
        yield from ({"text": text} for text in stream)
        return
    from benchmarks.planted import make_planted

    rng = random.Random(f"planted {seed}")
    number = 0
    while True:
        number += 1
        for document in make_planted([next(stream) for _ in range(200)], seed=seed * 1_000_003 + number):
            yield (
                {"text": document.text, "planted": document.label}
                if document.label
                else {"text": document.text}
            )
            for _ in range(round(rng.expovariate(SHARE_PLANTED)) if document.label else 0):
                yield {"text": next(stream)}


def write_corpus(
    path: Path, size: int, *, folder: Path | None = None, seed: int = 0, planted: bool = False
) -> dict[str, Any]:
    """Write at least `size` bytes of JSON lines (one document more than fits); return its figures."""
    base = make_base(folder, seed)
    temporary = path.with_name(path.name + ".part")
    written = count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb", buffering=1 << 20) as file:
        for row in rows(base, seed, planted=planted):
            written += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
            if written >= size:
                break
    temporary.replace(path)
    base_chars = sum(len(p.text) for p in base.paragraphs)
    return {
        "bytes": written,
        "documents": count,
        "base_chars": base_chars,
        "passes": round(written / base_chars, 2),
        "heaps_exponent": round(base.exponent, 3),
    }


def bytes_of(text: str) -> int:
    """`100MB` as a number.

    Raises:
        argparse.ArgumentTypeError: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 100MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _digest(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=bytes_of, default=bytes_of("100MB"), help="such as 100MB (default)")
    parser.add_argument("--text", type=Path, help="a folder of text instead of Python's library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--planted", action="store_true", help="strew in documents that preparation should find"
    )
    asked = parser.parse_args(given)
    figures = write_corpus(asked.out, asked.size, folder=asked.text, seed=asked.seed, planted=asked.planted)
    print(json.dumps(figures), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
