import tracemalloc

import pytest

from llmkit.data.text import LONGEST_WHOLE, decode, documents, lines, pieces
from llmkit.errors import DataError, RecipeError


def decoded(data, encoding="utf-8", size=3):
    chunks = (data[i : i + size] for i in range(0, len(data), size))
    return "".join(decode(chunks, encoding, "a.txt"))


def cut(text, size):
    return (text[i : i + size] for i in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_decoding_does_not_depend_on_where_the_chunks_end(size):
    text = "naïve 中文 😀 \x01\x1b\x7f\ta\rb\n"
    assert decoded(text.encode(), size=size) == text
    assert decoded(text.encode("gb18030"), "gb18030", size) == text
    assert decoded(text.encode("utf-16"), "utf-16", size) == text


@pytest.mark.parametrize("size", [1, 2, 3, 4, 1000])
def test_line_ends_and_byte_order_mark(size):
    data = b"\xef\xbb\xbfa\r\nb\r\r\nc\rd\r\n\r\n\r"
    assert decoded(data, size=size) == "a\nb\r\nc\rd\n\n\r"
    assert decoded("x\ufeffy".encode(), size=size) == "x\ufeffy"
    assert "".join(decode(["\ufeffy".encode()], "utf-8", "a.txt", start=5)) == "\ufeffy"


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_invalid_bytes_are_named_with_their_place(size):
    with pytest.raises(DataError, match=r"a\.txt: byte 12 \(0xff\) is not utf-8 text"):
        decoded(b"good\n\xe4\xb8\xadtext\xff more\n", size=size)
    with pytest.raises(DataError, match=r"byte 4 \(0xe4\)"):
        decoded(b"good\xe4\xb8", size=size)


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ("第一行\n这是一个很长的中文句子。\n".encode("gb18030") * 9, "encoding: gb18030"),
        (b"ascii first\n" * 99 + "从前有座山".encode("gb18030"), "encoding: gb18030"),
        ("un café très chaud, s'il vous plaît\n".encode("latin-1"), "encoding: latin-1"),
        ("text".encode("utf-16"), "encoding: utf-16"),
        (b"\x1f\x8b\x08\x00abc", "ending .gz"),
        (b"\x28\xb5\x2f\xfdabc", "ending .zst"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "binary"),
    ],
)
def test_advice_on_encodings(data, advice):
    with pytest.raises(DataError) as caught:
        decoded(data, size=10**6)
    assert advice in caught.value.hint


def test_nul_bytes_and_unknown_encodings():
    with pytest.raises(DataError, match=r"a\.txt: byte 6 is NUL .*binary"):
        decoded(b"ab\ncde\0")
    for name in ("utf8000", "base64"):
        with pytest.raises(RecipeError, match="no text encoding"):
            decoded(b"a", name)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_lines_come_in_parts_of_the_limit(size):
    text = "ab\n\nabcdefghij\nabcde\nz"
    assert list(lines(cut(text, size), 5)) == [
        (1, "ab", True),
        (2, "", True),
        (3, "abcde", False),
        (3, "fghij", True),
        (4, "abcde", True),
        (5, "z", True),
    ]
    assert list(lines(cut("abcdefghijk", size), 5)) == [
        (1, "abcde", False),
        (1, "fghij", False),
        (1, "k", True),
    ]


def test_documents_by_line_paragraph_and_file():
    text = "\n\none\ntwo\n \t\nthree  \n\n\n\nfour"
    assert list(documents([text], "line", "a")) == [(3, "one"), (4, "two"), (6, "three  "), (10, "four")]
    assert list(documents([text], "paragraph", "a")) == [(3, "one\ntwo"), (6, "three  "), (10, "four")]
    assert list(documents([text], "file", "a")) == [(1, text)]
    assert list(documents([text], "auto", "a")) == [(1, text)]


def test_long_files_are_cut_at_paragraph_ends_and_nothing_is_lost():
    text = "".join(f"line {i}\n" + "\n" * (i % 9 == 0) for i in range(40_000))
    got = list(pieces(cut(text, 1 << 20)))
    assert "".join(piece for _, piece in got) == text
    assert got == list(pieces(cut(text, 1001)))
    assert all(piece.endswith("\n\n") and 16_384 <= len(piece) <= 40_962 for _, piece in got[:-1])
    number = 1
    for line, piece in got:
        assert line == number
        number += piece.count("\n")
    assert [piece for _, piece in pieces(["x" * LONGEST_WHOLE])] == ["x" * LONGEST_WHOLE]


@pytest.mark.parametrize("kind", ["auto", "line", "paragraph"])
def test_a_giant_line_is_cut_in_bounded_memory(kind):
    total = 100_000_000
    chunks = ("x" * 2**20 for _ in range(total // 2**20))
    tracemalloc.start()
    lengths = [len(text) for _, text in documents(chunks, kind, "a")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == total // 2**20 * 2**20
    assert max(lengths) == LONGEST_WHOLE
    assert peak < 8 * 2**20


def test_a_file_too_large_for_one_document():
    with pytest.raises(DataError, match="16,777,216 characters") as caught:
        list(documents(("x" * 2**20 for _ in range(17)), "file", "big.txt"))
    assert "documents: auto" in caught.value.hint
