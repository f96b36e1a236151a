"""Where a tokenizer cuts text before it looks for its pieces, and how bytes are written as characters.

All cuts are regular expressions of the `tokenizers` library, so they are kept in tokenizer.json and any program
that reads it cuts alike. Every pattern matches every text completely: what lies between two matches is nothing.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from tokenizers import Regex, pre_tokenizers

# Qwen2's pattern, kept to the letter: letters of any script with at most one sign before them (so Han runs
# stay whole between punctuation marks and the algorithm finds the words in them), digits one by one (a small
# vocabulary has better uses than 1,110 numbers), and llama.cpp knows it, as `qwen2`.
RUNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# For learning alone: BPE's trainer goes through a whole run for each pair it merges in it, so one line of a million
# letters (base64, DNA) took minutes. Runs of ordinary text are far shorter; those are cut the same.
RUNS_TO_LEARN = RUNS.replace(r"\p{L}+", r"\p{L}{1,128}").replace(r"\s\p{L}\p{N}]+", r"\s\p{L}\p{N}]{1,128}")
RUNS_TO_LEARN = (
    RUNS_TO_LEARN.replace(r"\s+", r"\s{1,128}").replace(r"\s*", r"\s{0,128}").replace("]+", "]{1,128}")
)

# WordPiece takes the longest piece first, which costs the square of a run's length, and marks what continues a
# word with `##`: so runs are bounded, and a `#` stands alone (then no piece that begins a word begins with `##`).
_BOUNDED_END = r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}#]{1,16}[\r\n]{0,4}|\s{0,16}[\r\n]{1,8}|\s{1,16}(?!\S)|\s{1,16}"
BOUNDED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|#|[^\r\n\p{L}\p{M}\p{N}#]?[\p{L}\p{M}]{1,24}" + _BOUNDED_END

# The same, each Han character alone.
BOUNDED_HAN_ALONE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|#|\p{Han}|[^\r\n\p{L}\p{M}\p{N}#]?[\p{L}\p{M}&&\P{Han}]{1,24}"
    + _BOUNDED_END
)

# Words with the blank before them, runs of Han characters (a model finds the words in them), digits, single
# signs, line ends with the blanks before them, other blanks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{Han}+| ?[\p{L}\p{M}&&\P{Han}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_RUN_BYTES = 200
"""No match of a bounded pattern is longer in UTF-8, by a wide margin: 25 characters of at most 4 bytes."""

# A letter before a blank or a sign: no pattern of ours matches across, none looks behind, none looks ahead from a
# letter, and no Unicode form joins the two. So text cut there gives the ids of the whole.
_SAFE_CUT = re.compile("[A-Za-z\u4e00-\u9fff](?=[ \\n.,;:!?\uff0c\u3002\uff1b\uff1a\uff01\uff1f])")
_CUT_WINDOW = 1_000

_CHUNK_CHARS = 200_000
_BYTE_CHARS_BASE = 256


def splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that cuts text into the pattern's matches and loses nothing."""
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def byte_splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The same, and writes each byte of the pieces as one visible character (GPT-2's alphabet)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([splitter(pattern), byte_level])


@cache
def byte_chars() -> tuple[str, ...]:
    """The character that stands for each byte, by byte.

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onwards.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(_BYTE_CHARS_BASE, 2 * _BYTE_CHARS_BASE))
    return tuple(chr(byte if byte in visible else next(others)) for byte in range(256))


@cache
def byte_values() -> dict[str, int]:
    """The byte each of `byte_chars` stands for."""
    return {char: byte for byte, char in enumerate(byte_chars())}


def as_bytes_written(text: str) -> str:
    """The text as a byte-level model sees it: one character a byte."""
    chars = byte_chars()
    return "".join(chars[byte] for byte in text.encode())


def han_of(chars: Iterable[str]) -> set[str]:
    """Those of the characters that the patterns take for Han."""
    only_han = pre_tokenizers.Split(Regex(r"\P{Han}+"), behavior="removed")
    return {char for run, _ in only_han.pre_tokenize_str("".join(sorted(chars))) for char in run}


def chunks(texts: Iterable[str], normalise: Callable[[str], str] | None = None) -> Iterator[str]:
    """The texts in portions of bounded size, cut behind line ends or blanks where there are any.

    The `tokenizers` library keeps some 40 bytes for each byte of a text it works on, so one 100 MB line would
    need 4 GB.
    """
    for text in texts:
        start = 0
        while start < len(text):
            stop = _cut(text, start, start + _CHUNK_CHARS)
            yield normalise(text[start:stop]) if normalise else text[start:stop]
            start = stop


def is_ours(backend: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` cuts text by one of the patterns here, so that `portions` are safe."""
    rules = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    steps = rules.get("pretokenizers", [rules])
    pattern = steps[0].get("pattern", {}).get("Regex")
    later = [step.get("type") for step in steps[1:]]
    return pattern in (RUNS, BOUNDED, BOUNDED_HAN_ALONE, WORDS) and later in ([], ["ByteLevel"])


def portions(text: str, most_chars: int) -> Iterator[str]:
    """The text in parts of about `most_chars`, cut where that changes no ids of a tokenizer that `is_ours`.

    A part grows beyond where there is no such place, which in ordinary text is never far.
    """
    start = 0
    while start < len(text):
        stop = _safe_stop(text, start, start + most_chars) if start + most_chars < len(text) else len(text)
        yield text[start:stop]
        start = stop


def _safe_stop(text: str, start: int, wanted: int) -> int:
    near = [match.end() for match in _SAFE_CUT.finditer(text, max(start, wanted - _CUT_WINDOW), wanted)]
    if near:
        return near[-1]
    later = _SAFE_CUT.search(text, wanted)
    return later.end() if later else len(text)


def _cut(text: str, start: int, stop: int) -> int:
    if stop >= len(text):
        return len(text)
    behind = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start, stop)
    return behind if behind > start else stop
