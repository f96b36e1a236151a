"""Keys, tokens and passwords in a text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

from llmkit.data.clean.finds import Find

_EDGE = r"(?<![A-Za-z0-9_\-])"
_KEYS: Final = tuple(
    (marks, re.compile(pattern))
    for marks, pattern in (
        # Amazon Web Services
        (
            ("AKIA", "ASIA", "ABIA", "ACCA"),
            r"(?<![A-Za-z0-9])A(?:KIA|SIA|BIA|CCA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        ),
        # GitHub
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), rf"{_EDGE}gh[pousr]_[A-Za-z0-9]{{36,255}}"),
        (("github_pat_",), rf"{_EDGE}github_pat_[A-Za-z0-9_]{{22,255}}"),
        # GitLab
        (("glpat-", "gldt-", "glrt-"), rf"{_EDGE}gl(?:pat|dt|rt)-[A-Za-z0-9_\-]{{20,128}}"),
        # Slack
        (("xox",), rf"{_EDGE}xox[abeoprs]-[A-Za-z0-9\-]{{10,250}}"),
        (("hooks.slack.com/",), r"hooks\.slack\.com/services/[A-Za-z0-9/]{20,128}"),
        # Stripe
        (("k_live_", "k_test_"), rf"{_EDGE}[srp]k_(?:live|test)_[A-Za-z0-9]{{16,128}}"),
        # Google
        (("AIza",), rf"{_EDGE}AIza[A-Za-z0-9_\-]{{35}}(?![A-Za-z0-9_\-])"),
        (("GOCSPX-",), rf"{_EDGE}GOCSPX-[A-Za-z0-9_\-]{{28}}"),
        # Hugging Face, npm, PyPI, SendGrid
        (("hf_",), rf"{_EDGE}hf_[A-Za-z0-9]{{30,64}}"),
        (("npm_",), rf"{_EDGE}npm_[A-Za-z0-9]{{36}}"),
        (("pypi-",), rf"{_EDGE}pypi-[A-Za-z0-9_\-]{{50,250}}"),
        (("SG.",), rf"{_EDGE}SG\.[A-Za-z0-9_\-]{{22}}\.[A-Za-z0-9_\-]{{43}}"),
        # JSON Web Token
        (
            ("eyJ",),
            rf"{_EDGE}eyJ[A-Za-z0-9_\-]{{8,4000}}\.eyJ[A-Za-z0-9_\-]{{8,8000}}\.[A-Za-z0-9_\-]{{8,2000}}",
        ),
    )
)
_SK = re.compile(rf"{_EDGE}sk-[A-Za-z0-9_\-]{{20,250}}")

_PEM_BEGIN: Final = "-----BEGIN "
_PEM_HEAD = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_PEM_TAIL = re.compile(r"-----END [A-Z0-9 ]{1,60}-----")
_PEM_BODY = re.compile(r"[A-Za-z0-9+/=\s\\]{0,20000}")
_PEM_LONGEST: Final = 20_000

_CREDENTIALS = re.compile(r"://([^\s/@:\"'<>\[]{1,64}:[^\s/@\"'<>]{1,128}@[^\s/:?#@\"'<>]{1,253})")

_ANNOUNCING: Final = (
    "password", "passwd", "pwd", "passphrase", "secret", "token", "api_key", "apikey", "api-key", "access_key",
    "accesskey", "private_key", "credential", "密码", "口令", "密碼",
)  # fmt: skip
_ASSIGNED = re.compile(
    r"[A-Za-z_\-]{0,16}[\"']?(?P<gap>[ \t]{0,4}(?::|=>|=|：|是|is(?=[ \t]))[ \t]{0,4})(?P<quote>[\"'`]?)"
    r"(?P<value>[^\s\"'`,;，。；()\[\]{}<>$]{6,256})"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_.\-/]*[0-9]{0,2}[A-Za-z_.\-/]*\Z")


def secrets(text: str) -> Iterator[Find]:
    """Keys of known forms, private key blocks, `user:password@host` in addresses, and passwords after such a word."""
    for marks, pattern in _KEYS:
        if any(mark in text for mark in marks):
            yield from (Find(*match.span(), "secret") for match in pattern.finditer(text))
    if "sk-" in text:
        yield from (Find(*m.span(), "secret") for m in _SK.finditer(text) if _looks_random(m.group()[3:]))
    if _PEM_BEGIN in text:
        yield from _private_keys(text)
    if "://" in text and "@" in text:
        yield from (Find(*match.span(1), "secret") for match in _CREDENTIALS.finditer(text))
    yield from _assigned(text)


def _private_keys(text: str) -> Iterator[Find]:
    """Each from its first line to its last; without a last line, as far as its letters go."""
    for head in _PEM_HEAD.finditer(text):
        tail = _PEM_TAIL.search(text, head.end(), head.end() + _PEM_LONGEST)
        body = _PEM_BODY.match(text, head.end())
        stop = tail.end() if tail else len(text[: body.end() if body else head.end()].rstrip())
        yield Find(head.start(), max(stop, head.end()), "secret")


def _assigned(text: str) -> Iterator[Find]:
    """Values after a word such as `password` and a sign such as `=`, when they look like no word or name."""
    # İ is the one character whose small form is longer, which would shift all places after it.
    lowered = text.replace("İ", "I").lower()
    for word in _ANNOUNCING:
        at = lowered.find(word)
        while at >= 0:
            match = _ASSIGNED.match(text, at + len(word))
            if match is not None and _looks_secret(match):
                yield Find(*match.span("value"), "secret")
            at = lowered.find(word, at + len(word))


def _looks_secret(match: re.Match[str]) -> bool:
    value = match["value"].rstrip(".:!?")
    if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))) or _entropy(value) < 2.5:
        return False
    # In code `token = table2` is a name; in quotes, or close to its sign as in `password=hunter2`, it is a value.
    close = not match["gap"].strip("=:：是")
    return bool(match["quote"]) or close or not _IDENTIFIER.match(value)


def _looks_random(value: str) -> bool:
    """Letters and digits in disorder, not a name such as `sk-loading-indicator-wrapper`."""
    digits = sum(map(str.isdigit, value))
    return digits >= 2 and _entropy(value) >= 3.0


def _entropy(value: str) -> float:
    """Bits in a character, by the value's own frequencies."""
    total = len(value)
    return -sum(n / total * math.log2(n / total) for n in Counter(value).values())
