"""A vocabulary of whole words: Chinese ones as a dictionary cuts them, others as blanks and signs do."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import log
from typing import Any

from llmkit.data.tokenizers.patterns import WORDS, chunks, han_of, splitter
from llmkit.data.tokenizers.unigram import learn_pieces
from llmkit.errors import MissingError

_PIECES_SHARE = 8  # one entry in so many spells parts of words the vocabulary lacks
_LONGEST_WORD = 32
_STEP = 100.0


def count_words(texts: Iterable[str], normalise: Any = None) -> Counter[str]:
    """How often each word occurs; runs of Han characters are cut by jieba's dictionary.

    Raises:
        MissingError: The text is Chinese and rjieba is not installed.
    """
    cut = splitter(WORDS)
    runs: Counter[str] = Counter()
    for chunk in chunks(texts, normalise):
        runs.update([run for run, _ in cut.pre_tokenize_str(chunk)])
    han = han_of({run[0] for run in runs})
    words: Counter[str] = Counter({run: count for run, count in runs.items() if run[0] not in han})
    chinese = {run: count for run, count in runs.items() if run[0] in han}
    if chinese:
        jieba = _jieba()
        for run, count in chinese.items():
            for word in jieba.cut(run):
                words[word] += count
    return words


def choose_words(words: Mapping[str, int], size: int, *, free: Iterable[str] = ()) -> list[tuple[str, float]]:
    """The vocabulary of at most `size` entries and its scores.

    Chinese words score the logarithm of their share, so the likeliest path through a run of characters is the
    one a dictionary with these frequencies cuts. All other entries score the same but for a trifle, so the path
    with the fewest entries wins, and a word of the vocabulary is always one token.

    Args:
        words: How often each word occurs.
        size: Entries wanted.
        free: Entries that are there anyway and count not towards `size`: the bytes' characters.

    Returns:
        (entry, score), without the free ones.
    """
    anyway = set(free)
    han = han_of({word[0] for word in words})
    pieces_room = size // _PIECES_SHARE
    chosen = _most_saving(words, size - pieces_room, anyway, han)
    rest = {w: c for w, c in words.items() if w not in chosen and w[0] not in han and len(w) > 1}
    learnt = learn_pieces(rest, pieces_room, free=anyway | _single(chosen))
    pieces = [piece for piece, _ in learnt if piece not in chosen and piece not in anyway]
    entries = dict.fromkeys(pieces, 1)
    for word, count in _ranked(words, chosen, anyway, han):
        if len(entries) >= size:
            break
        entries[word] = count
    total = max(1, sum(count for word, count in entries.items() if word[0] in han))
    return [
        (entry, _score(entry[0] in han, rank, count, total))
        for rank, (entry, count) in enumerate(sorted(entries.items(), key=lambda item: (-item[1], item[0])))
    ]


def boundaries(text_runs: Iterable[tuple[str, list[int]]]) -> dict[str, int]:
    """Compare cuts of Han runs with jieba's.

    Args:
        text_runs: Each run with the places inside it (in characters) where it was cut.

    Returns:
        `ours`, `jieba` and `both`: cuts inside runs, counted.
    """
    counts = {"ours": 0, "jieba": 0, "both": 0}
    for run, cuts in text_runs:
        at, theirs = 0, set()
        for word in _jieba().cut(run):
            at += len(word)
            theirs.add(at)
        theirs.discard(len(run))
        counts["ours"] += len(cuts)
        counts["jieba"] += len(theirs)
        counts["both"] += len(theirs.intersection(cuts))
    return counts


def _most_saving(words: Mapping[str, int], room: int, free: set[str], han: set[str]) -> dict[str, int]:
    """The entries that save most tokens: whole words against their characters, characters against their bytes."""
    first = dict(_ranked(words, {}, free, han)[: max(0, room)])
    return dict(_ranked(words, first, free, han)[: max(0, room)])


def _ranked(
    words: Mapping[str, int], chosen: Mapping[str, int], free: set[str], han: set[str]
) -> list[tuple[str, int]]:
    candidates = _candidates(words, chosen, free, han)
    ranked = sorted(candidates.items(), key=lambda item: (-item[1][0], item[0]))
    return [(word, count) for word, (_, count) in ranked]


def _candidates(
    words: Mapping[str, int], chosen: Mapping[str, int], free: set[str], han: set[str]
) -> dict[str, tuple[int, int]]:
    """(tokens saved, count) of each word and each character; characters also count in words not chosen."""
    single: Counter[str] = Counter()
    found: dict[str, tuple[int, int]] = {}
    for word, count in words.items():
        if 1 < len(word) <= _LONGEST_WORD and count > 1:
            found[word] = (count * (len(word) - 1), count)
        if word not in chosen or len(word) == 1:
            for char in word if word[0] in han or len(word) == 1 else ():
                single[char] += count
    for char, count in single.items():
        if char not in free:
            found[char] = (count * max(1, len(char.encode()) - 1), count)
    return found


def _single(words: Iterable[str]) -> set[str]:
    return {word for word in words if len(word) == 1}


def _score(is_han: bool, rank: int, count: int, total: int) -> float:
    if is_han:
        return round(log(count / total), 6)
    return -(_STEP + min(rank, 999_999) / 1_000_000)


def _jieba() -> Any:
    try:
        import rjieba
    except ImportError as error:
        raise MissingError(
            "algorithm `words` cuts Chinese by rjieba, which is not installed",
            hint="pip install 'llmkit[zh]'",
        ) from error
    return rjieba
