"""Files on a web server, by plain HTTP: no driver is needed, and a changed file is told from the old one."""

import base64
import email.utils
import http
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from llmkit.data.remote import RemoteFile, bare_url, changed, retried
from llmkit.errors import DataError

_TIMEOUT_S = 60
_SKIP_BYTES = 2**20
_SURELY_OLD_S = 2  # a file changed so long ago cannot change again within the same second of its date
_LASTING = (401, 403, 404, 405, 410, 416)  # answers that asking again does not change
_NO_HEAD = (403, 405, 501)


class _HeadRefusedError(Exception):
    """The server does not tell the headers alone."""


def web_file(url: str) -> RemoteFile:
    """The file that a URL means.

    Raises:
        DataError: It is not there, or may not be read.
        MissingError: The server cannot be reached.
    """
    if any(sign in urlsplit(url).path for sign in "*["):
        raise DataError(f"{bare_url(url)}: a web server does not list its files", hint="name each of them")
    shown = bare_url(url)

    def look() -> RemoteFile:
        with _asked_about(url) as answer:
            length = answer.headers.get("Content-Length")
            ranges = answer.headers.get("Accept-Ranges", "").strip().lower() == "bytes"
            return RemoteFile(
                shown, url, url, int(length) if length else None, _stamp_of(answer), ranges and bool(length)
            )

    return retried(look, shown)


def _asked_about(url: str) -> Any:
    """The server's answer, of which only the headers are wanted."""
    try:
        return _ask(url, {}, method="HEAD")
    except _HeadRefusedError:
        return _ask(url, {})  # a signed address may be good for GET alone


def open_at(file: RemoteFile, start: int) -> Any:
    """The server's answer, to read from byte `start` on.

    Raises:
        DataError: The file changed since it was listed.
        OSError: The server refuses (PermissionError) or does not answer.
    """
    answer = _ask(file.path, {"Range": f"bytes={start}-"} if start else {})
    if file.stamp and _stamp_of(answer) not in ("", file.stamp):
        answer.close()
        raise changed(file)
    if start and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        for size in _steps(start):
            answer.read(size)
    return answer


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> Any:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    bare = urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(bare, headers={"Accept-Encoding": "identity", **headers}, method=method)  # noqa: S310
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 (http and https alone get here)
    except urllib.error.HTTPError as error:
        error.close()
        if method == "HEAD" and error.code in _NO_HEAD:
            raise _HeadRefusedError from None
        kind = PermissionError if error.code in _LASTING else ConnectionError
        raise kind(f"{error.code} {error.reason}") from None


def _stamp_of(answer: Any) -> str:
    """What the answer says of the content: a strong ETag, or a date so old that a later change shows in it."""
    etag = answer.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return f"ETag {etag}"
    changed, now = (_seconds(answer.headers.get(name)) for name in ("Last-Modified", "Date"))
    if changed is not None and now is not None and now - changed >= _SURELY_OLD_S:
        return f"Last-Modified {answer.headers['Last-Modified']}"
    return ""


def _seconds(date: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def _steps(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, _SKIP_BYTES)
        total -= _SKIP_BYTES
