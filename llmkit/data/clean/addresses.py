"""Mail and IP addresses in a text."""

import re
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

from llmkit.data.clean.finds import Find

_LOCAL_REVERSED = re.compile(r"[A-Za-z0-9_%+\-.]{1,64}(?![A-Za-z0-9_%+\-.])")
_DOMAIN = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-])"
)
_FILE_ENDINGS: Final = ("png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css", "ts", "tsx", "jsx", "vue")

# A pattern that begins with a set of characters is searched several times as fast as one that begins with a look
# behind, so what may not stand before comes after the first character.
_FOUR = re.compile(
    r"[0-9](?<![0-9A-Za-z_.].)[0-9]{0,2}\.(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?![0-9A-Za-z_])(?!\.[0-9])"
)
_VERSION_BEFORE = re.compile(
    r"(?:version|ver\.?|release|section|版本|chapter|§)[\s:：=]{0,3}\Z", re.IGNORECASE
)
_COLONS = re.compile(r"[23](?<![0-9A-Za-z:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![0-9A-Za-z:])")
_DOCUMENTATION_6: Final = ("2001:db8:", "3fff:")


def mails(text: str) -> Iterator[Find]:
    """Mail addresses in ASCII; the time is linear in the text, as each `@` is looked at with its surroundings."""
    at = text.find("@")
    while at >= 0:
        found = _mail_at(text, at)
        if found is not None:
            yield found
        at = text.find("@", at + 1)


def _mail_at(text: str, at: int) -> Find | None:
    domain = _DOMAIN.match(text, at + 1)
    if domain is None:
        return None
    local = _LOCAL_REVERSED.match(text[max(0, at - 65) : at][::-1])
    if local is None:
        return None
    name = local.group()[::-1].lstrip(".-+%")
    # `git@host:path` is everyone's name, and `icon@2x.png` a file.
    everyone = name == "git" and text.startswith(":", domain.end())
    ending = domain.group().rpartition(".")[2].lower()
    if not name or name.endswith(".") or ".." in name or everyone or ending in _FILE_ENDINGS:
        return None
    return Find(at - len(name), domain.end(), "mail")


def ip_addresses(text: str) -> Iterator[Find]:
    """IP addresses of the public internet, versions 4 and 6.

    Left alone: private, loopback, documentation and other addresses that belong to nobody, and numbers that read
    as versions or sections: after such a word, or without a part above 99 (one real address in forty has none).
    """
    if text.count(".") >= 3:
        yield from (Find(*m.span(), "ip") for m in _FOUR.finditer(text) if _is_public_4(m, text))
    if ":" in text:
        yield from (Find(*m.span(), "ip") for m in _COLONS.finditer(text) if _is_public_6(m.group()))


def _is_public_4(match: re.Match[str], text: str) -> bool:
    try:
        address = IPv4Address(match.group())
    except AddressValueError:  # a number above 255, or a leading zero
        return False
    public = address.is_global and not address.is_multicast
    return (
        public
        and max(address.packed) > 99
        and not _VERSION_BEFORE.search(text, max(0, match.start() - 12), match.start())
    )


def _is_public_6(address: str) -> bool:
    try:
        public = IPv6Address(address).is_global
    except AddressValueError:
        return False
    return public and not address.lower().startswith(_DOCUMENTATION_6)
