"""Web archives (WARC): the HTML and plain-text pages in them, each with its address."""

import io
from collections.abc import Iterator
from typing import Any

from llmkit.data.files import File, read_chunks, shown
from llmkit.data.places import Fault, Faults, FileFault
from llmkit.data.remote import bare_url
from llmkit.errors import MissingError

LARGEST_PAGE = 64 * 2**20
"""Bytes a page may have, for it must be read whole; a larger one is left out."""

_KINDS = ("text/html", "text/plain", "application/xhtml+xml")


def warc_pages(path: File, faults: Faults) -> Iterator[tuple[str, str]]:
    """The address and text of each HTML or plain-text answer with status 200; HTML stays HTML.

    A page is decoded by the charset it declares, else as UTF-8. Such archives always hold some pages that
    are not what they say; these are left out and counted, whatever `on_error` says.

    Raises:
        DataError: It is no web archive.
        MissingError: fastwarc is not installed.
    """
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise MissingError(
            f"{shown(path)}: reading web archives needs the package fastwarc",
            hint="pip install 'llmkit[warc]'",
        ) from None
    stream = _Chunks(read_chunks(path, faults.tally))
    if not stream.begins_with(b"WARC/"):
        raise _no_archive(path, "it does not begin with WARC/")
    number = 0
    try:
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response, parse_http=False):
            number += 1
            try:
                page = _text(record)
            except Fault as fault:
                faults.tally.skip_row(fault, faults.place, number)
            else:
                if page is not None:
                    yield _address(record) or shown(path), page
    except (OSError, ValueError) as error:
        raise _no_archive(path, str(error)) from error


def _text(record: Any) -> str | None:
    """The page's text; None if the answer is something else.

    Raises:
        Fault: It is too large, damaged, or not in the charset that it declares.
    """
    address = _address(record)
    if record.content_length > LARGEST_PAGE:
        raise _too_large(address)
    try:
        answer = _copied(record)
        answer.parse_http(auto_decode="all")
        if not _is_page(answer):
            return None
        body = answer.reader.read(LARGEST_PAGE + 1)
    except (OSError, ValueError) as error:
        raise Fault("damaged page", f"{error}", value=address) from error
    if len(body) > LARGEST_PAGE:
        raise _too_large(address)
    try:
        text = body.decode(answer.http_charset or "utf-8")
    except (LookupError, UnicodeError, ValueError) as error:
        raise Fault("page not in its charset", f"{error}", value=address) from error
    return str(text).removeprefix("\ufeff").replace("\r\n", "\n")


def _copied(record: Any) -> Any:
    """The record apart from its archive: else a page that cannot be unpacked would keep us from the next one."""
    from fastwarc.warc import WarcRecord

    answer = WarcRecord()
    answer.init_headers(record.record_type)
    answer.set_bytes_content(record.reader.read())
    answer.is_http = record.is_http
    return answer


def _too_large(address: str) -> Fault:
    return Fault("page too large", f"over {LARGEST_PAGE:,} bytes", value=address)


def _is_page(record: Any) -> bool:
    if not record.is_http or record.http_headers is None or record.http_headers.status_code != 200:
        return False
    return (record.http_content_type or "").lower() in _KINDS


def _address(record: Any) -> str:
    """The page's URL, without what may be secret in it."""
    return bare_url(str(record.headers.get("WARC-Target-URI", "")).strip("<>"))


def _no_archive(path: File, reason: str) -> FileFault:
    return FileFault(
        f"{shown(path)}: not a readable web archive ({reason})", reason="not a readable web archive"
    )


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""
        self._at = 0

    def begins_with(self, start: bytes) -> bool:
        """Whether the next bytes are these."""
        while len(self._held) < len(start) and (chunk := next(self._chunks, None)) is not None:
            self._held += chunk
        return self._held.startswith(start)

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = chunk
        view = memoryview(buffer)
        size = min(len(view), len(self._held))
        view[:size] = self._held[:size]
        self._held = self._held[size:]
        self._at += size
        return size
