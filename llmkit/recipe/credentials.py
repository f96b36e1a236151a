"""What a secret looks like when it stands in a text: passwords and signatures in URLs, and known kinds of tokens.

A recipe is copied into the run folder, shown in reports and sent to colleagues, so it must not hold one.
"""

import re
from collections.abc import Iterator

_IN_URLS = (
    re.compile(r"://([^/\s:@'\"]{1,200}:[^/\s@'\"]{1,500})@"),
    re.compile(
        r"[?&](?:sig|signature|x-amz-signature|x-amz-security-token|x-amz-credential|x-goog-signature"
        r"|x-goog-credential|(?:[a-z]+[_-])?token|api[_-]?key|key|secret|password|passwd|auth)"
        r"=([^&#\s'\"]{4,8000})",
        re.IGNORECASE,
    ),
)
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,200}|sk-[A-Za-z0-9_-]{32,250}|gh[pousr]_[A-Za-z0-9]{30,200}"
    r"|github_pat_\w{40,250}|AKIA[A-Z0-9]{16}|glpat-[A-Za-z0-9_-]{20,200}|xox[abprs]-[A-Za-z0-9-]{20,200})"
)


def secrets_in(text: str) -> Iterator[tuple[int, int]]:
    """Where secrets stand in `text`, as start and end, each kind in turn."""
    for pattern in _IN_URLS:
        yield from (match.span(1) for match in pattern.finditer(text))
    yield from (match.span() for match in _TOKENS.finditer(text))


def looks_secret(text: str) -> bool:
    """Whether a secret of a known form stands in `text`."""
    return next(secrets_in(text), None) is not None


def starred(text: str) -> str:
    """`text` of the same length with stars in the place of secrets."""
    letters = list(text)
    for start, end in secrets_in(text):
        letters[start:end] = "*" * (end - start)
    return "".join(letters)


def masked(text: str, mask: str = "***") -> str:
    """`text` with each secret replaced by `mask`."""
    for start, end in sorted(set(secrets_in(text)), reverse=True):
        text = text[:start] + mask + text[end:]
    return text
