"""Published quality rules as tables: what is measured, and the limit that a document must keep.

A document is dropped by the first rule, from the top, that it breaks. The measures are in `measures.py`.
"""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal, NamedTuple

from llmkit.data.clean import measures as m
from llmkit.data.clean.passage import Passage
from llmkit.recipe.preparation import RuleSet

_HOLDS: Final = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


class Rule(NamedTuple):
    """A document stays when `measure` stands so to `limit`; `name` is the reason when it does not."""

    name: str
    measure: Callable[[Passage], float]
    must_be: Literal["<=", "<", ">=", ">"]
    limit: float


GOPHER: Final = (
    Rule("too few words", m.num_words, ">=", 50),
    Rule("too many words", m.num_words, "<=", 100_000),
    Rule("short words", m.mean_word_length, ">=", 3),
    Rule("long words", m.mean_word_length, "<=", 10),
    Rule("hash signs", m.hash_signs_per_word, "<=", 0.1),
    Rule("ellipses", m.ellipses_per_word, "<=", 0.1),
    Rule("bullet points", m.bullet_lines, "<=", 0.9),
    Rule("lines that trail off", m.ellipsis_lines, "<=", 0.3),
    Rule("words without letters", m.words_with_letters, ">=", 0.8),
    Rule("stop words", m.num_stop_words, ">=", 2),
)
"""Source: Rae et al. 2021, "Scaling Language Models" (arXiv:2112.11446), appendix A.1.1, quality filtering."""

GOPHER_REPETITION: Final = (
    Rule("repeated lines", m.repeated_lines, "<=", 0.30),
    Rule("repeated paragraphs", m.repeated_paragraphs, "<=", 0.30),
    Rule("characters in repeated lines", m.repeated_line_characters, "<=", 0.20),
    Rule("characters in repeated paragraphs", m.repeated_paragraph_characters, "<=", 0.20),
    Rule("top 2-gram", partial(m.top_word_ngram, n=2), "<=", 0.20),
    Rule("top 3-gram", partial(m.top_word_ngram, n=3), "<=", 0.18),
    Rule("top 4-gram", partial(m.top_word_ngram, n=4), "<=", 0.16),
    Rule("repeated 5-grams", partial(m.repeated_word_ngrams, n=5), "<=", 0.15),
    Rule("repeated 6-grams", partial(m.repeated_word_ngrams, n=6), "<=", 0.14),
    Rule("repeated 7-grams", partial(m.repeated_word_ngrams, n=7), "<=", 0.13),
    Rule("repeated 8-grams", partial(m.repeated_word_ngrams, n=8), "<=", 0.12),
    Rule("repeated 9-grams", partial(m.repeated_word_ngrams, n=9), "<=", 0.11),
    Rule("repeated 10-grams", partial(m.repeated_word_ngrams, n=10), "<=", 0.10),
)
"""Source: Rae et al. 2021 (arXiv:2112.11446), appendix A.1.1, table A1."""

C4: Final = (
    Rule("lorem ipsum", m.num_lorem_ipsum, "<=", 0),
    Rule("curly brackets", m.num_curly_brackets, "<=", 0),
    Rule("too few sentences", m.num_c4_sentences, ">=", 5),
)
"""Source: Raffel et al. 2019, "Exploring the Limits of Transfer Learning" (arXiv:1910.10683), section 2.2, with the
numbers of the published code (5 sentences; lines of 3 words; no line with a word above 1,000 characters, with
"javascript", or with a phrase of cookie and privacy notices). The word list is left out."""

FINEWEB: Final = (
    Rule("lines without end", m.terminated_lines, ">", 0.12),
    Rule("characters in repeated lines", m.repeated_line_characters, "<", 0.1),
    Rule("short lines", m.short_lines, "<", 0.67),
)
"""Source: Penedo et al. 2024, "The FineWeb Datasets" (arXiv:2406.17557), section 3.6, its own filters."""

CHINESE: Final = (
    Rule("too few characters", m.num_characters, ">=", 50),  # MAP-CC
    Rule("too many characters", m.num_characters, "<=", 100_000),  # Gopher's words, read as characters
    Rule("too little Han", m.han_share, ">=", 0.3),  # ChineseWebText
    Rule("short lines", m.mean_line_length, ">=", 10),  # ChineseWebText
    Rule("too few sentences", m.num_chinese_sentences, ">", 1),  # MAP-CC
    Rule("no punctuation", m.punctuation_share, ">", 0),  # MAP-CC
    Rule("digits", m.digit_share, "<=", 0.3),  # MAP-CC
    Rule("hash signs", m.hash_sign_share, "<=", 0.1),  # MAP-CC
    Rule("ellipses", m.ellipsis_share, "<=", 0.1),  # MAP-CC
    Rule("square brackets", m.bracketed_share, "<=", 0.1),  # MAP-CC
    Rule("lines that trail off", m.trailing_chinese_lines, "<=", 0.3),  # MAP-CC
    Rule("bullet points", m.bullet_lines, "<=", 0.9),  # MAP-CC
    Rule("too few different characters", m.entropy, ">=", 3),  # MAP-CC
    Rule("lines without end", m.terminated_chinese_lines, ">=", 0.106),  # FineWeb2
    Rule("stop words", m.num_chinese_stop_words, ">=", 2),  # FineWeb2's list
    Rule("repeated lines", m.repeated_lines, "<=", 0.287),  # FineWeb2
    Rule("characters in repeated lines", m.repeated_line_characters, "<=", 0.20),  # Gopher, MAP-CC
    Rule("top 2-gram", partial(m.top_character_ngram, n=2), "<=", 0.20),  # MAP-CC
    Rule("top 3-gram", partial(m.top_character_ngram, n=3), "<=", 0.18),  # MAP-CC
    Rule("top 4-gram", partial(m.top_character_ngram, n=4), "<=", 0.16),  # MAP-CC
    # MAP-CC allows 0.60 for 5- to 10-grams alike; the share only falls with n, so the first covers the others.
    Rule("repeated 5-grams", partial(m.repeated_character_ngrams, n=5), "<=", 0.60),
)
"""Sources: Du et al. 2024, "Chinese Tiny LLM" (arXiv:2404.04167), appendix, MAP-CC; Chen et al. 2023,
"ChineseWebText" (arXiv:2311.01149), section 3.2; Penedo et al. 2025, "FineWeb2" (arXiv:2506.20920), the published
settings for `cmn_Hani`."""

RULES: Final[Mapping[RuleSet, tuple[Rule, ...]]] = {
    "gopher": GOPHER,
    "gopher-repetition": GOPHER_REPETITION,
    "c4": C4,
    "fineweb": FINEWEB,
    "chinese": CHINESE,
}


def broken_rule(passage: Passage, name: RuleSet) -> str | None:
    """The first rule of a set that a text breaks, as `set: rule`; None when it keeps all.

    A text without words keeps none.
    """
    if not passage.words:
        return f"{name}: no words"
    for rule in RULES[name]:
        if not _HOLDS[rule.must_be](rule.measure(passage), rule.limit):
            return f"{name}: {rule.name}"
    return None
