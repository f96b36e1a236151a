"""Bytes to text to documents, as a stream: files of any size, lines of any length, in bounded memory."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Literal

from llmkit.data.cuts import is_cuttable
from llmkit.data.places import Fault, Faults, FileFault
from llmkit.errors import RecipeError

DocumentKind = Literal["auto", "file", "paragraph", "line"]

LONGEST_WHOLE = 64 * 1024
"""Characters a piece of text has at most; a longer file, paragraph or line is cut."""
LONGEST_FILE = 16 * 1024**2
"""Characters of a file that `documents: file` may take as one document."""

_PIECE = 32 * 1024
_SAMPLE_BYTES = 64 * 1024
_WIDE = ("utf_16", "utf_32")  # encodings in which a byte 0 is nothing special


def decode(
    chunks: Iterable[bytes], encoding: str, where: str, *, start: int = 0, mark: bool = False
) -> Iterator[str]:
    """Decode a stream; CRLF becomes LF, a byte-order mark at the beginning goes.

    What comes before a fault is given before the error is raised.

    Args:
        chunks: The bytes in pieces, cut anywhere.
        encoding: The recipe's `encoding`.
        where: The file, for messages.
        start: The byte of the file at which the stream begins, for messages.
        mark: Make bytes that are not text half surrogate pairs (`has_bad_bytes`), and let NUL bytes pass, so
            that the lines which hold them can be left out. For encodings in which `is_cuttable`.

    Raises:
        DataError: The bytes are not text in this encoding; names file and byte, and the encoding that would
        do. RecipeError: There is no such encoding.
    """
    decoder = _decoder(encoding, "surrogateescape" if mark else "strict")
    nul_is_text = mark or codecs.lookup(encoding).name.replace("-", "_").startswith(_WIDE)
    offset, carried, at_start = start, "", start == 0
    for chunk in _with_last(chunks):
        text, fault = _decode_chunk(decoder, chunk, offset=offset, encoding=encoding, where=where)
        text = carried + text
        if not nul_is_text and (zero := chunk.find(0)) >= 0 and "\0" in text:
            text, fault = text[: text.index("\0")], _looks_binary(where, offset + zero)
        offset += len(chunk)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        # A \r at the end may be the first half of a \r\n: wait for the next piece.
        carried = "\r" if chunk and not fault and text.endswith("\r") else ""
        text = text.removesuffix("\r") if carried else text
        if text:
            yield text.replace("\r\n", "\n") if "\r" in text else text
        if fault:
            raise fault


def has_bad_bytes(text: str) -> bool:
    """Whether the text holds bytes that `decode` marked as no text."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_bytes(line: str) -> None:
    """Check a line that came from `decode` with `mark`.

    Raises:
        Fault: It holds bytes that are no text, or a NUL.
    """
    if has_bad_bytes(line):
        reason, what = "not text in this encoding", "bytes that are not text in the source's `encoding`"
    elif "\0" in line:
        reason, what = "NUL byte", "a NUL byte (0x00)"
    else:
        return
    raise Fault(reason, f"the line holds {what}", value=line)


def line_documents(chunks: Iterable[str], faults: Faults) -> Iterator[tuple[int, str]]:
    """One document a line, as `documents` with `line` gives them; faulty lines go to `faults`."""
    for number, line in documents(chunks, "line", faults.place.name):
        if faults.marked:
            try:
                check_bytes(line)
            except Fault as fault:
                faults.row(number, fault)
                continue
        yield number, line


def documents(chunks: Iterable[str], kind: DocumentKind, where: str) -> Iterator[tuple[int, str]]:
    """Cut one file's text into documents.

    Args:
        chunks: The text in pieces, cut anywhere.
        kind: The recipe's `documents`.
        where: The file, for messages.

    Yields:
        The line at which a document begins, and its text. A blank file is a blank document.

    Raises:
        DataError: `kind` is `file` and the file is too large to be one document.
    """
    if kind == "line":
        found = lines(chunks, LONGEST_WHOLE)
        yield from ((number, text) for number, text, _ in found if text and not text.isspace())
    elif kind == "paragraph":
        yield from _paragraphs(chunks)
    elif kind == "file":
        yield 1, _whole(chunks, where)
    else:
        yield from pieces(chunks)


def lines(chunks: Iterable[str], limit: int) -> Iterator[tuple[int, str, bool]]:
    """The lines of a text, without their ends.

    Yields:
        The line's number from 1, its text, and whether it ends here: a line longer than `limit` characters
        comes in parts of that length, all but the last marked False.
    """
    number, held, size = 1, list[str](), 0
    for chunk in chunks:
        *whole, rest = chunk.split("\n")
        for line in whole:
            if held:
                line = "".join(held) + line
                held, size = [], 0
            if len(line) > limit:
                *parts, line = _in_parts(line, limit)
                yield from ((number, part, False) for part in parts)
            yield number, line, True
            number += 1
        if rest:
            held.append(rest)
            size += len(rest)
        if size > limit:
            *parts, last = _in_parts("".join(held), limit)
            yield from ((number, part, False) for part in parts)
            held, size = [last], len(last)
    if size:
        yield number, "".join(held), True


def _in_parts(line: str, limit: int) -> list[str]:
    return [line[start : start + limit] for start in range(0, len(line), limit)]


def pieces(chunks: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The text whole if it has at most 64 Ki characters, else cut into pieces of about 32 Ki.

    A cut is put at a paragraph's end, else at a line's end, else (one giant line) after 64 Ki characters. The
    pieces together are the text.

    Yields:
        The line at which a piece begins, and the piece.
    """
    number, text, start = 1, "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        while len(text) - start > LONGEST_WHOLE:
            end = _place_to_cut(text, start)
            yield number, text[start:end]
            number += text.count("\n", start, end)
            start = end
    if len(text) > start:
        yield number, text[start:]


def _place_to_cut(text: str, start: int) -> int:
    for separator in ("\n\n", "\n"):
        place = text.rfind(separator, start + _PIECE // 2, start + _PIECE + _PIECE // 4)
        if place >= 0:
            return place + len(separator)
    return start + LONGEST_WHOLE


def _paragraphs(chunks: Iterable[str]) -> Iterator[tuple[int, str]]:
    begin, held, size = 1, list[str](), 0
    for number, text, ends in lines(chunks, LONGEST_WHOLE):
        blank = ends and (not text or text.isspace()) and (not held or held[-1].endswith("\n"))
        if held and (blank or size + len(text) > LONGEST_WHOLE):
            yield begin, "".join(held).strip("\n")
            held, size = [], 0
        if not blank:
            begin = begin if held else number
            held.append(text + "\n" if ends else text)
            size += len(held[-1])
    if held:
        yield begin, "".join(held).strip("\n")


def _whole(chunks: Iterable[str], where: str) -> str:
    held, size = [], 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size > LONGEST_FILE:
            raise FileFault(
                f"{where}: more than {LONGEST_FILE:,} characters are too much for one document",
                hint="use `documents: auto`, which cuts long files at paragraph ends",
                reason="too large for one document",
            )
    return "".join(held)


def _with_last(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks and an empty one that marks the end."""
    yield from (chunk for chunk in chunks if chunk)
    yield b""


def _decoder(encoding: str, errors: str = "strict") -> codecs.IncrementalDecoder:
    try:
        info = codecs.lookup(encoding)
        if info._is_text_encoding and info.incrementaldecoder is not None:
            return info.incrementaldecoder(errors)
    except LookupError:
        pass
    raise RecipeError(
        f"there is no text encoding {encoding!r}",
        hint="such as `utf-8`, `gb18030`, `big5`, `shift_jis`, `latin-1`, `utf-16`",
    )


def _decode_chunk(
    decoder: codecs.IncrementalDecoder, chunk: bytes, *, offset: int, encoding: str, where: str
) -> tuple[str, FileFault | None]:
    """The chunk's text, up to a fault if there is one."""
    try:
        return decoder.decode(chunk, final=not chunk), None
    except UnicodeDecodeError as error:
        # The decoder puts the bytes it still held before the chunk.
        at = offset + len(chunk) - len(error.object) + error.start
        before = bytes(error.object[: error.start]).decode(encoding) if is_cuttable(encoding) else ""
        return before, _not_text(bytes(error.object), error.start, at, encoding, where)
    except UnicodeError as error:
        hint = "set the source's `encoding:`"
        return "", FileFault(
            f"{where}: not {encoding} text ({error})", hint=hint, reason=f"not {encoding} text"
        )


def _not_text(data: bytes, start: int, at: int, encoding: str, where: str) -> FileFault:
    # From a line's beginning on: there every encoding in question is at a character's beginning.
    begin = data.rfind(b"\n", 0, start) + 1
    sample = data[begin : begin + _SAMPLE_BYTES]
    return FileFault(
        f"{where}: byte {at:,} (0x{data[start]:02x}) is not {encoding} text",
        hint=_advice(sample, at_file_start=at < 4, encoding=encoding),
        reason=f"not {encoding} text",
    )


def _advice(sample: bytes, *, at_file_start: bool, encoding: str) -> str:
    if at_file_start and sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it begins like UTF-16: set `encoding: utf-16` on the source"
    if sample.startswith(b"\x1f\x8b"):
        return "it looks compressed: give the file's name the ending .gz"
    if sample.startswith(b"\x28\xb5\x2f\xfd"):
        return "it looks compressed: give the file's name the ending .zst"
    if 0 in sample:
        return "it looks like a binary file: leave it out of `files`"
    if encoding != "gb18030" and _mostly_han(sample):
        return "it looks like Chinese in GB18030: set `encoding: gb18030` on the source"
    if encoding != "latin-1":
        return "if it is Western European text, set `encoding: latin-1` on the source; else repair the file"
    return "repair the file, or set the source's `encoding:`"


def _mostly_han(sample: bytes) -> bool:
    """Whether the bytes are GB18030 and their non-ASCII characters mostly Han."""
    for cut in range(4):  # the sample may end inside a character
        try:
            text = sample[: len(sample) - cut].decode("gb18030")
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if ord(character) > 127]
        han = sum("\u4e00" <= character <= "\u9fff" for character in foreign)
        return han > len(foreign) / 2
    return False


def _looks_binary(where: str, at: int) -> FileFault:
    return FileFault(
        f"{where}: byte {at:,} is NUL (0x00), so this looks like a binary file, not text",
        hint="leave it out of `files`; if it is UTF-16 text, set `encoding: utf-16-le` on the source",
        reason="NUL byte",
    )


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
