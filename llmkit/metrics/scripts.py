"""Scripts of a text, as far as they decide how it is cut into tokens."""

import re
import unicodedata
from collections.abc import Iterable

HAN = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Han characters, as the inside of a character class."""

UNSPACED = HAN + "\u3040-\u30ff\u31f0-\u31ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Those of scripts that put no space between words: Han, kana, Thai, Lao, Burmese, Khmer."""

MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u0963\u0966-\u0dff"
"""Signs that belong to the letter before them: accents, Hebrew and Arabic points, the vowels of Indian scripts."""

_HAN = re.compile(f"[{HAN}]")
_ASCII = re.compile("[A-Za-z]")


def shares_of(texts: Iterable[str]) -> tuple[float, float]:
    """The shares of the letters that are Han, and that are ASCII; 0 and 1 where there are no letters."""
    letters = han = ascii_ = 0
    for text in texts:
        letters += sum(unicodedata.category(character)[0] == "L" for character in text)
        han += len(_HAN.findall(text))
        ascii_ += len(_ASCII.findall(text))
    return (han / letters, ascii_ / letters) if letters else (0.0, 1.0)
