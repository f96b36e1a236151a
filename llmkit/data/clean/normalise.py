"""Text into one form: repaired encoding, Unicode form, no control characters, plain text, tidy blanks."""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

from llmkit.data.clean.packages import need
from llmkit.recipe.preparation import Normalise

MOST_ROUNDS: Final = 8
"""A step can make work for an earlier one (NFC joins what then looks like damage): go round until all is still."""

# Damage that ftfy could repair looks like a UTF-8 lead byte and what follows it, read in a one-byte encoding: two
# characters in a row that are neither ASCII nor Han, not both typographic marks ("……" and "——" are Chinese); or a
# lone C1 control; or A with a tilde or circumflex, after which a no-break space may have become a blank. Surrogates
# are halves of one character. Looking for these first keeps ftfy, which reads 5-10 MB/s, away from sound lines.
_LETTER_OR_SIGN = "\x80-\u1fff\u2070-\u25ff\uf8ff\ufb01\ufb02\ufffd"
_PERHAPS_DAMAGED = re.compile(
    f"[\x80-\x9f\u00c2\u00c3\ud800-\udfff]"
    f"|[{_LETTER_OR_SIGN}][{_LETTER_OR_SIGN}\u2000-\u206f]"
    f"|[\u2000-\u206f][{_LETTER_OR_SIGN}]"
)

_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-9:;<=>?]*[ -/]*[@-~]")
# Controls, soft hyphen, zero-width space and word joiner, byte-order mark, direction marks, annotation anchors,
# code points that are no characters. Joiners and tags are judged by what stands before them.
_NEVER_SEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000e0001"
)
_INVISIBLE = re.compile(f"[{_NEVER_SEEN}]")
# With joiners and tags: one search that most texts pass.
_SUSPICIOUS = re.compile(f"[{_NEVER_SEEN}\u200c\u200d\U000e0020-\U000e007f]")
# Zero-width joiners spell words in Arabic, Persian, Indic and other scripts, and compose emoji.
_JOINING_SCRIPTS = (
    "\u0600-\u109f\u1780-\u18af\u1a00-\u1bff\ua800-\uabff\ufb1d-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc"
)
_EMOJI = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
)
_IDLE_JOINER = re.compile(
    f"(?<![{_JOINING_SCRIPTS}{_EMOJI}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINING_SCRIPTS}{_EMOJI}])"
)
# Tag characters spell the flags of regions after a black flag (England, Texas); elsewhere they hide text.
_IDLE_TAG = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")

KEPT_WIDE: Final = "！（），：；？～"
"""Full-width signs that are Chinese punctuation and stay."""
_WIDE = re.compile(f"[\u3000\uff01-\uff5e](?<![{KEPT_WIDE}])")
_TO_HALF = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in KEPT_WIDE} | {
    0x3000: " "
}

_TAG = re.compile(r"<[A-Za-z!/?]")
_BLANK_LINES = re.compile("\n{3,}")

Step = Callable[[str], str]


class Normaliser:
    """Puts a text into one form; what it gives, it leaves alone when it sees it again (but for `html`).

    Source: ftfy (R. Speer, Zenodo 2019, doi:10.5281/zenodo.2591652) repairs encoding damage; Unicode Standard
    Annex 15 defines the forms; main text of HTML pages by Resiliparse (Bevendorff et al., ECIR 2018).

    Args:
        spec: The recipe's `tokenize.prepare.normalise`.

    Raises:
        MissingError: A package that a setting needs is not installed.
    """

    def __init__(self, spec: Normalise) -> None:
        self._html = _html_to_text() if spec.html else None
        self._fix = _fixer() if spec.fix else None
        self._control = spec.control
        self._half_width = spec.half_width
        self._form: Literal["NFC", "NFKC"] | None = None
        if spec.unicode != "keep":
            self._form = "NFC" if spec.unicode == "nfc" else "NFKC"
        self._whitespace = spec.whitespace

    def __call__(self, text: str) -> str:
        """The text in its one form; it may be empty."""
        if self._html is not None:
            text = self._html(text)
        if text.isascii():
            return self._ascii(text)
        for _ in range(MOST_ROUNDS):
            before, text = text, self._once(text)
            if text == before:
                break
        return text

    def _ascii(self, text: str) -> str:
        """ASCII has neither damage nor forms: the same result as `_once`, faster."""
        if self._control:
            text = _without_invisible(text)
        return tidy(text) if self._whitespace else text

    def _once(self, text: str) -> str:
        if self._fix is not None:
            text = self._fix(text)
        if self._half_width and _WIDE.search(text):
            text = text.translate(_TO_HALF)
        if self._control:
            text = _without_invisible(text)
        if self._form is not None and not unicodedata.is_normalized(self._form, text):
            text = unicodedata.normalize(self._form, text)
        return tidy(text) if self._whitespace else text


def tidy(text: str) -> str:
    """Blanks off line ends, three or more line ends to two, blank lines off both ends.

    The indentation of lines stays, also that of the first line of several (it may be code); a text of one line
    loses the blanks on both sides.
    """
    if not text.isascii() or " \n" in text or "\t\n" in text or "\r\n" in text:
        text = "\n".join([line.rstrip() for line in text.split("\n")])
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    text = text.rstrip().lstrip("\n")
    if "\n" not in text:
        return text.strip()
    # Lines of blanks alone at the beginning became empty above, but for ASCII control characters that are kept.
    return text


def _without_invisible(text: str) -> str:
    if not _SUSPICIOUS.search(text):
        return text
    text = _LINE_END.sub("\n", text)
    text = _TERMINAL_ESCAPE.sub("", text)
    text = _INVISIBLE.sub("", text)
    text = _IDLE_JOINER.sub("", text)
    return _IDLE_TAG.sub("", text)


@cache
def _fixer() -> Step:
    """The repair of damage alone, by ftfy: quotes, ligatures, widths, entities and line ends stay as they are."""
    ftfy = need("ftfy", "normalise.fix")
    settings = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=True,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )

    def fix_line(line: str) -> str:
        return str(ftfy.fix_text(line, settings)) if _PERHAPS_DAMAGED.search(line) else line

    def fix(text: str) -> str:
        if not _PERHAPS_DAMAGED.search(text):
            return text
        return "\n".join([fix_line(line) for line in text.split("\n")])

    return fix


@cache
def _html_to_text() -> Step:
    extract: Any = need("resiliparse.extract.html2text", "normalise.html").extract_plain_text

    def html_to_text(text: str) -> str:
        # The parser takes NUL for the end of something and plain text for one paragraph.
        return str(extract(text.replace("\0", ""), main_content=True)) if _TAG.search(text) else text

    return html_to_text
