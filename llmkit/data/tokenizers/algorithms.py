"""The five ways to learn a vocabulary, each from texts to a `tokenizers.Tokenizer` without special tokens set.

With `byte_fallback` every model works on bytes written as characters, so it can spell any text and no character
needs a reserved mark. Without it WordPiece and unigram models work on the characters themselves, and rare ones
become the unknown token.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmkit.data.tokenizers.patterns import (
    BOUNDED,
    BOUNDED_HAN_ALONE,
    MAX_RUN_BYTES,
    RUNS,
    RUNS_TO_LEARN,
    WORDS,
    as_bytes_written,
    byte_chars,
    byte_splitter,
    chunks,
    han_of,
    splitter,
)
from llmkit.data.tokenizers.unigram import learn_pieces
from llmkit.data.tokenizers.words import choose_words, count_words
from llmkit.recipe.schema import TextForm, Tokenize

UNKNOWN = "<|unk|>"
BERT_UNKNOWN = "[UNK]"
CONTINUES = "##"

_BYTE_SCORE = -30.0
_NEVER = -1e9
_COVERAGE = 0.9995


@dataclass(frozen=True)
class Room:
    """What a vocabulary has room for.

    Attributes:
        specials: The special tokens, which have the first ids.
        size: Entries wanted, special tokens included.
    """

    specials: Sequence[str]
    size: int

    @property
    def left(self) -> int:
        """Entries besides the special tokens."""
        return self.size - len(self.specials)


Learner = Callable[[Sequence[str], Room, Tokenize], Tokenizer]


def learner(algorithm: str) -> Learner:
    """The function that learns a vocabulary by the algorithm of that name."""
    return {"bpe": _bpe, "wordpiece": _wordpiece, "chars": _chars, "unigram": _unigram, "words": _words}[
        algorithm
    ]


def smallest_size(spec: Tokenize, num_specials: int) -> int:
    """The smallest vocabulary that can spell every text."""
    if spec.algorithm in ("wordpiece", "chars"):
        return num_specials + (2 * 256 - 1 if spec.byte_fallback else 1)
    return num_specials + (256 if spec.byte_fallback or spec.algorithm == "bpe" else 1)


def normalizer_of(form: TextForm) -> Any:
    """What the tokenizer does to text first, or None."""
    steps: list[Any] = []
    if form.unicode != "keep":
        steps.append(normalizers.NFC() if form.unicode == "nfc" else normalizers.NFKC())
    if form.lowercase:
        steps.append(normalizers.Lowercase())
    if form.strip_accents:
        steps += [normalizers.NFD(), normalizers.StripAccents()]
        # Taking accents off needs them taken apart, which takes Hangul syllables apart, too: join them again.
        steps.append(normalizers.NFKC() if form.unicode == "nfkc" else normalizers.NFC())
    return normalizers.Sequence(steps) if steps else None


def _text_of(form: TextForm) -> Callable[[str], str] | None:
    normalizer = normalizer_of(form)
    return normalizer.normalize_str if normalizer is not None else None


def _bpe(texts: Sequence[str], room: Room, spec: Tokenize) -> Tokenizer:
    learning = Tokenizer(models.BPE())
    learning.pre_tokenizer = byte_splitter(RUNS_TO_LEARN)
    trainer = trainers.BpeTrainer(
        vocab_size=room.left, min_frequency=2, initial_alphabet=_sorted_bytes(), show_progress=False
    )
    learning.train_from_iterator(chunks(texts, _text_of(spec.normalise)), trainer)
    model = json.loads(learning.to_str())["model"]
    vocabulary = _after_specials(room, _by_id(model["vocab"]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge) for merge in model["merges"]]))
    tokenizer.pre_tokenizer = byte_splitter(RUNS)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wordpiece(texts: Sequence[str], room: Room, spec: Tokenize) -> Tokenizer:
    cut = _cutter(BOUNDED, spec)
    alphabet, continuing = _alphabets(texts, room.left, BOUNDED, spec)
    vocabulary = _learn_wordpiece(texts, room.left, cut, alphabet, continuing, spec)
    return _wordpiece_tokenizer(_after_specials(room, vocabulary), BOUNDED, spec)


def _chars(texts: Sequence[str], room: Room, spec: Tokenize) -> Tokenizer:
    """Han characters first, as long as a quarter of the room is left to pieces; then pieces; then more Han."""
    counts: Counter[str] = Counter()
    for chunk in chunks(texts, _text_of(spec.normalise)):
        counts.update(chunk)
    han = han_of(counts)
    ranked = sorted(han, key=lambda char: (-counts[char], char))
    alphabet, continuing = _alphabets(texts, room.left, BOUNDED_HAN_ALONE, spec, without=han)
    free = max(0, room.left - len(alphabet) - len(continuing))
    first = [char for char in ranked if counts[char] > 1][: free - free // 4]
    without_han = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="removed"), _cutter(BOUNDED_HAN_ALONE, spec)]
    )
    rest = _learn_wordpiece(texts, room.left - len(first), without_han, alphabet, continuing, spec)
    num_base = len(alphabet) + len(continuing)
    more = [char for char in ranked if char not in set(first)][: max(0, room.left - len(first) - len(rest))]
    written = [as_bytes_written(char) if spec.byte_fallback else char for char in first + more]
    vocabulary = _after_specials(room, [*rest[:num_base], *written, *rest[num_base:]])
    return _wordpiece_tokenizer(vocabulary, BOUNDED_HAN_ALONE, spec)


def _learn_wordpiece(
    texts: Sequence[str],
    size: int,
    cut: Any,
    alphabet: Sequence[str],
    continuing: Sequence[str],
    spec: Tokenize,
) -> list[str]:
    """The entries in order: the alphabet, as it begins and as it continues a word, then what is learnt."""
    learning = Tokenizer(models.WordPiece(vocab={}, unk_token=BERT_UNKNOWN))
    learning.pre_tokenizer = cut
    base = [*alphabet, *continuing]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(size, len(base)),
        min_frequency=2,
        # Given first, so their ids do not depend on the order of a hash table, and with them how ties are broken.
        special_tokens=base,
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    learning.train_from_iterator(chunks(texts, _text_of(spec.normalise)), trainer)
    return _by_id(learning.get_vocab(with_added_tokens=False))


def _wordpiece_tokenizer(vocabulary: dict[str, int], pattern: str, spec: Tokenize) -> Tokenizer:
    model = models.WordPiece(
        vocab=vocabulary,
        unk_token=BERT_UNKNOWN,
        max_input_chars_per_word=MAX_RUN_BYTES,
        continuing_subword_prefix=CONTINUES,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _cutter(pattern, spec)
    last = decoders.ByteLevel() if spec.byte_fallback else decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{CONTINUES}"), ""), last])
    return tokenizer


def _alphabets(
    texts: Sequence[str], room: int, pattern: str, spec: Tokenize, without: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """What may begin a word and what may continue one (with its mark): bytes, or the frequent characters."""
    if spec.byte_fallback:
        # A `#` never continues a word: the patterns make it stand alone.
        return _sorted_bytes(), [CONTINUES + char for char in _sorted_bytes() if char != "#"]
    begins, continues = _count_places(texts, pattern, spec)
    for char in without:
        begins.pop(char, None)
    places = begins.copy()
    places.update({CONTINUES + char: count for char, count in continues.items()})
    frequent = _frequent(places, max(1, room // 2))
    # The trainer knows an alphabet of characters, so each that continues a word may begin one, too.
    alphabet = sorted({place.removeprefix(CONTINUES) if len(place) > 1 else place for place in frequent})
    return alphabet, sorted(place for place in frequent if len(place) > 1)


def _count_places(texts: Sequence[str], pattern: str, spec: Tokenize) -> tuple[Counter[str], Counter[str]]:
    runs = _count_runs(texts, pattern, spec)
    begins: Counter[str] = Counter()
    continues: Counter[str] = Counter()
    for run, count in runs.items():
        begins[run[0]] += count
        for char in run[1:]:
            continues[char] += count
    return begins, continues


def _frequent(counts: Counter[str], most: int) -> list[str]:
    """The most frequent ones, that make up 99.95 % of all."""
    wanted = _COVERAGE * sum(counts.values())
    chosen: list[str] = []
    covered = 0
    for item, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if covered >= wanted or len(chosen) >= most:
            break
        chosen.append(item)
        covered += count
    return chosen


def _unigram(texts: Sequence[str], room: Room, spec: Tokenize) -> Tokenizer:
    runs = _count_runs(texts, RUNS, spec)
    ascii_chars = [chr(code) for code in range(128)] if spec.byte_fallback else []
    size = room.left - (256 if spec.byte_fallback else 0)
    pieces = learn_pieces(runs, size, free=ascii_chars)
    return _unigram_tokenizer(pieces, room, RUNS, spec)


def _words(texts: Sequence[str], room: Room, spec: Tokenize) -> Tokenizer:
    words = count_words(texts, _text_of(spec.normalise))
    if not spec.byte_fallback:
        return _unigram_tokenizer(choose_words(words, room.left), room, WORDS, spec)
    free = [chr(code) for code in range(128)]
    return _unigram_tokenizer(choose_words(words, room.left - 256, free=free), room, WORDS, spec)


def _unigram_tokenizer(
    pieces: Sequence[tuple[str, float]], room: Room, pattern: str, spec: Tokenize
) -> Tokenizer:
    # A special token's own text must not be found in text: any other spelling scores better.
    entries: list[tuple[str, float]] = [(special, _NEVER) for special in room.specials]
    if spec.byte_fallback:
        scores = {as_bytes_written(piece): score for piece, score in pieces}
        lowest = min([0.0, *scores.values()]) + _BYTE_SCORE
        entries += [(char, scores.pop(char, lowest)) for char in _sorted_bytes()]
        entries += scores.items()
    else:
        entries += pieces
    unknown = None if spec.byte_fallback else list(room.specials).index(UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(entries, unknown, False))
    tokenizer.pre_tokenizer = _cutter(pattern, spec)
    tokenizer.decoder = decoders.ByteLevel() if spec.byte_fallback else decoders.Fuse()
    return tokenizer


def _cutter(pattern: str, spec: Tokenize) -> Any:
    return byte_splitter(pattern) if spec.byte_fallback else splitter(pattern)


def _count_runs(texts: Sequence[str], pattern: str, spec: Tokenize) -> Counter[str]:
    cut = splitter(pattern)
    runs: Counter[str] = Counter()
    for chunk in chunks(texts, _text_of(spec.normalise)):
        runs.update([run for run, _ in cut.pre_tokenize_str(chunk)])
    return runs


def _sorted_bytes() -> list[str]:
    return sorted(byte_chars())


def _by_id(vocabulary: dict[str, int]) -> list[str]:
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _after_specials(room: Room, entries: Sequence[str]) -> dict[str, int]:
    return {entry: number for number, entry in enumerate([*room.specials, *entries])}
