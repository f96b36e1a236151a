"""ROUGE-1, -2, -L and -Lsum, 0 to 1: equal to rouge-score on English, and defined on other languages.

How a text is cut into tokens: English as rouge-score does, runs of ASCII letters and digits in lower case and nothing
else. Other languages: words of any script in lower case, with every character of a script without spaces (Han, kana,
Thai, ...) a token of its own; the package's own rule leaves nothing of Chinese, and the score would be 0.

For ROUGE-Lsum lines are sentences, as in rouge-score; in languages other than English a sentence ends after 。！？ too.

**Source**: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, sections 2-3; the longest common
subsequence by Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmkit.errors import UsageError
from llmkit.metrics.inputs import Floats, check_rows
from llmkit.metrics.scripts import MARKS, UNSPACED, shares_of

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

Cut = Callable[[str], list[str]]

_ASCII_WORD = re.compile("[a-z0-9]+")
_WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W_{UNSPACED}]|[{MARKS}])+")
_SENTENCE_END = re.compile("\n|(?<=[。！？])")
_SHORT = 3
"""Words of so many letters are never stemmed, as in the original program."""


def cutter(language: str, stem: Callable[[str], str] | None = None) -> Cut:
    """How texts of a language are cut into tokens.

    Args:
        language: Such as `en`, `zh`, `pt-BR`.
        stem: Takes the endings off an English word.
    """
    if language.split("-")[0] != "en":
        return lambda text: _WORD.findall(text.lower())
    if stem is None:
        return lambda text: _ASCII_WORD.findall(text.lower())
    return lambda text: _stemmed(_ASCII_WORD.findall(text.lower()), stem)


def _stemmed(words: list[str], stem: Callable[[str], str]) -> list[str]:
    return [stem(word) if len(word) > _SHORT else word for word in words]


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str = "en",
    stem: Callable[[str], str] | None = None,
) -> dict[str, float]:
    """The mean over rows of the F1 of `rouge1`, `rouge2`, `rougeL` and `rougeLsum`.

    Args:
        predictions: One text a row.
        references: The right ones of each row, one or several; the best counts, for each figure by itself.
        language: That of the texts.
        stem: Takes the endings off an English word, such as nltk's `PorterStemmer().stem`; None leaves them.

    Raises:
        DataError: There are no rows.
        UsageError: The language is said to be English and most letters are not: next to nothing would be compared.
    """
    rows = rouge_rows(predictions, references, language=language, stem=stem)
    return {name: float(values_N.mean()) for name, values_N in rows.items()}


def rouge_rows(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    language: str = "en",
    stem: Callable[[str], str] | None = None,
) -> Mapping[str, Floats]:
    """As `rouge`, but the figures of each row, [N] for each name."""
    check_rows(references, predictions)
    english = language.split("-")[0] == "en"
    if english and shares_of(text for row in references for text in row)[1] < 0.5:
        raise UsageError(
            "the language is 'en', but most letters of the references are not ASCII, "
            "and ROUGE for English sees no others",
            hint="say the language of what the model writes, such as language: zh",
        )
    cut = cutter(language, stem)
    rows = []
    for prediction, alternatives in zip(predictions, references, strict=True):
        scores = [_score(prediction, text, cut, english=english) for text in alternatives]
        rows.append([max(column) for column in zip(*scores, strict=True)])
    return dict(zip(NAMES, np.array(rows).T, strict=True))


def _score(prediction: str, reference: str, cut: Cut, *, english: bool) -> tuple[float, float, float, float]:
    found, wanted = cut(prediction), cut(reference)
    sentences = [_sentences(text, cut, english=english) for text in (prediction, reference)]
    return (
        _f1(shared_ngrams(found, wanted, 1), len(found), len(wanted)),
        _f1(shared_ngrams(found, wanted, 2), len(found) - 1, len(wanted) - 1),
        _f1(common_length(wanted, found), len(found), len(wanted)),
        _f1(_summary_hits(*sentences), *(sum(map(len, each)) for each in sentences)),
    )


def _f1(hits: int, found: int, wanted: int) -> float:
    return 2 * hits / (found + wanted) if hits else 0.0


def _sentences(text: str, cut: Cut, *, english: bool) -> list[list[str]]:
    return [cut(part) for part in (text.split("\n") if english else _SENTENCE_END.split(text))]


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of `n` tokens occurs."""
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def shared_ngrams(first: Sequence[str], second: Sequence[str], n: int) -> int:
    """Runs of `n` tokens that both have, each as often as in the one that has fewer."""
    return (ngrams(first, n) & ngrams(second, n)).total()


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of tokens."""
    rows = _rows(first, second)
    return len(second) - rows[-1].bit_count()


def _rows(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """The table of common lengths, a row as the bits of one integer.

    Bit j of row i is 0 where the length of (first[:i], second[:j+1]) is one more than that of (first[:i], second[:j]):
    a length is the number of zeros up to there.
    """
    places: dict[str, int] = defaultdict(int)
    for place, token in enumerate(second):
        places[token] |= 1 << place
    full = (1 << len(second)) - 1
    rows = [full]
    for token in first:
        row, match = rows[-1], rows[-1] & places.get(token, 0)
        rows.append((row + match | row - match) & full)
    return rows


def _members(first: Sequence[str], second: Sequence[str]) -> set[int]:
    """Places in `first` of one longest common subsequence; of several the one that the original program reads out."""
    rows = _rows(first, second)
    row, column = len(first), len(second)
    members = set()
    while row and column:
        if first[row - 1] == second[column - 1]:
            members.add(row - 1)
            row, column = row - 1, column - 1
        elif _length(rows[row], column - 1) > _length(rows[row - 1], column):
            column -= 1
        else:
            row -= 1
    return members


def _length(row: int, column: int) -> int:
    return column - (row & ((1 << column) - 1)).bit_count()


def _summary_hits(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> int:
    """Tokens of the reference that a sentence of the prediction has in the same order; each counts once."""
    left_found, left_wanted = Counter(_flat(found)), Counter(_flat(wanted))
    hits = 0
    for sentence in wanted:
        union = set[int]().union(*(_members(sentence, other) for other in found))
        for place in sorted(union):
            token = sentence[place]
            if left_found[token] > 0 and left_wanted[token] > 0:
                hits += 1
                left_found[token] -= 1
                left_wanted[token] -= 1
    return hits


def _flat(sentences: Sequence[Sequence[str]]) -> list[str]:
    return [token for sentence in sentences for token in sentence]
