"""Words of any script and 64-bit hashes of them, in numpy: what shingles and n-grams are made of.

What a word is, by script:

- **Letters and digits** (Latin, Cyrillic, Greek, Arabic, Devanagari, ...): a run of them. Hangul too: Korean is
  written with spaces.
- **Han, kana, Bopomofo, Yi, Thai, Lao, Khmer, Myanmar, Tai, Javanese and other scripts without spaces**: every
  character is a word.
- **Everything else** (punctuation, symbols, emoji, white space, control characters) parts words and is not seen.

Upper and lower case are one, and so are a letter with and without accents or other marks, full and half width, and
whether a letter was written composed or not: each character is folded to one character, marks and invisible
characters (soft hyphen, zero-width joiner and space) are passed over. So `Café`, `cafe` and `ＣＡＦÉ` are one word.
A character that folds to several counts as the first of them (`ß` as `s`, the ligature `ﬁ` as `f`).

A hash depends on the text alone: not on the process, the platform or Python's hash seed. It does depend on the Unicode
tables of the running Python where characters are newer than them; `RULES` names both and belongs into every identity.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]

RULES = f"words 1, unicode {unicodedata.unidata_version}"

_BLOCK = 2**16
"""Characters hashed at once: the tables of powers stay in the processor's cache. A longer word is cut."""

# Class of a character.
_PARTS, _JOINS, _ALONE, _IGNORED = 0, 1, 2, 3

_ALONE_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # Han radicals
    (0x3005, 0x3007),  # Han iteration mark, closing mark, zero
    (0x3021, 0x312F),  # Hangzhou numerals, kana, Bopomofo
    (0x31A0, 0x31BF),  # Bopomofo extended
    (0x31F0, 0x31FF),  # kana phonetic extensions
    (0x3400, 0x4DBF),  # Han extension A
    (0x4E00, 0x9FFF),  # Han
    (0xA000, 0xA48F),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar extended B
    (0xAA60, 0xAADF),  # Myanmar extended A, Tai Viet
    (0xF900, 0xFAFF),  # Han compatibility
    (0xFF66, 0xFF9F),  # half-width kana
    (0x1AFF0, 0x1B16F),  # kana supplements
)
_HAN_PLANES = range(0x20000, 0x40000)
_TABLED = 0x20000  # planes 0 and 1; of what lies above only Han and marks count
_HIGH_MARKS = (0xE0000, 0xE01EF)  # tags and variation selectors

# Odd, so that they have inverses modulo 2**64; drawn once by chance.
_CHARACTER_BASE = 0x9E6C63D0676A9A99
_WORD_BASE = 0xD6E8FEB86659FD93


def word_tokens(text: str) -> list[str]:
    """The words of a text in order, folded as the module says."""
    words: list[str] = []
    for folded, starts, ends, _ in _blocks(text):
        characters = folded.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        words += [characters[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return words


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, Integers]:
    """Hashes of the words of several texts, one after another.

    Args:
        texts: The texts; many small ones are hashed much faster together than one by one.

    Returns:
        The hashes of all words, uint64 [words], and how many belong to each text, int64 [texts].
    """
    begins = np.fromiter(accumulate((len(text) + 1 for text in texts), initial=0), np.int64, len(texts) + 1)
    found = [
        (_hashed(folded, starts, ends), places) for folded, starts, ends, places in _blocks("\n".join(texts))
    ]
    if not found:
        return np.empty(0, np.uint64), np.zeros(len(texts), np.int64)
    edges = np.searchsorted(np.concatenate([places for _, places in found]), begins)
    return np.concatenate([hashes for hashes, _ in found]), np.diff(edges)


def hash_blocks(text: str) -> Iterator[Hashes]:
    """The hashes of a text's words, some ten thousand at a time: memory does not grow with the text."""
    for folded, starts, ends, _ in _blocks(text):
        yield _hashed(folded, starts, ends)


def runs(words: Hashes, sizes: Sequence[int]) -> Iterator[tuple[int, Hashes]]:
    """Hashes of all runs of so many consecutive words.

    Args:
        words: Hashes of the words, uint64 [words].
        sizes: The lengths wanted, ascending; computing one gives the shorter ones on the way.

    Yields:
        A length and the hashes of the runs of that length, uint64 [words - length + 1]; run i begins at word i.
        Lengths over the number of words are left out.
    """
    for size, found in _rolled(words, sizes):
        yield size, scrambled(found)


def _rolled(words: Hashes, sizes: Sequence[int]) -> Iterator[tuple[int, Hashes]]:
    wanted = set(sizes)
    rolling = words + np.uint64(0)
    for size in range(1, min(max(wanted, default=0), len(words)) + 1):
        if size > 1:
            rolling = rolling[:-1] * np.uint64(_WORD_BASE)
            rolling += words[size - 1 :]
        if size in wanted:
            yield size, rolling


def run_blocks(text: str, sizes: Sequence[int]) -> Iterator[Hashes]:
    """The hashes of a text's runs block by block, as `runs` gives them: memory does not grow with the text.

    Within a block the shorter runs come before the longer ones. Runs of the largest size come once each and in order;
    the last of the shorter ones come again with the next block.
    """
    carried = np.empty(0, np.uint64)
    for words in hash_blocks(text):
        words = np.concatenate((carried, words)) if len(carried) else words
        found = [hashes for _, hashes in _rolled(words, sizes)]
        if found:
            yield scrambled(np.concatenate(found))
        carried = words[max(0, len(words) - max(sizes) + 1) :]


def scrambled(values: Hashes) -> Hashes:
    """Each 64-bit value with its bits mixed (one to one), so that any of them can be used by themselves.

    **Source**: the finaliser of SplitMix64; Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", section 5.
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _blocks(text: str) -> Iterator[tuple[NDArray[Any], Integers, Integers, Integers]]:
    """The words block by block: folded characters, where in them words start and end, where in the text they start."""
    at = 0
    while at < len(text):
        piece = text[at : at + _BLOCK]
        folded, starts, ends, places = _words(piece)
        taken = len(piece)
        if at + taken < len(text) and len(starts) > 1 and ends[-1] == len(folded):
            # The last word may go on in the next block: leave it to that one.
            taken = int(places[-1])
            starts, ends, places = starts[:-1], ends[:-1], places[:-1]
        yield folded, starts, ends, places + at
        at += taken


def _words(piece: str) -> tuple[NDArray[Any], Integers, Integers, Integers]:
    classes, folded, kept = _characters(piece)
    joins = classes == _JOINS
    starting, ending = joins.copy(), joins.copy()
    starting[1:] &= ~joins[:-1]
    ending[:-1] &= ~joins[1:]
    if not piece.isascii():
        alone = classes == _ALONE
        starting |= alone
        ending |= alone
    starts, ends = np.flatnonzero(starting), np.flatnonzero(ending) + 1
    return folded, starts, ends, starts if kept is None else kept[starts]


def _characters(piece: str) -> tuple[NDArray[np.uint8], NDArray[Any], Integers | None]:
    """Class and folded form of each character, without ignored ones; which were kept (None: all)."""
    if piece.isascii():
        letters, tables = piece.encode("ascii"), _ascii_tables()
        as_classes, as_folded = (np.frombuffer(letters.translate(table), np.uint8) for table in tables)
        return as_classes, as_folded, None
    class_of, fold_to = _tables()
    codes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)
    high = codes >= _TABLED
    classes, folded = _with_high(codes, high) if high.any() else (class_of[codes], fold_to[codes])
    ignored = classes == _IGNORED
    if not ignored.any():
        return classes, folded, None
    kept = np.flatnonzero(~ignored)
    return classes[kept], folded[kept], kept


def _with_high(codes: NDArray[np.uint32], high: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    class_of, fold_to = _tables()
    low = np.where(high, 0, codes)
    classes = class_of[low]
    classes[(codes >= _HAN_PLANES.start) & (codes < _HAN_PLANES.stop)] = _ALONE
    classes[(codes >= _HIGH_MARKS[0]) & (codes <= _HIGH_MARKS[1])] = _IGNORED
    return classes, np.where(high, codes, fold_to[low])


def _hashed(folded: NDArray[Any], starts: Integers, ends: Integers) -> Hashes:
    """Each word's polynomial in its characters, modulo 2**64, by differences of prefix sums; then mixed.

    **Source**: Karp and Rabin 1987, "Efficient randomized pattern-matching algorithms".
    """
    powers, inverses = _powers()
    sums = np.zeros(len(folded) + 1, np.uint64)
    np.cumsum(folded.astype(np.uint64) * powers[: len(folded)], out=sums[1:])
    return scrambled((sums[ends] - sums[starts]) * inverses[starts])


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """The powers of the base that characters are multiplied with, and of its inverse."""
    steps = np.full(_BLOCK, _CHARACTER_BASE, np.uint64)
    back = np.full(_BLOCK, pow(_CHARACTER_BASE, -1, 2**64), np.uint64)
    steps[0] = back[0] = 1
    return np.cumprod(steps), np.cumprod(back)


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Class and folded form of the characters of planes 0 and 1."""
    fold_to = np.arange(_TABLED, dtype=np.uint32)
    class_of = np.zeros(_TABLED, np.uint8)
    for code in range(_TABLED):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Mn", "Mc", "Me", "Cf"):
            class_of[code] = _IGNORED
        elif category[0] in "LN":
            class_of[code] = _JOINS
            fold_to[code] = _folded(character)
    for first, last in _ALONE_RANGES:
        inside = class_of[first : last + 1]
        inside[inside == _JOINS] = _ALONE
    class_of.flags.writeable = fold_to.flags.writeable = False
    return class_of, fold_to


@cache
def _ascii_tables() -> tuple[bytes, bytes]:
    """The same for ASCII, as `bytes.translate` takes it."""
    class_of, fold_to = _tables()
    return class_of[:256].tobytes(), fold_to[:256].astype(np.uint8).tobytes()


def _folded(character: str) -> int:
    """The one character that stands for this one: without case, accents and width."""
    if "가" <= character <= "힣":
        return ord(character)  # decomposing would leave the first consonant alone
    plain = unicodedata.normalize("NFKD", character).casefold()
    letters = [part for part in plain if unicodedata.category(part)[0] in "LN"]
    return ord(letters[0]) if letters else ord(character)
