"""Words and signs of English text, cut as the Penn Treebank does it: what the CMRC script cuts runs of Latin text by.

A sign is a token of its own, `n't`, `'s`, `'ll` and the like are cut from their word; a comma or colon inside a number
stays (`1,000`), and so does a full stop inside a word (`3.5`, `u.s`) or at its end unless the text ends there.

**Source**: Marcus, Santorini and Marcinkiewicz, "Building a Large Annotated Corpus of English: The Penn Treebank",
1993; the rules for quotation marks and clitics as in nltk's `word_tokenize`.
"""

import re

_OPENING = re.compile(r"""^"|(?<=[ (\[{<])(?:"|'')""")
"""Double quotation marks that open: written with two backticks, those that close with two apostrophes."""

_APART = re.compile(r"""\.{2,}|--|`+|''|[\]\[(){}<>;@#$%&?!*«»“”„‘’\u2012-\u2015]|[:,](?!\d)""")
"""Signs that part words wherever they stand."""

_OPENED = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b|')(?=\w)")
_CLITIC = re.compile(r"(?<=[^\s'])(?:'ll|'re|'ve|n't|'s|'m|'d|')(?=\s)")
_LAST_STOP = re.compile(r"(?<=[^.])\.(?=[\])}>\"'»”’ ]*\s*$)")
_JOINED = re.compile(r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")


def words_of(text: str) -> list[str]:
    """The words and signs of a text in lower case.

    Args:
        text: A sentence, or less: only the full stop at the very end is taken for the end of a sentence.
    """
    text = _OPENING.sub(" `` ", text)
    for pattern in (_OPENED, _LAST_STOP):
        text = pattern.sub(r" \g<0> ", text)
    text = _APART.sub(r" \g<0> ", text.replace('"', " '' "))
    text = _CLITIC.sub(r" \g<0> ", f" {text} ")
    return _JOINED.sub(_parted, text).split()


def _parted(match: re.Match[str]) -> str:
    return " ".join(part for part in match.groups() if part)
