"""What quality rules measure in a text. Every measure takes a text that has at least one word."""

import re
from typing import Final

from llmkit.data.clean.passage import Passage, repeats

STOP_WORDS: Final = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS: Final = tuple("-•‣▶◀◦■□▪▫–●○※·➢*")
ELLIPSES: Final = ("...", "…")
TERMINAL: Final = (".", "!", "?", '"', "'", "”", "’")
POLICY_PHRASES: Final = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
CHINESE_TERMINAL: Final = tuple("。！？…；!?;.”’』」）)")
CHINESE_STOP_WORDS: Final = frozenset("的年在月是和日了於為有被人中为他與後也而由")
CHINESE_TRAILING: Final = ("...", "…", "。。。", "展开", "更多", "readmore")

_SHORT_LINE: Final = 30
_EDGE = ".,;:!?\"'()[]“”‘’"
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
_CHINESE_SENTENCE_END = re.compile("[。！？…!?；;]+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_BRACKETED = re.compile("【[^【】]*】")
_ELLIPSIS = re.compile(r"…+|\.{2,}")
_HASHES = re.compile("#+")


def num_words(passage: Passage) -> float:
    """Words, as blanks separate them."""
    return len(passage.words)


def mean_word_length(passage: Passage) -> float:
    """Characters in a word."""
    return len(passage.solid) / len(passage.words)


def hash_signs_per_word(passage: Passage) -> float:
    """`#` for each word."""
    return passage.text.count("#") / len(passage.words)


def ellipses_per_word(passage: Passage) -> float:
    """`...` and `…` for each word."""
    return sum(map(passage.text.count, ELLIPSES)) / len(passage.words)


def bullet_lines(passage: Passage) -> float:
    """The share of lines that begin with a bullet point."""
    return sum(line.startswith(BULLETS) for line in passage.lines) / len(passage.lines)


def ellipsis_lines(passage: Passage) -> float:
    """The share of lines that end with an ellipsis."""
    return sum(line.endswith(ELLIPSES) for line in passage.lines) / len(passage.lines)


def words_with_letters(passage: Passage) -> float:
    """The share of words with at least one letter."""
    # Most words are of letters alone, which one fast test tells.
    return sum(w.isalpha() or any(map(str.isalpha, w)) for w in passage.words) / len(passage.words)


def num_stop_words(passage: Passage) -> float:
    """Different English stop words of Gopher's eight."""
    found = set[str]()
    for word in passage.words:
        if len(word) < 8 and (plain := word.strip(_EDGE).lower()) in STOP_WORDS:
            found.add(plain)
            if len(found) == len(STOP_WORDS):
                break
    return len(found)


def repeated_lines(passage: Passage) -> float:
    """The share of lines that came before."""
    return len(repeats(passage.lines)) / len(passage.lines)


def repeated_line_characters(passage: Passage) -> float:
    """The share of the lines' characters that stand in lines that came before."""
    return sum(map(len, repeats(passage.lines))) / sum(map(len, passage.lines))


def repeated_paragraphs(passage: Passage) -> float:
    """The share of paragraphs that came before."""
    return len(repeats(passage.paragraphs)) / len(passage.paragraphs)


def repeated_paragraph_characters(passage: Passage) -> float:
    """The share of the paragraphs' characters that stand in paragraphs that came before."""
    return sum(map(len, repeats(passage.paragraphs))) / sum(map(len, passage.paragraphs))


def top_word_ngram(passage: Passage, n: int) -> float:
    """The share of the words' characters in the most frequent n-gram of words, when it occurs at least twice."""
    return passage.word_units.top_share(n)


def repeated_word_ngrams(passage: Passage, n: int) -> float:
    """The share of the words' characters in n-grams of words that came before."""
    return passage.word_units.repeated_bound(n)


def top_character_ngram(passage: Passage, n: int) -> float:
    """The share of the characters in the most frequent n-gram of characters, when it occurs at least twice."""
    return passage.character_units.top_share(n)


def repeated_character_ngrams(passage: Passage, n: int) -> float:
    """The share of the characters in n-grams of characters that came before."""
    return passage.character_units.repeated_bound(n)


def num_lorem_ipsum(passage: Passage) -> float:
    """Places that say "lorem ipsum"."""
    return passage.text.lower().count("lorem ipsum")


def num_curly_brackets(passage: Passage) -> float:
    """Opening curly brackets."""
    return passage.text.count("{")


def num_c4_sentences(passage: Passage) -> float:
    """Sentences in the lines that C4 would keep; a line ends at least one."""
    return sum(max(1, len(_SENTENCE_END.findall(line))) for line in passage.lines if _c4_keeps(line))


def _c4_keeps(line: str) -> bool:
    if not line.endswith(TERMINAL) or line.endswith("..."):
        return False
    words = line.split()
    if len(words) < 3 or (len(line) > 1000 and max(map(len, words)) > 1000):
        return False
    lowered = line.lower()
    return "javascript" not in lowered and not any(phrase in lowered for phrase in POLICY_PHRASES)


def terminated_lines(passage: Passage) -> float:
    """The share of lines that end with a full stop, an exclamation or question mark, or a quotation mark."""
    return sum(line.endswith(TERMINAL) for line in passage.lines) / len(passage.lines)


def short_lines(passage: Passage) -> float:
    """The share of lines with fewer than 30 characters."""
    return sum(len(line) < _SHORT_LINE for line in passage.lines) / len(passage.lines)


def num_characters(passage: Passage) -> float:
    """Characters, blanks left out."""
    return len(passage.solid)


def han_share(passage: Passage) -> float:
    """The share of Han in the characters."""
    return sum(map(len, _HAN.findall(passage.solid))) / len(passage.solid)


def mean_line_length(passage: Passage) -> float:
    """Characters in a line that is not blank."""
    return sum(map(len, passage.lines)) / len(passage.lines)


def num_chinese_sentences(passage: Passage) -> float:
    """Sentences by Chinese or ASCII marks; what stands after the last mark is one."""
    return sum(bool(part.strip()) for part in _CHINESE_SENTENCE_END.split(passage.text))


def punctuation_share(passage: Passage) -> float:
    """The share of characters that are neither letters nor digits."""
    return sum(n for c, n in passage.counts.items() if not c.isalnum()) / len(passage.solid)


def digit_share(passage: Passage) -> float:
    """The share of digits in letters and digits."""
    alphanumeric = sum(n for c, n in passage.counts.items() if c.isalnum())
    digits = sum(n for c, n in passage.counts.items() if c.isdigit())
    return digits / alphanumeric if alphanumeric else 0.0


def hash_sign_share(passage: Passage) -> float:
    """Runs of `#` for each character."""
    return len(_HASHES.findall(passage.text)) / len(passage.solid)


def ellipsis_share(passage: Passage) -> float:
    """Ellipses for each character; a run of dots is one."""
    return len(_ELLIPSIS.findall(passage.text)) / len(passage.solid)


def bracketed_share(passage: Passage) -> float:
    """The share of characters inside 【】, where titles of advertisements stand."""
    return sum(len(part) - 2 for part in _BRACKETED.findall(passage.solid)) / len(passage.solid)


def trailing_chinese_lines(passage: Passage) -> float:
    """The share of lines that end with an ellipsis or with 更多, 展开 (more, open)."""
    return sum(line.endswith(CHINESE_TRAILING) for line in passage.lines) / len(passage.lines)


def terminated_chinese_lines(passage: Passage) -> float:
    """The share of lines that end with a Chinese or ASCII mark that can end a sentence."""
    return sum(line.endswith(CHINESE_TERMINAL) for line in passage.lines) / len(passage.lines)


def num_chinese_stop_words(passage: Passage) -> float:
    """Different characters of the commonest ones, such as 的, 在, 是."""
    return len(CHINESE_STOP_WORDS & passage.counts.keys())


def entropy(passage: Passage) -> float:
    """The entropy of the characters, in nats."""
    return passage.entropy()
